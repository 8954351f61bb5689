"""Encoding between a real queue and real engines: a death in mid-batch changes no bit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from model.runners.encoding import Encoding
from service.messages import End, FinishReason, GenerationRequest, Submission, Tokens
from service.queues.contract import EngineInfo, QueueLimits
from service.queues.memory.queue import MemoryQueue
from service.vectors import from_text
from tests.support.encoders import (
    VOCAB_SIZE,
    WIDTH,
    EncodingStation,
    HashEncoder,
    encoding_request,
    result_of,
)
from tests.support.waiting import PATIENCE, until

MODEL = "0123456789abcdef"


def inputs_of(seed: int, num: int = 40) -> list[list[int]]:
    return [[(seed + index * step) % VOCAB_SIZE for step in range(6)] for index in range(num)]


async def submit(queue: MemoryQueue, name: str, inputs: list[list[int]]) -> GenerationRequest:
    request = encoding_request(f"{name}.0", inputs, model=MODEL)
    await queue.submit(Submission(id=name, tenant=request.tenant, requests=(request,)))
    return request


async def check(queue: MemoryQueue, request: GenerationRequest, inputs: list[list[int]]) -> End:
    """The journal has each result once, in order, with the bits of the input's own."""
    rows: list[bytes] = []
    async with asyncio.timeout(PATIENCE):
        async for record in queue.follow(request.id):
            if isinstance(record, Tokens):
                assert record.start == len(rows)
                found = from_text(record.text, count=len(record.ids))
                rows += [row.tobytes() for row in found]
            else:
                assert rows == [result_of(each, width=WIDTH).tobytes() for each in inputs]
                assert (record.reason, record.count) == (FinishReason.STOP, len(inputs))
                return record
    raise AssertionError("no end")


@pytest.mark.parametrize("dies_at", [0, 1, 4])
async def test_a_death_in_mid_batch_loses_nothing(dies_at: int) -> None:
    """The first engine stands still within its step `dies_at` until it is dead: results of earlier
    steps are in the journal, and the second one continues behind them.
    """
    queue = MemoryQueue(QueueLimits(lease=0.2))
    reached, gate, steps = threading.Event(), threading.Event(), 0

    def stand_still(_batch: Sequence[Encoding]) -> None:
        nonlocal steps
        if steps == dies_at:
            reached.set()
            assert gate.wait(PATIENCE)
        steps += 1

    inputs = [inputs_of(1), inputs_of(2)]
    first = EncodingStation(queue, "first", runner=HashEncoder(on_encode=stand_still), model=MODEL)
    async with first:
        requests = [await submit(queue, f"r{i}", each) for i, each in enumerate(inputs)]
        await until(reached.is_set)
        async with asyncio.timeout(PATIENCE):
            while dies_at > 1 and not any([await queue.read(each.id) for each in requests]):
                await asyncio.sleep(0.002)
        await first.kill()
        second = EncodingStation(queue, "second", model=MODEL)
        try:
            async with second:
                for request, each in zip(requests, inputs, strict=True):
                    await check(queue, request, each)
        finally:
            gate.set()
            await asyncio.to_thread(first.engine.stop)  # it may deliver once more


async def test_a_drained_engine_hands_over_without_blame() -> None:
    queue = MemoryQueue(QueueLimits(lease=10 * PATIENCE))
    inputs = inputs_of(3, num=200)
    gate = threading.Event()

    def slowly(_batch: Sequence[Encoding]) -> None:
        gate.wait(0.01)

    async with EncodingStation(queue, "a", runner=HashEncoder(on_encode=slowly), model=MODEL):
        request = await submit(queue, "r", inputs)
        async with asyncio.timeout(PATIENCE):
            while not await queue.read(request.id):
                await asyncio.sleep(0.002)
    async with EncodingStation(queue, "b", model=MODEL):
        await check(queue, request, inputs)


async def test_engines_that_generate_leave_it_alone() -> None:
    """Also those of an older version, which do not know of encoding."""
    queue = MemoryQueue(QueueLimits())
    await submit(queue, "r", inputs_of(4))
    for features in ((), ("grammar", f"model:{MODEL}"), ("encoding", "model:other")):
        info = EngineInfo(id="old", numeric_class="c", version="0", features=features)
        assert await queue.claim(info, limit=8, wait=0.0) == []
