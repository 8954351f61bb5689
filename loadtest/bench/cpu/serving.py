"""CPU cost of serving a token, without the network that generates it.

Runs the whole of `quire serve` with a runner that returns each step after `--pace` seconds and
computes nothing: schedule, pack, detokenise, journal, JSON, SSE and sockets remain. The clients are
a process of their own. Prints microseconds of CPU per token by thread, and the share of one core
that serving takes at several token rates. `--profile` profiles the event loop.

CPU time depends on the machine's load too: compare rows of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import uvloop

from loadtest.bench.cpu.overhead import InstantRunner
from model.batch import Batch, StepOutput
from model.checkpoint.fetch import default_cache, resolve
from model.runners import RunnerOptions
from service.http.listeners import Listener
from service.http.ports import address, bind
from service.messages import ModelCard
from service.observability.metrics import Metrics
from service.parts import ApiModel, ApiSide, EngineSide, connect_queue
from service.roles import run_until_stopped
from service.settings import Settings
from service.startup import Loaded, load_tokenizer

_RATES = (500, 1000, 2000)  # tokens per second


class PacedRunner(InstantRunner):
    """Sleeps for `pace` seconds per step, as a host that waits for a device."""

    def __init__(self, *, pace: float, num_blocks: int) -> None:
        super().__init__(period=40_000, num_blocks=num_blocks)
        self._pace = pace

    def run(self, batch: Batch) -> StepOutput:
        time.sleep(self._pace)
        return super().run(batch)


class Server:
    """The service in this process, on free ports."""

    def __init__(self, *, pace: float, streams: int) -> None:
        self.settings = Settings(port=0, admin_port=0)
        self._options = RunnerOptions(max_sequences=max(64, streams))
        self.public = bind("127.0.0.1", 0)
        self._runner = PacedRunner(pace=pace, num_blocks=streams * 128)
        self.is_ready = asyncio.Event()

    async def serve(self, until: asyncio.Event) -> None:
        """Serves until `until` is set."""
        metrics = Metrics()
        queue = await connect_queue(self.settings, metrics)
        card = ModelCard(
            id="instant",
            max_model_len=2048,
            vocab_size=self._runner.config.vocab_size,
            numeric_class="instant",
            created=0,
        )
        path = resolve("", cache=default_cache())
        tokenizer = load_tokenizer(path)
        loaded = Loaded(
            path=path,
            runner=self._runner,
            tokenizer=tokenizer,
            card=card,
            seconds=0.0,
            fallback_reason="",
            options=self._options,
        )
        engine = EngineSide(self.settings, loaded, queue, metrics)
        api = ApiSide(
            self.settings,
            [ApiModel(card=card, tokenizer=tokenizer)],
            queue,
            metrics,
            engines=[engine],
        )
        listeners = [Listener(api.app, self.public), Listener(api.admin_app, bind("127.0.0.1", 0))]
        serving = asyncio.create_task(
            run_until_stopped(queue, listeners, api=api, engines=[engine], ready=self.is_ready.set)
        )
        await until.wait()
        os.kill(os.getpid(), 15)  # SIGTERM, as an operator stops it
        await serving


def thread_seconds() -> dict[str, float]:
    """CPU seconds of this process's threads so far."""
    seconds = {"event loop": 0.0, "engine": 0.0, "others": 0.0}
    engine = next((t.native_id for t in threading.enumerate() if t.name == "engine"), None)
    tick = os.sysconf("SC_CLK_TCK")
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
        name = {os.getpid(): "event loop", engine: "engine"}.get(int(task.name), "others")
        seconds[name] += (int(fields[11]) + int(fields[12])) / tick
    return seconds


_CLIENTS = """
import asyncio, sys
from service.bench.client import Target, drive
from service.bench.workloads import make_prompts
port, streams, tokens = map(int, sys.argv[1:])
target = Target(port=port, fields={"model": "instant", "ignore_eos": True})
prompts = make_prompts("serving", count=streams, num_tokens=3)
outcomes, _ = asyncio.run(drive(target, prompts, clients=streams, max_tokens=tokens))
sys.exit(next((outcome.error for outcome in outcomes if outcome.error), 0))
"""


def start_clients(port: int, streams: int, tokens: int) -> subprocess.Popen[bytes]:
    """Streams concurrent completions of `tokens` tokens each."""
    command = [sys.executable, "-c", _CLIENTS, str(port), str(streams), str(tokens)]
    return subprocess.Popen(command)


async def measure(
    streams: int, tokens: int, *, pace: float, around: Callable[[], None]
) -> dict[str, float]:
    """Microseconds of CPU per token, by thread. Calls `around` when load begins and ends."""
    server, until = Server(pace=pace, streams=streams), asyncio.Event()
    serving = asyncio.create_task(server.serve(until))
    await server.is_ready.wait()
    port = int(address(server.public).rsplit(":", 1)[1])
    before = thread_seconds()
    around()
    clients = start_clients(port, streams, tokens)
    status = await asyncio.to_thread(clients.wait)
    around()
    after = thread_seconds()
    until.set()
    await serving
    if status:
        raise SystemExit("the clients failed")
    return {name: (after[name] - before[name]) / streams / tokens * 1e6 for name in after}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--pace", type=float, default=0.005)
    parser.add_argument("--profile", action="store_true")


def run(options: argparse.Namespace) -> None:
    profiler = cProfile.Profile()
    switched = False

    def switch() -> None:
        nonlocal switched
        switched = not switched
        if options.profile:
            (profiler.enable if switched else profiler.disable)()

    print("microseconds of CPU per token".ljust(30) + "event loop     engine     others      total")
    for streams in map(int, options.streams.split(",")):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            cost = runner.run(measure(streams, options.tokens, pace=options.pace, around=switch))
        total = sum(cost.values())
        cells = "".join(f"{value:>11.0f}" for value in (*cost.values(), total))
        print(f"{streams} streams".ljust(29) + cells)
        shares = ", ".join(f"{rate * total / 1e4:.0f} % at {rate} tok/s" for rate in _RATES)
        print(f"  of one core: {shares}")
    if options.profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(35)
