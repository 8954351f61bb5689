"""Engine replicas over the oracle: the real role, worker and loop; only the network is replaced.

Run as a program it is a fork server: it imports everything once, then forks one engine per line on
stdin (JSON: the engine's `arguments`, the path of its `log`) and prints the process id. For a line
with `expected` (the body of a completion) it prints the tokens that the oracle generates for it.
When an engine ends, its exit status is written to `<log>.exit`. When stdin closes, all are killed.

Faults inside an engine are files in the folder `hooks`: `<name>.json` with {"tokens": [...],
"at": [seed, index] or null, "action": ..., "keep": bool}. The fault happens in the step that
computes these consecutive tokens or, with `at`, in the step that samples output token `index` of
the request with that seed. Without `keep` it happens once, in the engine that deletes the file
first.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from model.batch import Batch
from model.runners import RunnerOptions
from service.banner import print_banner
from service.http.listeners import Listener
from service.http.ports import address, bind
from service.messages import GenerationRequest, ModelCard, SamplingParams
from service.observability.metrics import Metrics
from service.parts import EngineSide, connect_queue, engine_admin_app
from service.roles import run_role, run_until_stopped
from service.settings import Settings
from service.startup import Loaded, load_tokenizer, name_of
from tests.support.fakes import OracleRunner, oracle_answer


class OutOfMemory(RuntimeError):
    """The error of a device's allocator."""


class Hooks:
    """Called by the runner with each batch before it is computed."""

    def __init__(self, folder: Path, *, pace: float) -> None:
        self._folder = folder
        self._pace = pace

    def __call__(self, batch: Batch) -> None:
        time.sleep(self._pace)
        for path in self._folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                self._try(path, batch)

    def _try(self, path: Path, batch: Batch) -> None:
        hook = json.loads(path.read_text())
        if not _computes(batch, hook):
            return
        if not hook["keep"]:
            path.unlink()  # raises in all engines but the first
        with path.with_suffix(".happened").open("a") as proof:
            proof.write(f"{os.getpid()}\n")
        match hook["action"]:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(3)
            case "raise":
                raise ValueError("a fault in the network's code")
            case "out_of_memory":
                raise OutOfMemory("CUDA error: out of memory")
            case _:
                time.sleep(float(hook["action"]))


def _computes(batch: Batch, hook: dict[str, Any]) -> bool:
    """Whether this step is the one of the fault."""
    if hook["at"] is not None:
        rows = zip(batch.sampling.seeds_R.tolist(), batch.sampling.indices_R.tolist(), strict=True)
        return tuple(hook["at"]) in rows
    tokens, wanted = batch.tokens_T.tolist(), hook["tokens"]
    starts = range(len(tokens) - len(wanted) + 1)
    return any(tokens[start : start + len(wanted)] == wanted for start in starts)


async def serve_oracle(
    settings: Settings, console: Console, *, hooks: Path, pace: float, blocks: int, name: str
) -> None:
    """Like `roles.serve_engine` with the oracle as runner; `name` is its numeric class."""
    admin = bind(settings.host, settings.admin_port)
    limit = settings.max_model_len or 4096
    runner = OracleRunner(
        block_size=settings.block_size,
        num_blocks=blocks,
        max_model_len=limit,
        on_run=Hooks(hooks, pace=pace),
    )
    runner.numeric_class = name
    (source,) = settings.sources
    path = Path(source.source)
    tokenizer = load_tokenizer(path)
    card = ModelCard(
        id=source.name or name_of(source.source, path),  # as the API replicas call it
        max_model_len=min(limit, settings.block_size * blocks),
        vocab_size=runner.config.vocab_size,
        numeric_class=name,
        created=0,
        vocabulary=tokenizer.digest,
    )
    loaded = Loaded(
        path=path,
        runner=runner,
        tokenizer=tokenizer,
        card=card,
        seconds=0.0,
        fallback_reason="",
        options=RunnerOptions(max_sequences=settings.max_sequences or 64),
    )
    metrics = Metrics()
    queue = await connect_queue(settings, metrics)
    engine = EngineSide(settings, loaded, queue, metrics)
    rows = {"engine": engine.id, "metrics": f"{address(admin)}/metrics"}
    listeners = [Listener(engine_admin_app(settings, [engine], queue, metrics), admin)]
    ready = partial(print_banner, console, settings, rows, version="oracle")
    await run_until_stopped(queue, listeners, engines=[engine], ready=ready)


def be_engine(arguments: dict[str, Any]) -> None:
    """Runs one engine until it ends."""
    settings = Settings(log_format="json", admin_port=0, block_size=4, **arguments["settings"])
    role = partial(
        serve_oracle,
        hooks=Path(arguments["hooks"]),
        pace=arguments["pace"],
        blocks=arguments["blocks"],
        name=arguments["numeric_class"],
    )
    run_role(role, settings, console=Console(stderr=True))


def serve_forks(orders: TextIO) -> dict[str, Any] | None:
    """Forks an engine per line of stdin. Returns None at its end; in an engine, its line."""
    engines: dict[int, Path] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(orders, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=0.02):
                line = orders.readline()
                if not line:
                    break
                order: dict[str, Any] = json.loads(line)
                if "expected" in order:
                    answer(expected_tokens(order["expected"]))
                    continue
                pid = os.fork()
                if not pid:
                    return order
                engines[pid] = Path(order["log"])
                answer(pid)
            record_exits(engines)
    for pid in engines:
        os.kill(pid, signal.SIGKILL)
    return None


def answer(value: object) -> None:
    """Prints one line of JSON."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def expected_tokens(body: dict[str, Any]) -> list[int]:
    """The oracle's tokens for a body."""
    request = GenerationRequest(
        id="",
        prompt_ids=tuple(body["prompt"]),
        sampling=SamplingParams(seed=body["seed"], temperature=body["temperature"]),
        max_tokens=body["max_tokens"],
        ignore_eos=True,
    )
    return oracle_answer(request)


def record_exits(engines: dict[int, Path]) -> None:
    """Writes the exit statuses of engines to files: the test is not their parent process."""
    while engines:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if not ended:
            return
        ending = engines.pop(ended).with_suffix(".exit")
        ending.with_suffix(".tmp").write_text(str(os.waitstatus_to_exitcode(status)))
        ending.with_suffix(".tmp").rename(ending)


def redirect_output(log: Path) -> None:
    """Standard output and errors go to a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)


if __name__ == "__main__":
    # The libraries are loaded, so a fork takes milliseconds.
    mine = serve_forks(sys.stdin)
    if mine is not None:
        redirect_output(Path(mine["log"]))
        be_engine(mine["arguments"])
