"""CPU time of Redis per journalled token, and per idle engine.

Engines without a model claim, append, renew and finish through the queue, against a redis-server of
the benchmark's own that syncs its append-only file every second. Figures are the CPU time that the
server reports (INFO: user and system, all threads), and the least of several repeats: load on the
machine adds to it, because other processes evict the server's caches.

steps   Each engine writes one record for each of its streams per step, renews every 20 steps, and
        writes the next step when the readers of its streams have received this one: no reader saves
        work by being late. "whole" also counts submissions, claims and ends of the answers. Readers
        do not look again by themselves meanwhile: clients and server share the machine here, and a
        step of 64 engines takes longer than the pause after which they would.
idle    Engines wait for work as a worker does, in several processes. First nothing is submitted;
        then one request at a time, which whoever claims it answers with one token.
registry
        An API replica reads which engines there are: each report, or the sums.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from redis import Redis

from loadtest.bench.peers.quire_redis import start_redis
from loadtest.bench.servers import free_port
from service.messages import (
    End,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Submission,
    Tokens,
    child_ids,
)
from service.queues import open_queue
from service.queues.contract import Claim, EngineInfo, Queue, QueueLimits, Write, WriteStatus
from service.queues.redis import journal
from service.worker.worker import CLAIM_WAIT

_PATIENCE = 600.0  # seconds for one row: the machine may be busy
_RENEW_EVERY = 20  # steps: of 50 ms, with the default lease
_LIMITS = QueueLimits(
    max_requests=100_000, max_per_tenant=100_000, max_tokens=10**9, lease=_PATIENCE
)
_READS = 100  # of the registry
_WORKERS = 4  # processes that hold the idle engines


def cpu_seconds(port: int) -> float:
    """CPU time that the server has used, of all its threads."""
    with Redis(port=port) as client:
        info = client.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


@contextlib.contextmanager
def redis_server() -> Iterator[int]:
    """The port of a server that ends with the context."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        process = start_redis(port, folder)
        try:
            yield port
        finally:
            process.kill()
            process.wait()


@contextlib.asynccontextmanager
async def queues(port: int, count: int, *, limits: QueueLimits) -> AsyncIterator[list[Queue]]:
    """Queues as of so many processes."""
    made = [open_queue(f"redis://127.0.0.1:{port}/0", limits) for _ in range(count)]
    try:
        yield made
    finally:
        for queue in made:
            await queue.close()


def make_submission(number: int, *, num_requests: int = 1, length: int = 1) -> Submission:
    """Of prompts of 64 tokens."""
    identifier = f"s0-{number:032x}"
    requests = tuple(
        GenerationRequest(
            id=request_id,
            prompt_ids=tuple(range(64)),
            sampling=SamplingParams(seed=number, choice=index),
            max_tokens=length,
        )
        for index, request_id in enumerate(child_ids(identifier, num_requests))
    )
    return Submission(id=identifier, tenant="public", requests=requests)


def make_engine(number: int) -> EngineInfo:
    return EngineInfo(id=f"engine-{number}", numeric_class="class", version="1", blocks_free=4096)


def make_tokens(start: int, count: int) -> Tokens:
    """As of English text: a token is about four characters."""
    ids = tuple(range(1000 + start, 1000 + start + count))
    return Tokens(start=start, ids=ids, text=" the" * count, digest=start)


async def write(queue: Queue, writes: Sequence[Write]) -> None:
    for reply in await queue.write(writes):
        if reply.status is not WriteStatus.OK:
            raise SystemExit(f"a record was not written: {reply}")


# --- steps ----------------------------------------------------------------------------------------
class Streams:
    """The readers of one engine's answers: `reached` waits until all have so many tokens."""

    def __init__(self, queue: Queue, claims: Sequence[Claim]) -> None:
        self._queue = queue
        self._counts = dict.fromkeys((claim.request.id for claim in claims), 0)
        self._behind: set[str] = set()
        self._target = 0
        self._done = asyncio.Event()
        self._tasks = [asyncio.create_task(self._read(each)) for each in self._counts]

    async def _read(self, request_id: str) -> None:
        async for record in self._queue.follow(request_id):
            self._counts[request_id] = record.count if isinstance(record, End) else record.end
            if self._counts[request_id] >= self._target:
                self._behind.discard(request_id)
                if not self._behind:
                    self._done.set()

    async def reached(self, count: int) -> None:
        self._target = count
        self._behind = {each for each, has in self._counts.items() if has < count}
        self._done.clear()
        if self._behind:
            await self._done.wait()

    async def ended(self) -> None:
        await asyncio.gather(*self._tasks)


