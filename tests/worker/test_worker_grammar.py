"""The worker and grammars: compiling delays no other request, and survives its engine."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from model.batch import Batch, StepOutput
from model.grammar import Grammars, choice_grammar, json_schema_grammar
from service.engine.loop import EngineLoop
from service.engine.observer import Observer
from service.engine.plan import EngineConfig
from service.messages import (
    End,
    Event,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Submission,
)
from service.queues.contract import EngineInfo, QueueLimits
from service.queues.memory.queue import MemoryQueue
from service.worker.worker import PREPARING_THREADS, Worker
from tests.laws.noise import EOS_IDS, TOKEN_BYTES, VOCAB_SIZE, NoiseRunner
from tests.support.waiting import PATIENCE, until
from tests.worker.test_worker import Ledger

pytestmark = pytest.mark.slow

GRAMMAR = json_schema_grammar({"type": "array", "items": {"type": "string", "maxLength": 9},
                               "minItems": 4, "maxItems": 6})  # fmt: skip


def quick_grammars() -> Grammars:
    return Grammars(TOKEN_BYTES, eos_ids=EOS_IDS, vocab_size=VOCAB_SIZE)


class SlowGrammars(Grammars):
    """Compiles when it is let."""

    def __init__(self) -> None:
        super().__init__(TOKEN_BYTES, eos_ids=EOS_IDS, vocab_size=VOCAB_SIZE)
        self.let = threading.Event()
        self.began = threading.Event()

    def prepare(self, notation: str) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.began.set()
        assert self.let.wait(PATIENCE)
        super().prepare(notation)


class CountedGrammars(Grammars):
    """Prepares as many as the test allows."""

    def __init__(self) -> None:
        super().__init__(TOKEN_BYTES, eos_ids=EOS_IDS, vocab_size=VOCAB_SIZE)
        self.let = threading.Semaphore(0)
        self.began = 0

    def prepare(self, notation: str) -> None:
        self.began += 1
        assert self.let.acquire(timeout=PATIENCE)
        super().prepare(notation)


class SlowNoise(NoiseRunner):
    """Steps that take a while, so that an engine can die between two."""

    def run(self, batch: Batch) -> StepOutput:
        time.sleep(0.03)
        return super().run(batch)


@asynccontextmanager
async def worker(
    queue: MemoryQueue, grammars: Grammars, *, runner: NoiseRunner | None = None
) -> AsyncIterator[Worker]:
    made: list[Worker] = []

    def deliver(events: Sequence[Event]) -> None:
        made[0].deliver(events)

    engine = EngineLoop(
        runner or NoiseRunner(),
        config=EngineConfig(max_batch_tokens=64, max_sequences=8),
        token_bytes=TOKEN_BYTES,
        eos_ids=EOS_IDS,
        deliver=deliver,
        observer=Observer(),
        grammars=grammars,
    )
    info = EngineInfo(id=str(id(engine)), numeric_class="noise", version="0", features=("grammar",))
    made.append(Worker(queue, engine, info=lambda: info, observer=Ledger()))
    task = asyncio.create_task(made[0].run())
    yield made[0]
    if not task.done():
        made[0].drain()
    await task


def make_request(name: str, grammar: str | None) -> GenerationRequest:
    return GenerationRequest(
        id=f"{name}.0",
        prompt_ids=tuple(name.encode()),
        sampling=SamplingParams(seed=1),
        max_tokens=200,
        grammar=grammar,
    )


async def submit(queue: MemoryQueue, request: GenerationRequest) -> None:
    name = request.id.split(".")[0]
    await queue.submit(Submission(id=name, tenant=request.tenant, requests=(request,)))


async def answer(queue: MemoryQueue, request: GenerationRequest) -> tuple[str, End]:
    text = ""
    async with asyncio.timeout(PATIENCE):
        async for record in queue.follow(request.id):
            if isinstance(record, End):
                return text, record
            text += record.text
    raise AssertionError("no end")


async def test_others_go_on_while_a_grammar_is_compiled() -> None:
    queue, grammars = MemoryQueue(QueueLimits()), SlowGrammars()
    slow, quick = make_request("slow", choice_grammar(["done"])), make_request("quick", None)
    async with worker(queue, grammars):
        await submit(queue, slow)
        await asyncio.to_thread(grammars.began.wait, PATIENCE)
        await submit(queue, quick)
        assert (await answer(queue, quick))[1].reason in {FinishReason.LENGTH, FinishReason.STOP}
        assert await queue.read(slow.id) == []
        grammars.let.set()
        assert await answer(queue, slow) == ("done", End(count=4, reason=FinishReason.STOP))


async def test_grammars_are_prepared_in_turns_of_tenants() -> None:
    """Those of one tenant delayed another's, and so did any other work in the shared threads."""
    queue, grammars = MemoryQueue(QueueLimits()), CountedGrammars()
    shared, busy = ThreadPoolExecutor(1), threading.Event()
    asyncio.get_running_loop().set_default_executor(shared)
    occupied = shared.submit(busy.wait, 4 * PATIENCE)
    flood = [make_request(f"flood{i}", choice_grammar([f"a{i}"])) for i in range(7)]
    quiet = replace(make_request("quiet", choice_grammar(["done"])), tenant="quiet")
    async with worker(queue, grammars) as one:
        for request in (*flood, quiet):
            await submit(queue, request)
        await until(lambda: one.running == len(flood) + 1)  # all are claimed, also the quiet one
        await until(lambda: grammars.began == PREPARING_THREADS)
        grammars.let.release(PREPARING_THREADS + 1)
        assert (await answer(queue, quiet))[0] == "done"
        grammars.let.release(100)
        for index, request in enumerate(flood):
            assert (await answer(queue, request))[0] == f"a{index}"
        busy.set()
    assert occupied.result()


