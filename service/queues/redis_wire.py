"""Wire: commands to one Redis server in pipelines, with time-outs, retries and errors of our own.

Every command sent here may run twice (a reply can be lost), so all of them must be idempotent; the
scripts are. Nothing hangs: each attempt ends within the time-outs below. Knows no keys.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from redis.asyncio import BlockingConnectionPool, Connection, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    NoScriptError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from service.errors import StartupError, Unavailable
from service.queues.redis_scripts import Script

logger = logging.getLogger(__name__)

Command = tuple[str | bytes | int, ...]

CONNECT_TIMEOUT = 2.0
REPLY_TIMEOUT = 4.0
CONNECTIONS = 32
ATTEMPTS = 3
"""Of a command whose connection broke; a time-out is not tried again."""

_OPTIONS = ("allow_volatile", "shards")
"""Parameters of the URL that are ours; all others are the client library's."""


class RedisUrl:
    """A Redis URL taken apart. Its credentials are in no message."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        own = {name: query.pop(name) for name in _OPTIONS if name in query}
        try:
            self.shards = int(own.get("shards", "1"))
            self.allow_volatile = {"0": False, "1": True}[own.get("allow_volatile", "0")]
        except (ValueError, KeyError) as error:
            raise StartupError(
                "queue: the URL has shards=<number>, allow_volatile=0 or 1"
            ) from error
        if not 1 <= self.shards <= 1024:
            raise StartupError("queue: the URL's `shards` is from 1 to 1024")
        self.plain = urlunsplit(parts._replace(query=urlencode(query)))

    def pool(self) -> BlockingConnectionPool:
        """Connections to it. Raises StartupError for what the library does not take."""
        try:
            pool = BlockingConnectionPool.from_url(
                self.plain,
                max_connections=CONNECTIONS,
                timeout=REPLY_TIMEOUT,
                socket_connect_timeout=CONNECT_TIMEOUT,
                socket_timeout=REPLY_TIMEOUT,
                socket_keepalive=True,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
            # Not connected yet: only its parameters are tried. (The library has no types here.)
            pool.make_connection()  # type: ignore[no-untyped-call]
        except (ValueError, TypeError, RedisError) as error:
            raise StartupError("queue: the Redis URL or one of its parameters is wrong") from error
        return pool


def backoff(*, longest: float) -> Iterator[float]:
    """Seconds to wait before the second, third, ... attempt: doubling, with jitter, no end."""
    delay = 0.02
    while True:
        yield delay * random.uniform(0.5, 1.0)
        delay = min(longest, delay * 2)


class Wire:
    """`away` while the last command found no server; `restored_at` is when (loop time) one answered
    again.
    """

    def __init__(
        self, url: RedisUrl, *, scripts: Mapping[str, Script], restored: Callable[[], None]
    ) -> None:
        self._pool = url.pool()
        self._client = Redis(connection_pool=self._pool)
        self._scripts = scripts
        self._pending: list[tuple[Command, asyncio.Future[Any]]] = []
        self._flush: asyncio.Task[None] | None = None
        self.away = False
        self.restored_at: float | None = None
        self._restored = restored
        self._closed = False

    def connection(self) -> Connection:
        """A connection of the caller's own, not connected yet and not of the pool."""
        connection: Connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        return connection

    def script(self, name: str, key: str, *arguments: str | bytes | int) -> Command:
        """The command that runs a script; each is given one key."""
        return ("EVALSHA", self._scripts[name].sha, 1, key, *arguments)

    async def run(self, commands: Sequence[Command], *, attempts: int = ATTEMPTS) -> list[Any]:
        """The replies, in order, after one round trip. Raises Unavailable."""
        if not commands:
            return []
        if self._closed:
            raise Unavailable("the queue was closed", code="backend_unavailable")
        delays = backoff(longest=0.2)
        for attempt in range(1, attempts + 1):
            try:
                replies = await self._execute(commands)
                if any(isinstance(reply, NoScriptError) for reply in replies):
                    await self._execute(
                        [("SCRIPT", "LOAD", s.text) for s in self._scripts.values()]
                    )
                    replies = await self._execute(commands)
            except (RedisError, OSError) as error:
                self.away = True
                final = not isinstance(error, RedisConnectionError | OSError)
                if final or attempt == attempts or isinstance(error, AuthenticationError):
                    raise _unavailable(error) from None  # the cause may show the address
                await asyncio.sleep(next(delays))
            else:
                self._answered()
                return _checked(replies)
        raise AssertionError("the last attempt returns or raises")

    async def _execute(self, commands: Sequence[Command]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        task = asyncio.current_task()
        before = task.cancelling() if task else 0
        try:
            replies: list[Any] = await pipeline.execute(raise_on_error=False)
        finally:
            # The library's `asyncio.wait_for` may forget a cancellation that comes in the moment of
            # success, and whoever cancelled would wait for ever.
            if task and task.cancelling() > before:
                raise asyncio.CancelledError
        return replies

    def _answered(self) -> None:
        if self.away:
            self.away = False
            self.restored_at = asyncio.get_running_loop().time()
            self._restored()

    async def read(self, *commands: Command) -> list[Any]:
        """As `run`, but what many readers ask for at about the same time goes out together."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in commands]
        self._pending += zip(commands, futures, strict=True)
        if self._flush is None or self._flush.done():
            self._flush = loop.create_task(self._flush_pending())
        return await asyncio.gather(*futures)

    async def _flush_pending(self) -> None:
        await asyncio.sleep(0)  # who is ready in this turn of the loop comes along
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                replies = await self.run([command for command, _ in batch])
            except Unavailable as error:
                _fail(batch, error)
                continue
            except asyncio.CancelledError:
                _fail(batch, _unavailable(RedisConnectionError()))
                raise
            for (_, future), reply in zip(batch, replies, strict=True):
                if not future.done():
                    future.set_result(reply)

    def refuse(self) -> None:
        """From now on every call raises Unavailable."""
        self._closed = True

    async def close(self) -> None:
        """Ends what is on its way and lets the connections go."""
        if self._flush is not None and not self._flush.done():
            self._flush.cancel()
            await asyncio.wait([self._flush])
        _fail(self._pending, _unavailable(RedisConnectionError()))
        await self._client.aclose()
        await self._pool.disconnect()


def _fail(batch: Sequence[tuple[Command, asyncio.Future[Any]]], error: Unavailable) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)
            future.exception()  # seen: a reader of several is told by one of them


def _checked(replies: list[Any]) -> list[Any]:
    for reply in replies:
        if isinstance(reply, Exception):
            raise _unavailable(reply) from None
    return replies


def _unavailable(error: Exception) -> Unavailable:
    if isinstance(error, OutOfMemoryError):
        return Unavailable("the journal's store is full", code="storage_full", retry_after=5.0)
    if isinstance(error, ResponseError):  # the server's words: no address, no credentials
        logger.warning("redis refused a command: %s", error)
    return Unavailable(
        "the journal's store does not answer", code="backend_unavailable", retry_after=2.0
    )
