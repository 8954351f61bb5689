"""Two promises of the CPU engine: prompts do not stall streams, drafts cost nothing.

gap        Over HTTP: while streams run, a prompt of thousands of tokens arrives. Measures the time
           between two tokens of the streams while its chunks are computed; it has a target.
drafts     In this process: two engines of one thread each, with and without drafts, compute the
           same requests, some tokens at a time in turns. Compares the CPU time of the thread, so
           that other load on the machine affects both sides of a pair or neither. Text that repeats
           itself must cost less, and other text hardly more.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtest.bench.peers import SERVERS
from loadtest.bench.servers import Plan, Running, running
from loadtest.client import Outcome, Target, arrive, percentile
from loadtest.workloads import make_prompt, make_prompts
from model.checkpoint import load_model
from model.checkpoint.fetch import default_cache, resolve
from model.runners import RunnerOptions
from model.runners.native import NativeRunner
from model.text.tokenizer import Tokenizer
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer
from service.engine.plan import EngineConfig
from service.messages import Event, GenerationRequest, SamplingParams

_STREAMS = 8
_LONG = 4000  # tokens of the prompt that arrives meanwhile
_TARGET = EngineConfig().target_gap
_SENTENCE = "The quick brown fox jumps over the lazy dog and runs into the forest. "
_TURN = 32  # tokens per engine and turn
_KINDS: Mapping[str, tuple[SamplingParams, int]] = {  # and output tokens
    "copies": (SamplingParams(seed=7, temperature=0.0), 256),  # later the model stops to repeat
    "free text": (SamplingParams(seed=7, temperature=1.0), 512),
}


async def measure_gap(target: Target, *, seed: str) -> tuple[list[float], list[float], float]:
    """Gaps of the streams before and during the prefill of the long prompt, and its TTFT."""
    prompts = [*make_prompts(seed, count=_STREAMS, num_tokens=64)]
    prompts.append(make_prompt(f"{seed}/long", num_tokens=_LONG))
    started = time.monotonic()
    outcomes, _ = await arrive(
        target, prompts, times=[0.0] * _STREAMS + [1.0], max_tokens=600, patience=120.0
    )
    long = outcomes[-1]
    check(outcomes)
    begins, ends = long.sent, long.arrivals[0]
    before: list[float] = []
    during: list[float] = []
    for outcome in outcomes[:-1]:
        for gap, at in zip(outcome.gaps, outcome.arrivals[1:], strict=True):
            if begins <= at <= ends:
                during.append(gap)
            elif started + 0.5 < at < begins:
                before.append(gap)
    return before, during, ends - begins


def check(outcomes: Sequence[Outcome]) -> None:
    """Raises SystemExit if a request failed."""
    errors = {outcome.error for outcome in outcomes if outcome.error}
    if errors:
        raise SystemExit(f"not measured: {', '.join(sorted(errors))}")


def print_gaps(server: Running, *, repeats: int) -> None:
    """One row a repeat."""
    print(
        f"gaps in ms: {_STREAMS} streams, then a prompt of {_LONG} tokens "
        f"(target {_TARGET * 1e3:.0f})"
    )
    print("                  before               while it is computed      over   its first token")
    for repeat in range(repeats):
        before, during, first = asyncio.run(measure_gap(server.target, seed=f"gap/{repeat}"))
        quiet = "/".join(f"{percentile(before, p) * 1e3:5.1f}" for p in (50, 99))
        busy = "/".join(f"{percentile(during, p) * 1e3:5.1f}" for p in (50, 99, 100))
        over = sum(gap > _TARGET for gap in during) / len(during)
        print(f"p50/p99 {quiet:>18}   p50/p99/max {busy:>20} {over:>6.1%} {first:>12.2f} s")


class Engine:
    """An engine that steps on the calling thread; its clock is that thread's CPU time."""

    def __init__(self, path: Path, *, speculate: bool) -> None:
        model, tokenizer = load_model(path), Tokenizer.from_checkpoint(path)
        options = RunnerOptions(num_threads=1, num_blocks=64)
        runner = NativeRunner(model.config, model.weights, options=options, digest=model.digest)
        runner.warm_up()
        self.ids: list[int] = []  # output tokens of the current request
        self._loop = EngineLoop(
            runner,
            config=EngineConfig(max_sequences=1, speculate=speculate),
            token_bytes=tokenizer.token_bytes,
            eos_ids=frozenset(),
            deliver=self._read,
            observer=Observer(),
            clock=time.thread_time,
        )

    def begin(self, request: GenerationRequest) -> None:
        self.ids.clear()
        self._loop.add(Work(request=request))
        self.go_on(1)

    def go_on(self, num: int) -> float:
        """CPU seconds until there are at least `num` output tokens."""
        began = time.thread_time()
        while len(self.ids) < num:
            self._loop.step()
        return time.thread_time() - began

    def _read(self, events: Sequence[Event]) -> None:
        for event in events:
            self.ids += getattr(event.record, "ids", ())