class StepBench:
    """One row: `engines` engines with `streams` answers of `steps` records each."""

    def __init__(self, options: argparse.Namespace, *, port: int, per_record: int) -> None:
        self._streams = options.streams
        self._steps = options.steps
        self._per_record = per_record
        self._port = port

    async def run(self, engines: int) -> tuple[float, float]:
        """CPU seconds of the steps, and of everything."""
        async with (
            asyncio.timeout(_PATIENCE),
            queues(self._port, engines, limits=_LIMITS) as writers,
            queues(self._port, 2, limits=_LIMITS) as replicas,
        ):
            for queue in writers + replicas:
                await queue.claim(make_engine(0), limit=0, wait=0.0)  # connects
            begin = cpu_seconds(self._port)
            length = self._steps * self._per_record
            for number in range(engines * self._streams):
                submission = make_submission(time.time_ns(), length=length)
                await replicas[number % 2].submit(submission)
            claims = [
                await queue.claim(make_engine(number), limit=self._streams, wait=0.0)
                for number, queue in enumerate(writers)
            ]
            readers = [Streams(replicas[i % 2], each) for i, each in enumerate(claims)]
            places = list(zip(writers, claims, readers, strict=True))
            await asyncio.gather(*(self._step(*place, 0) for place in places))
            before = cpu_seconds(self._port)
            await asyncio.gather(*(self._generate(*place) for place in places))
            after = cpu_seconds(self._port)
            await asyncio.gather(*(self._finish(*place) for place in places))
            return after - before, cpu_seconds(self._port) - begin

    async def _generate(self, queue: Queue, claims: Sequence[Claim], readers: Streams) -> None:
        for step in range(1, self._steps):
            await self._step(queue, claims, readers, step)
            if step % _RENEW_EVERY == 0:
                await queue.renew([claim.lease for claim in claims])

    async def _step(
        self, queue: Queue, claims: Sequence[Claim], readers: Streams, step: int
    ) -> None:
        tokens = make_tokens(step * self._per_record, self._per_record)
        await write(queue, [Write(claim.lease, tokens) for claim in claims])
        await readers.reached(tokens.end)

    async def _finish(self, queue: Queue, claims: Sequence[Claim], readers: Streams) -> None:
        end = End(count=self._steps * self._per_record, reason=FinishReason.LENGTH)
        await write(queue, [Write(claim.lease, end) for claim in claims])
        await readers.ended()


