"""The connections to Redis: cancellations in an unlucky moment, and a quiet subscription."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from loadtest.rig.redis_process import RedisServer
from service.queues import redis_wakeups
from service.queues.redis_wakeups import Wakeups
from service.queues.redis_wire import RedisUrl, Wire
from tests.waiting import PATIENCE


class ForgetfulPipeline:
    """As the client library in an unlucky moment: the cancellation comes, and the reply too."""

    def __init__(self, fault: Exception | None) -> None:
        self._fault = fault

    def execute_command(self, *_: object) -> None:
        """Nothing to send."""

    async def execute(self, **_: object) -> list[Any]:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(10)
        if self._fault is not None:
            raise self._fault
        return [b"a reply"]


@pytest.mark.parametrize("fault", [None, TimeoutError("just then")])
async def test_a_cancellation_is_never_forgotten(
    monkeypatch: pytest.MonkeyPatch, fault: Exception | None
) -> None:
    """An engine that was asked to leave hung: its renewing loop went on with a reply, and the end
    waited for it. The pipeline swallows each cancellation, so this cannot pass by luck.
    """
    wire = Wire(RedisUrl("redis://127.0.0.1:1/0"), scripts={}, restored=lambda: None)
    monkeypatch.setattr(wire._client, "pipeline", lambda **_: ForgetfulPipeline(fault))
    task = asyncio.create_task(wire.run([("PING",)]))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=PATIENCE)
    assert task.cancelled()
    await wire.close()


async def test_a_time_out_around_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(RedisUrl("redis://127.0.0.1:1/0"), scripts={}, restored=lambda: None)
    monkeypatch.setattr(wire._client, "pipeline", lambda **_: ForgetfulPipeline(None))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await wire.run([("PING",)])
    monkeypatch.undo()
    await wire.close()


async def test_what_was_cancelled_may_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a cancellation that comes meanwhile counts, not one that was seen before."""

    class Pipeline(ForgetfulPipeline):
        async def execute(self, **_: object) -> list[Any]:
            await asyncio.sleep(0)
            return [b"a reply"]

    wire = Wire(RedisUrl("redis://127.0.0.1:1/0"), scripts={}, restored=lambda: None)
    monkeypatch.setattr(wire._client, "pipeline", lambda **_: Pipeline(None))

    async def work() -> list[Any]:
        try:
            await asyncio.sleep(10)
        finally:
            replies = await wire.run([("PING",)])
            assert replies == [b"a reply"]
        return replies

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wire.close()


@pytest.mark.slow
async def test_a_subscription_outlives_watchers_that_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle engine watches for work and stops to, four times a second: nothing was sent, no ping
    either, and the connection counted as dead each six seconds. Every new one wakes the watchers.
    """
    monkeypatch.setattr(redis_wakeups, "PING_EVERY", 1.0)
    redis, woken = RedisServer(tmp_path, options=()), 0
    redis.start()
    wire = Wire(RedisUrl(redis.url), scripts={}, restored=lambda: None)
    wakeups = Wakeups(wire.connection)

    def wake(_: bytes) -> None:
        nonlocal woken
        woken += 1

    def nobody(_: bytes) -> None:
        """Comes and goes before anything is said."""

    try:
        wakeups.watch("stops", wake)
        ends = time.monotonic() + 3 * redis_wakeups.PING_EVERY
        while time.monotonic() < ends:
            wakeups.watch("work", nobody)
            wakeups.unwatch("work", nobody)
            await asyncio.sleep(0.01)
        assert woken == 1, "the subscription was made again"
    finally:
        await wakeups.close()
        await wire.close()
        redis.close()
