"""The connections to Redis: cancellations in an unlucky moment, and a quiet subscription."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest

from service.errors import Unavailable
from service.queues.redis import pubsub as redis_wakeups
from service.queues.redis.connection import RedisClient
from service.queues.redis.pubsub import Wakeups
from service.queues.redis.servers import PlainServer
from tests.cluster.redis_process import RedisServer
from tests.support.waiting import PATIENCE, until


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


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, TimeoutError("just then")])
async def test_a_cancellation_is_never_forgotten(
    monkeypatch: pytest.MonkeyPatch, fault: Exception | None
) -> None:
    """An engine that was asked to leave hung: its renewing loop went on with a reply, and the end
    waited for it. The pipeline swallows each cancellation, so this cannot pass by luck.
    """
    client = RedisClient(PlainServer("redis://127.0.0.1:1/0"), scripts={}, restored=lambda: None)
    monkeypatch.setattr(client._redis, "pipeline", lambda **_: ForgetfulPipeline(fault))
    task = asyncio.create_task(client.run([("PING",)]))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=PATIENCE)
    assert task.cancelled()
    await client.close()


async def test_a_time_out_around_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    client = RedisClient(PlainServer("redis://127.0.0.1:1/0"), scripts={}, restored=lambda: None)
    monkeypatch.setattr(client._redis, "pipeline", lambda **_: ForgetfulPipeline(None))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await client.run([("PING",)])
    monkeypatch.undo()
    await client.close()


async def test_what_was_cancelled_may_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a cancellation that comes meanwhile counts, not one that was seen before."""

    class Pipeline(ForgetfulPipeline):
        async def execute(self, **_: object) -> list[Any]:
            await asyncio.sleep(0)
            return [b"a reply"]

    client = RedisClient(PlainServer("redis://127.0.0.1:1/0"), scripts={}, restored=lambda: None)
    monkeypatch.setattr(client._redis, "pipeline", lambda **_: Pipeline(None))

    async def work() -> list[Any]:
        try:
            await asyncio.sleep(10)
        finally:
            replies = await client.run([("PING",)])
            assert replies == [b"a reply"]
        return replies

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await client.close()