def print_steps(options: argparse.Namespace) -> None:
    journal.LOOK_AGAIN = _PATIENCE
    print(
        f"CPU time of Redis: {options.streams} streams per engine, {options.steps} steps, one"
        " reader per stream in two API replicas\n\n"
        "| engines | tokens per record | us per record | records/s per core | tokens/s per core |"
        " whole: tokens/s per core |\n| ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    rows = [(engines, 1) for engines in options.engines] + [(options.engines[-1], 4)]
    for engines, per_record in rows:
        results = []
        for _ in range(options.repeats):
            with redis_server() as port:
                bench = StepBench(options, port=port, per_record=per_record)
                results.append(asyncio.run(bench.run(engines)))
        steps, whole = (min(column) for column in zip(*results, strict=True))
        records = engines * options.streams * (options.steps - 1)
        tokens = engines * options.streams * options.steps * per_record
        print(
            f"| {engines} | {per_record} | {steps / records * 1e6:.1f} | {records / steps:,.0f} |"
            f" {records * per_record / steps:,.0f} | {tokens / whole:,.0f} |",
            flush=True,
        )


# --- idle engines ---------------------------------------------------------------------------------
async def be_engine(queue: Queue, number: int) -> None:
    """Claims as a worker does, and answers each request with one token."""
    engine = make_engine(number)
    hints = asyncio.create_task(_ignore(queue.stops()))
    try:
        while True:
            for claim in await queue.claim(engine, limit=64, wait=CLAIM_WAIT):
                end = End(count=1, reason=FinishReason.LENGTH)
                lease = claim.lease
                await write(queue, [Write(lease, make_tokens(0, 1)), Write(lease, end)])
    finally:
        hints.cancel()


async def _ignore(hints: AsyncIterator[str]) -> None:
    async for _ in hints:
        pass


async def be_engines(port: int, first: int, count: int) -> None:
    """Runs until standard input is closed."""
    async with queues(port, count, limits=QueueLimits()) as made:
        tasks = []
        for index, queue in enumerate(made):
            await queue.claim(make_engine(first + index), limit=0, wait=0.0)  # connects
            tasks.append(asyncio.create_task(be_engine(queue, first + index)))
        await asyncio.to_thread(sys.stdin.read)
        for task in tasks:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def idle_engines(port: int, count: int) -> Iterator[None]:
    """So many engines in `_WORKERS` processes."""
    command = [sys.executable, "-m", "loadtest.bench.queue", str(port)]
    shares = [range(count)[index::_WORKERS] for index in range(_WORKERS)]
    processes = [
        subprocess.Popen(
            [*command, str(index * count), str(len(share))],
            stdin=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        for index, share in enumerate(shares)
        if share
    ]
    try:
        yield
    finally:
        for process in processes:
            process.communicate()


async def answer(queue: Queue, number: int) -> float:
    """Submits one request and reads its answer. Returns the seconds to its first record."""
    submission = make_submission(number)
    began, first = time.monotonic(), 0.0
    await queue.submit(submission)
    async for _ in queue.follow(submission.requests[0].id):
        first = first or time.monotonic() - began
    return first


async def measure_registry(port: int, count: int) -> str:
    """CPU milliseconds per read of the registry, of Redis / of the replica: each report; the sums
    when they are computed; the sums when they are shared.
    """
    columns = []
    async with queues(port, 2, limits=QueueLimits()) as (engine, api):
        with Redis(port=port) as redis:
            for method, forget in (
                (api.engines, False),
                (api.engine_groups, True),
                (api.engine_groups, False),
            ):
                for number in range(count):
                    await engine.claim(make_engine(number), limit=0, wait=0.0)
                before, own = cpu_seconds(port), 0.0
                for _ in range(_READS):
                    if forget:
                        redis.delete("quire:2:{s0}:groups")
                    began = time.process_time()
                    await method()
                    own += time.process_time() - began
                server = cpu_seconds(port) - before
                columns.append(f"{server / _READS * 1e3:.2f} / {own / _READS * 1e3:.2f}")
    return " | ".join(columns)


def print_registry(options: argparse.Namespace) -> None:
    print(
        "\n| engines | each report: CPU ms of Redis / of the replica | sums, computed |"
        " sums, shared |\n| ---: | ---: | ---: | ---: |"
    )
    for count in options.idle:
        with redis_server() as port:
            print(f"| {count:,} | {asyncio.run(measure_registry(port, count))} |", flush=True)


async def measure_idle(
    port: int, count: int, *, seconds: float, repeats: int
) -> tuple[float, float, float]:
    """Share of a core of `count` idle engines; CPU seconds and median delay of an answer."""
    async with asyncio.timeout(_PATIENCE), queues(port, 1, limits=QueueLimits()) as (api,):
        while len(await api.engines()) < count:  # noqa: ASYNC110  # of other processes
            await asyncio.sleep(0.5)
        await asyncio.sleep(2.0)
        shares = []
        for _ in range(repeats):
            before, began = cpu_seconds(port), time.monotonic()
            await asyncio.sleep(seconds)
            shares.append((cpu_seconds(port) - before) / (time.monotonic() - began))
        share = min(shares)
        if not count:
            return share, 0.0, 0.0
        before, began = cpu_seconds(port), time.monotonic()
        delays = sorted([await answer(api, time.time_ns()) for _ in range(30)])
        busy = cpu_seconds(port) - before - share * (time.monotonic() - began)
        return share, max(0.0, busy) / len(delays), delays[len(delays) // 2]


def print_idle(options: argparse.Namespace) -> None:
    print(
        "\n| idle engines | share of a core of Redis | us per engine and second |"
        " ms of CPU per answer | ms to the first token |\n| ---: | ---: | ---: | ---: | ---: |"
    )
    for count in options.idle:
        with redis_server() as port, idle_engines(port, count):
            measured = measure_idle(port, count, seconds=options.seconds, repeats=options.repeats)
            share, busy, delay = asyncio.run(measured)
        each = f"{share / count * 1e6:.0f}" if count else "-"
        per_answer = f"{busy * 1e3:.2f} | {delay * 1e3:.1f}" if count else "- | -"
        print(f"| {count:,} | {share:.1%} | {each} | {per_answer} |", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=("steps", "idle", "registry"))
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--streams", type=int, default=64, help="per engine")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--idle", type=int, nargs="+", default=[0, 100, 1000])
    parser.add_argument("--seconds", type=float, default=10.0, help="of idling")
    parser.add_argument("--repeats", type=int, default=3)


def run(options: argparse.Namespace) -> None:
    for name, report in (
        ("steps", print_steps),
        ("idle", print_idle),
        ("registry", print_registry),
    ):
        if options.only in {None, name}:
            report(options)


if __name__ == "__main__":
    os.nice(1)
    asyncio.run(be_engines(*(int(argument) for argument in sys.argv[1:])))
