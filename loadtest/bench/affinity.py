"""Prefix hits and times to first token of chats, by engines, with and without named prefixes.

Chats of several turns share a system prompt; a user reads each answer and thinks before the next
message. Engines are processes with a tiny model of random weights, over a redis-server of the
benchmark's own; each step sleeps as long as that of a small model on two cores would take. All rows
have the same chats and the same KV memory in total. Times depend on this machine's load.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loadtest.bench.queue import redis_server
from service.messages import End, Event, GenerationRequest, SamplingParams, Submission
from service.prefixes import prompt_prefixes
from service.queues import open_queue
from service.queues.contract import EngineInfo, Queue, QueueLimits
from service.worker.worker import Worker

VOCABULARY = 97
BLOCK_SIZE = 16
TOTAL_BLOCKS = 4096  # of all engines of a row
STEP_SECONDS, TOKEN_SECONDS = 0.008, 0.0002  # of a step, and more for each of its tokens
SYSTEM_TOKENS = 128
MESSAGE_TOKENS = (32, 96)
ANSWER_TOKENS = (32, 64)
LIMITS = QueueLimits(max_per_tenant=1024)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--chats", type=int, default=32)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--think", type=float, nargs=2, default=(1.0, 3.0), help="seconds, range")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> None:
    """Prints a row as soon as it is measured; the first one is that of a single engine."""
    print("| engines | prefixes | hit tokens | of one engine's | first token p50 | p95 |")
    print("|---:|---|---:|---:|---:|---:|")
    base: int | None = None
    for engines in sorted({1, *options.engines}):
        for named in (True,) if engines == 1 else (True, False):
            result = measure(options, engines=engines, named=named)
            base = base or result.hits
            p50, *_, p95 = statistics.quantiles(result.first_tokens, n=20)[9:19]
            print(
                f"| {engines} | {'named' if named else 'not named'} | {result.hits} "
                f"| {result.hits / base:.2f} | {p50 * 1000:.0f} ms | {p95 * 1000:.0f} ms |",
                flush=True,
            )


@dataclass
class Result:
    """Of all turns of all chats."""

    hits: int = 0  # prompt tokens
    first_tokens: list[float] = field(default_factory=list)  # seconds


def measure(options: argparse.Namespace, *, engines: int, named: bool) -> Result:
    with redis_server() as port:
        url = f"redis://127.0.0.1:{port}/0"
        with engine_processes(url, engines):
            return asyncio.run(_chat(url, options, engines=engines, named=named))


@contextlib.contextmanager
def engine_processes(url: str, count: int) -> Iterator[None]:
    """Engines that end with the context."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=serve, args=(url, n, count)) for n in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


async def _chat(url: str, options: argparse.Namespace, *, engines: int, named: bool) -> Result:
    queue, result = open_queue(url, LIMITS), Result()
    await queue.open()
    try:
        numeric_class = await _class_of(queue, engines)
        chats = (
            chat(queue, options, number, result, numeric_class=numeric_class if named else None)
            for number in range(options.chats)
        )
        await asyncio.gather(*chats)
    finally:
        await queue.close()
    return result


async def _class_of(queue: Queue, engines: int) -> str:
    """Waits for so many engines; returns their numeric class."""
    while True:
        reports = await queue.engines()
        if len(reports) >= engines:
            return reports[0].numeric_class
        await asyncio.sleep(0.1)


async def chat(
    queue: Queue,
    options: argparse.Namespace,
    number: int,
    result: Result,
    *,
    numeric_class: str | None,
) -> None:
    """One user's turns; prefixes are named if there is a numeric class."""
    draw, system = random.Random(f"{options.seed} {number}"), random.Random(options.seed)
    prompt = _tokens(system, SYSTEM_TOKENS)
    await asyncio.sleep(draw.uniform(0, options.think[1]))
    for turn in range(options.turns):
        prompt += _tokens(draw, draw.randint(*MESSAGE_TOKENS))
        request = GenerationRequest(
            id=f"s0-c{number}t{turn}.0",
            prompt_ids=tuple(prompt),
            sampling=SamplingParams(seed=number, temperature=0.0),
            max_tokens=draw.randint(*ANSWER_TOKENS),
            ignore_eos=True,
        )
        names = numeric_class and prompt_prefixes(
            prompt, tenant=request.tenant, numeric_class=numeric_class, block_size=BLOCK_SIZE
        )
        submission = Submission(
            id=request.id.removesuffix(".0"),
            tenant=request.tenant,
            requests=(request,),
            prefixes=(names,) if names else (),
        )
        prompt += await _answer(queue, submission, result)
        await asyncio.sleep(draw.uniform(*options.think))


async def _answer(queue: Queue, submission: Submission, result: Result) -> list[int]:
    began, ids = time.monotonic(), list[int]()
    reply = await queue.submit(submission)
    if reply.status != "ok":
        raise RuntimeError(f"the queue refused a request: {reply.status}")
    async for record in queue.follow(submission.requests[0].id):
        if isinstance(record, End):
            if record.error is not None:
                raise RuntimeError(f"an answer failed: {record.error}")
            result.hits += record.cached_tokens
        else:
            if not ids:
                result.first_tokens.append(time.monotonic() - began)
            ids += record.ids
    return ids


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(1, VOCABULARY) for _ in range(count)]


# --- an engine's process ---------------------------------------------------------------------
class Paced:
    """A runner whose steps take as long as those of a larger model."""

    def __init__(self, runner: Any) -> None:  # noqa: ANN401  # any runner, and its attributes
        self._runner = runner

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._runner, name)

    def run(self, batch: Any) -> Any:  # noqa: ANN401
        ends = time.monotonic() + STEP_SECONDS + TOKEN_SECONDS * batch.num_tokens
        result = self._runner.run(batch)
        time.sleep(max(0.0, ends - time.monotonic()))
        return result


def serve(url: str, number: int, count: int) -> None:
    """Runs one engine of `count` until it is killed."""
    asyncio.run(_serve(url, number, count))


async def _serve(url: str, number: int, count: int) -> None:
    import torch

    from loadtest.bench.gpu.models import TINY, RandomWeights
    from model.runners import RUNNERS, RunnerOptions
    from service.engine.loop import EngineLoop
    from service.engine.plan import EngineConfig
    from service.observability.metrics import Metrics

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = replace(TINY, vocab_size=VOCABULARY, max_model_len=4096)
    weights = {name: w.float() for name, w in RandomWeights(config, torch.device("cpu")).items()}
    sizes = RunnerOptions(dtype="float32", num_blocks=TOTAL_BLOCKS // count, block_size=BLOCK_SIZE)
    runner = Paced(RUNNERS["torch"](config, weights, sizes, "tiny"))
    metrics, queue = Metrics().of_model("tiny"), open_queue(url, LIMITS)

    def deliver(events: Sequence[Event]) -> None:
        worker.deliver(events)

    def info() -> EngineInfo:
        return EngineInfo(
            id=f"engine-{number}",
            numeric_class=runner.numeric_class,
            version="bench",
            running=worker.running,
            block_size=BLOCK_SIZE,
        )

    engine = EngineLoop(
        runner,
        config=EngineConfig(max_batch_tokens=512, max_sequences=64, speculate=False),
        token_bytes=[b"a"] * VOCABULARY,
        eos_ids=frozenset(),
        deliver=deliver,
        observer=metrics,
        on_failure=lambda _failure: worker.fail(),
    )
    worker = Worker(queue, engine, info=info, observer=metrics)
    await queue.open()
    await worker.run()