def compare(
    drafting: Engine, plain: Engine, request: GenerationRequest
) -> list[tuple[float, float]]:
    """CPU seconds per turn (without drafts, with drafts). Raises SystemExit if outputs differ."""
    for engine in (drafting, plain):
        engine.begin(request)
    turns = []
    for index, num in enumerate(range(_TURN, request.max_tokens + 1, _TURN)):
        order = [drafting, plain] if index % 2 else [plain, drafting]
        seconds = {id(engine): engine.go_on(num) for engine in order}
        turns.append((seconds[id(plain)], seconds[id(drafting)]))
    if drafting.ids != plain.ids:
        raise SystemExit("the outputs differ")
    return turns


def interval(turns: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """The ratio of both sums and its 95 % bootstrap interval."""
    draw = random.Random(0)
    samples = [draw.choices(turns, k=len(turns)) for _ in range(1000)]
    ratios = [_ratio(sample) for sample in samples]
    return _ratio(turns), percentile(ratios, 2.5), percentile(ratios, 97.5)


def _ratio(turns: Sequence[tuple[float, float]]) -> float:
    return sum(before for before, _ in turns) / sum(after for _, after in turns)


def print_drafts(model: Path, *, num_tokens: int) -> None:
    tokenizer = Tokenizer.from_checkpoint(model)
    drafting, plain = Engine(model, speculate=True), Engine(model, speculate=False)
    print("\nspeed with drafts / without, 1 client, CPU time of one thread")
    for kind, (sampling, length) in _KINDS.items():
        turns = []
        for repeat in range(num_tokens // length):
            copied = f"{repeat} {_SENTENCE * 8}"
            text = copied if kind == "copies" else make_prompt(f"free/{repeat}", num_tokens=100)
            request = GenerationRequest(
                id=f"{kind}/{repeat}",
                prompt_ids=tuple(tokenizer.encode(text)),
                sampling=sampling,
                max_tokens=length,
                ignore_eos=True,
            )
            turns += compare(drafting, plain, request)
        ratio, low, high = interval(turns)
        print(f"{kind:12} {ratio:6.3f}   ({low:.3f} to {high:.3f}, 95 %; {num_tokens} tokens each)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("gap", "drafts"))


def run(options: argparse.Namespace) -> None:
    model = resolve(options.model, cache=default_cache())
    if options.only != "drafts":
        with tempfile.TemporaryDirectory() as folder:
            plan = Plan(
                model=model,
                threads=2,
                clients=_STREAMS + 1,
                context=_LONG + 700,
                folder=Path(folder),
            )
            with running(SERVERS["quire"], plan) as server:
                print_gaps(server, repeats=options.repeats)
    if options.only != "gap":
        print_drafts(model, num_tokens=1024 * options.repeats)