@pytest.mark.slow
async def test_a_subscription_outlives_watchers_that_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle engine watches for work and stops to, four times per second: it sent nothing, no ping
    either, and the connection counted as dead each six seconds. Every new one wakes the watchers.
    One round without a new one is enough: if no ping is sent, there is one in each.
    """
    monkeypatch.setattr(redis_wakeups, "PING_EVERY", 1.0)
    redis = RedisServer(tmp_path, options=())
    redis.start()
    client = RedisClient(PlainServer(redis.url), scripts={}, restored=lambda: None)
    try:
        rounds = [await subscriptions(client)]
        while rounds[-1] > 1 and len(rounds) < 10:  # the process or the server stood still
            rounds.append(await subscriptions(client))
        assert rounds[-1] == 1, f"the subscription was made again: {rounds}"
    finally:
        await client.close()
        redis.close()


async def subscriptions(client: RedisClient) -> int:
    """How often the watcher of one channel is woken while it is entered again and again."""
    wakeups, woken = Wakeups(client.connection), 0

    def wake(_: bytes) -> None:
        nonlocal woken
        woken += 1

    try:
        wakeups.watch("stops", wake)
        await until(lambda: woken)
        ends = time.monotonic() + 3 * redis_wakeups.PING_EVERY
        while time.monotonic() < ends:
            wakeups.watch("stops", wake)
            await asyncio.sleep(0.01)
        return woken
    finally:
        await wakeups.close()


# --- servers that take no writes ----------------------------------------------------------------
class ScriptedServer:
    """Speaks as much RESP2 as the client needs. Connection i answers writes with the error
    `refusals[i]`; later connections are served.
    """

    def __init__(self, refusals: Sequence[str], *, role: str = "master") -> None:
        self._refusals = list(refusals)
        self._role = role
        self.open: set[asyncio.StreamWriter] = set()
        self.accepted = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in tuple(self.open):
            writer.transport.abort()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        refusal = self._refusals[self.accepted] if self.accepted < len(self._refusals) else None
        self.accepted += 1
        self.open.add(writer)
        with suppress(OSError, asyncio.IncompleteReadError):
            while words := await self._command(reader):
                writer.write(self._reply(words, refusal))
        self.open.discard(writer)
        writer.close()

    async def _command(self, reader: asyncio.StreamReader) -> list[bytes]:
        words = []
        for _ in range(int((await reader.readline())[1:] or 0)):
            length = int((await reader.readline())[1:])
            words.append((await reader.readexactly(length + 2))[:-2])
        return words

    def _reply(self, words: list[bytes], refusal: str | None) -> bytes:
        if words[0] == b"HELLO":
            return b"*2\r\n$4\r\nrole\r\n$%d\r\n%s\r\n" % (len(self._role), self._role.encode())
        if words[0] in {b"DEL", b"EVALSHA"}:
            return b":1\r\n" if refusal is None else f"-{refusal}\r\n".encode()
        return b"+OK\r\n"


REFUSALS = (
    "READONLY You can't write against a read only replica.",
    "LOADING Redis is loading the dataset in memory",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "CLUSTERDOWN The cluster is down",
    "NOREPLICAS Not enough good replicas to write.",
    "READONLY You can't write against a read only replica. script: 0a9f, on @user_script:1.",
    "ERR Error running script (call to f_0a9f): @user_script:1: -READONLY You can't write",
    "ERR user_script:3: CLUSTERDOWN Hash slot not served script: 0a9f, on @user_script:3.",
)


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_server_that_takes_no_writes_is_left(refusal: str) -> None:
    """Its connections were kept, and each call got the same refusal. The refusal is not the first
    reply of the pipeline, and other connections are idle or in use meanwhile.
    """
    restored: list[bool] = []
    async with ScriptedServer([refusal] * 3) as server:
        client = RedisClient(
            PlainServer(server.url), scripts={}, restored=lambda: restored.append(True)
        )
        reads = [client.run([("GET", "key")]) for _ in range(3)]
        await asyncio.gather(*reads)
        assert (server.accepted, len(server.open)) == (3, 3)
        write = [("GET", "key"), ("DEL", "key"), ("GET", "key")]
        replies = await asyncio.gather(*(client.run(write) for _ in range(3)))
        assert replies == [[b"OK", 1, b"OK"]] * 3
        assert 4 <= server.accepted <= 6
        await until(lambda: len(server.open) <= server.accepted - 3)
        assert restored == [True]
        await client.close()


async def test_a_replica_is_not_read_either() -> None:
    async with ScriptedServer([], role="replica") as server:
        client = RedisClient(PlainServer(server.url), scripts={}, restored=lambda: None)
        with pytest.raises(Unavailable):
            await client.run([("GET", "key")])
        assert client.away
        await until(lambda: not server.open)
        await client.close()


async def test_only_a_write_ends_an_outage_that_a_refused_write_began() -> None:
    """Reads that succeed between refused writes were counted as outages that ended, each."""
    restored: list[bool] = []
    async with ScriptedServer([REFUSALS[4]] * 7) as server:
        client = RedisClient(
            PlainServer(server.url), scripts={}, restored=lambda: restored.append(True)
        )
        for _ in range(2):
            with pytest.raises(Unavailable):
                await client.run([("DEL", "key")])
            await client.run([("GET", "key")])
            assert client.away
        assert not restored
        await client.run([("DEL", "key")])
        assert (client.away, restored) == (False, [True])
        await client.close()


@pytest.mark.slow
async def test_a_subscription_is_made_anew_on_request(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path, options=())
    redis.start()
    client = RedisClient(PlainServer(redis.url), scripts={}, restored=lambda: None)
    wakeups = Wakeups(client.connection)
    woken: asyncio.Queue[bytes] = asyncio.Queue()
    try:
        async with asyncio.timeout(PATIENCE):
            wakeups.watch("news", woken.put_nowait)
            for message in (b"one", b"two"):
                assert await woken.get() == b""  # subscribed
                assert redis.ask("SPUBLISH", "news", message.decode()) == ":1"
                assert await woken.get() == message
                wakeups.reconnect()
                assert await woken.get() == b""  # something may have been missed
    finally:
        await wakeups.close()
        await client.close()
        redis.close()


class SlowToEnd:
    """A connection whose pending command takes a while to notice that it was cancelled."""

    def __init__(self) -> None:
        self.sending, self.cancelled, self.free = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.disconnected = 0

    async def connect(self) -> None:
        """At once."""

    async def send_command(self, *_: str) -> None:
        self.sending.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            await self.free.wait()
            raise

    async def read_response(self, **_: float) -> None:
        await asyncio.Event().wait()

    async def disconnect(self, **_: bool) -> None:
        self.disconnected += 1


async def test_a_subscription_that_is_cancelled_twice_is_disconnected() -> None:
    """If a busy process needed a second to close it, the second cancellation left it open."""
    connection: Any = SlowToEnd()
    wakeups = Wakeups(lambda: connection)
    wakeups.watch("news", lambda _: None)
    await connection.sending.wait()
    task = wakeups._task
    assert task is not None
    task.cancel()
    await connection.cancelled.wait()
    task.cancel()
    await asyncio.wait([task], timeout=PATIENCE)
    assert connection.disconnected == 1
    connection.free.set()