async def test_what_is_stopped_while_it_is_compiled_is_never_computed() -> None:
    queue, grammars = MemoryQueue(QueueLimits()), SlowGrammars()
    request = make_request("slow", choice_grammar(["done"]))
    async with worker(queue, grammars) as one:
        await submit(queue, request)
        await asyncio.to_thread(grammars.began.wait, PATIENCE)
        await queue.stop([request.id], FinishReason.CANCELLED)
        async with asyncio.timeout(PATIENCE):
            while one.running:
                await asyncio.sleep(0.01)
        grammars.let.set()
        await asyncio.sleep(0.05)
        assert one._engine.steps == 0
        assert (await answer(queue, request))[1].reason is FinishReason.CANCELLED


async def test_a_drain_gives_back_what_is_being_compiled() -> None:
    queue, grammars = MemoryQueue(QueueLimits(lease=30.0)), SlowGrammars()
    request = make_request("slow", choice_grammar(["done"]))
    async with worker(queue, grammars):
        await submit(queue, request)
        await asyncio.to_thread(grammars.began.wait, PATIENCE)
    assert await queue.read(request.id) == []
    async with worker(queue, quick_grammars()):  # long before the lease would have run out
        assert (await answer(queue, request))[0] == "done"
    grammars.let.set()


async def test_a_broken_grammar_ends_its_request() -> None:
    queue = MemoryQueue(QueueLimits())
    async with worker(queue, quick_grammars()):
        await submit(queue, broken := make_request("broken", "json:["))
        end = (await answer(queue, broken))[1]
        assert (end.reason, end.error) == (FinishReason.ERROR, "grammar_failed")
        await submit(queue, good := make_request("good", choice_grammar(["yes"])))
        assert (await answer(queue, good))[0] == "yes"


async def test_an_answer_goes_through_many_engines() -> None:
    """Each is drained after a few tokens; together they write what one would have written."""
    grammars = quick_grammars()
    whole, parts = MemoryQueue(QueueLimits()), MemoryQueue(QueueLimits())
    request = make_request("long", GRAMMAR)
    await submit(whole, request)
    async with worker(whole, grammars):
        expected, _ = await answer(whole, request)
    await submit(parts, request)
    lives = 0

    def ended() -> bool:
        return parts._entries[request.id].end is not None

    while not ended():
        before = parts._entries[request.id].count
        async with worker(parts, grammars, runner=SlowNoise()):
            await until(lambda: parts._entries[request.id].count > before + 1 or ended())  # noqa: B023
        lives += 1
    assert lives >= 3
    assert (await answer(parts, request))[0] == expected
    assert 4 <= len(json.loads(expected)) <= 6
