"""Two promises of the CPU engine: prompts do not stall streams, drafts cost nothing.

gap        Over HTTP: while streams run, a prompt of thousands of tokens arrives. Measures the time
           between two tokens of the streams while its chunks are computed; it has a target.
drafts     In this process: two engines of one thread each, with and without drafts, compute the
           same chats of 1, 8 and 32 clients, some tokens at a time in turns. Compares the CPU time
           of the thread, so that other load on the machine affects both sides of a pair or neither.
           Copies must cost less, and free text (varied questions, temperature 0.7, natural ends)
           hardly more.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from loadtest.bench.peers import SERVERS
from loadtest.bench.servers import Plan, Running, running
from model.checkpoint import open_model
from model.checkpoint.fetch import default_cache, resolve
from model.runners import RunnerOptions
from model.runners.native import NativeRunner
from model.text.tokenizer import Tokenizer
from service.bench.client import Outcome, Target, arrive, percentile
from service.bench.workloads import make_prompt, make_prompts, make_question
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer, StepReport
from service.engine.plan import EngineConfig
from service.messages import End, Event, GenerationRequest, SamplingParams

_STREAMS = 8
_LONG = 4000  # tokens of the prompt that arrives meanwhile
_TARGET = EngineConfig().target_gap
_TURN = 16  # tokens per client, engine and turn
_CLIENTS = (1, 8, 32)


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


class Engine(Observer):
    """An engine that steps on the calling thread; its clock is that thread's CPU time."""

    def __init__(self, path: Path, *, clients: int, speculate: bool, variant: str) -> None:
        model, tokenizer = open_model(path), Tokenizer.from_checkpoint(path)
        options = RunnerOptions(num_threads=1, num_blocks=64 * clients)
        self._runner = NativeRunner(
            model.config, model.weights, options=options, digest=model.digest, variant=variant
        )
        self._runner.warm_up()
        self.ids: dict[str, list[int]] = {}  # output tokens by request
        self.accepted = self.drafted = 0
        self._clients = clients
        self._waiting: deque[GenerationRequest] = deque()
        self._num_running = 0
        self._loop = EngineLoop(
            self._runner,
            config=EngineConfig(max_sequences=clients, speculate=speculate),
            token_bytes=tokenizer.token_bytes,
            eos_ids=tokenizer.eos_ids,
            deliver=self._read,
            observer=self,
            clock=time.thread_time,
        )

    def begin(self, requests: Sequence[GenerationRequest]) -> None:
        """Each client sends its next request when its last one has ended."""
        self.ids = {request.id: [] for request in requests}
        self._waiting = deque(requests)

    def go_on(self, num: int) -> float:
        """CPU seconds until there are at least `num` output tokens, or all requests have ended."""
        began = time.thread_time()
        while not self.done and sum(map(len, self.ids.values())) < num:
            while self._waiting and self._num_running < self._clients:
                self._loop.add(Work(request=self._waiting.popleft()))
                self._num_running += 1
            self._loop.step()
        return time.thread_time() - began

    @property
    def done(self) -> bool:
        return not self._waiting and not self._num_running

    def stepped(self, report: StepReport) -> None:
        self.drafted += report.num_drafts
        self.accepted += report.num_accepted

    def close(self) -> None:
        self._runner.close()

    def _read(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event.record, End):
                self._num_running -= 1
            else:
                self.ids[event.request_id] += event.record.ids


def compare(
    drafting: Engine, plain: Engine, requests: Sequence[GenerationRequest], *, clients: int
) -> list[tuple[float, float]]:
    """CPU seconds per turn (without drafts, with drafts). Raises SystemExit if outputs differ."""
    for engine in (drafting, plain):
        engine.begin(requests)
    turns: list[tuple[float, float]] = []
    while not (drafting.done and plain.done):
        num = _TURN * clients * (len(turns) + 1)
        order = [drafting, plain] if len(turns) % 2 else [plain, drafting]
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


def make_chats(
    tokenizer: Tokenizer, kind: str, *, clients: int, repeats: int
) -> list[GenerationRequest]:
    """`repeats` requests per client, and at least 8 in all."""
    chats = []
    for index in range(max(8, repeats * clients)):
        draw = random.Random(index)
        if kind == "copies":
            text = make_prompt(f"copy/{index}", num_tokens=100)
            question = f"Repeat this text exactly:\n\n{text}"
        else:
            question = make_question(draw)
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}])
        if kind == "copies":  # a small model does not copy unless it has begun to
            prompt += tokenizer.encode(text, add_bos=False)[:20]
        sampling = SamplingParams(seed=index, temperature=0.0 if kind == "copies" else 0.7)
        chats.append(
            GenerationRequest(
                id=f"{kind}/{index}", prompt_ids=tuple(prompt), sampling=sampling,
                max_tokens=100 if kind == "copies" else 256,
            )
        )  # fmt: skip
    return chats


def print_drafts(model: Path, *, repeats: int, clients_of: Sequence[int], variant: str) -> None:
    tokenizer = Tokenizer.from_checkpoint(model)
    print("\nspeed with drafts / without, CPU time of one thread (95 % interval)")
    for clients in clients_of:
        drafting, plain = (
            Engine(model, clients=clients, speculate=speculate, variant=variant)
            for speculate in (True, False)
        )
        for kind in ("copies", "free text"):
            chats = make_chats(tokenizer, kind, clients=clients, repeats=repeats)
            drafting.accepted = drafting.drafted = 0
            ratio, low, high = interval(compare(drafting, plain, chats, clients=clients))
            tokens = sum(map(len, plain.ids.values()))
            print(
                f"{clients:3} clients  {kind:10} {ratio:6.3f} ({low:.3f} to {high:.3f})   "
                f"{tokens} tokens, {drafting.accepted} of {drafting.drafted} drafts accepted",
                flush=True,
            )
        drafting.close()
        plain.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("gap", "drafts"))
    parser.add_argument("--clients", type=int, nargs="+", default=_CLIENTS, help="of the drafts")
    parser.add_argument("--variant", default="", help="instruction set of the drafts' engines")


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
        print_drafts(
            model,
            repeats=options.repeats,
            clients_of=options.clients,
            variant=options.variant,
        )
