"""RedisClient: sends commands to one Redis server in pipelines, with timeouts and retries.

Every command sent here may run twice (a reply can be lost), so all of them must be idempotent; the
scripts are. Nothing hangs: each attempt ends within the timeouts below.

The server is always a primary. A connection to a replica is refused, for reads too, because its
data may be stale. If the server stops accepting writes (it was demoted, it loads its data, its
cluster is down), all connections are dropped, and the next ones find the primary again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from redis.asyncio import Connection, Redis
from redis.exceptions import (
    AuthenticationError,
    NoScriptError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from service.errors import StartupError, Unavailable
from service.queues.redis.errors import cause_of, refuses_writes, startup_error, unavailable
from service.queues.redis.scripts import Script
from service.queues.redis.servers import Server

logger = logging.getLogger(__name__)

Command = tuple[str | bytes | int, ...]

Verify = Callable[[Mapping[str, Any]], None]
"""Called with the INFO of a server. Raises StartupError if it cannot be used."""

_json = json.JSONEncoder(separators=(",", ":")).encode

MIN_VERSION = 7
"""Script flags, which allow ends to be written when memory is full, came with it."""
ATTEMPTS = 3
"""Of a command whose connection broke; a timeout is not retried."""


def check_server(info: Mapping[str, Any], *, allow_volatile: bool) -> None:
    """Raises StartupError if the server (by its INFO) is too old, may evict keys, or loses data at
    a restart.
    """
    version = str(info["redis_version"])
    if int(version.partition(".")[0]) < MIN_VERSION:
        raise StartupError(
            f"queue: Redis >= {MIN_VERSION} or Valkey is required, this is {version}"
        )
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if int(info.get("maxmemory", 0)) and policy != "noeviction":
        raise StartupError(
            f"queue: Redis may evict answers; set maxmemory-policy noeviction, not {policy}"
        )
    if not int(info.get("aof_enabled", 0)) and not allow_volatile:
        raise StartupError(
            "queue: Redis keeps no append-only file and forgets answers at a restart; set"
            " appendonly yes, or add allow_volatile=1 to the queue's URL"
        )


def backoff(*, longest: float) -> Iterator[float]:
    """Yields the seconds to wait before the second, third, ... attempt: doubling, with jitter."""
    delay = 0.02
    while True:
        yield delay * random.uniform(0.5, 1.0)
        delay = min(longest, delay * 2)


class RedisClient:
    """`away`: the last command found no server that accepts writes; `restored_at`: when (loop time)
    one replied again.
    """

    def __init__(
        self, server: Server, *, scripts: Mapping[str, Script], restored: Callable[[], None]
    ) -> None:
        self._server = server
        self._redis = Redis(connection_pool=server.pool())
        self._scripts = scripts
        self._pending: list[tuple[Command, asyncio.Future[Any]]] = []
        self._flush: asyncio.Task[None] | None = None
        self.away = False
        self._refused = False  # away because it refused a write
        self.restored_at: float | None = None
        self._restored = restored
        self._verify: Verify | None = None
        self._fault = ""
        self._closed = False

    def connection(self) -> Connection:
        """A connection for the caller alone, not connected yet and not in the pool."""
        pool = self._redis.connection_pool
        connection: Connection = pool.make_connection()  # type: ignore[no-untyped-call]
        return connection

    def script(self, name: str, key: str, /, *values: str | bytes, **arguments: object) -> Command:
        """The command that runs a script on one key: `arguments` are its `args`, `values` further
        entries of ARGV. An argument that is None is left out: Lua has no null in tables.
        """
        return ("EVALSHA", self._scripts[name].sha, 1, key, _json(present(**arguments)), *values)

    async def run(self, commands: Sequence[Command], *, attempts: int = ATTEMPTS) -> list[Any]:
        """Returns the replies, in order, after one round trip. Raises Unavailable."""
        try:
            return await self._run(commands, attempts=attempts)
        except (RedisError, OSError) as error:
            if not self.away:
                _report_refused(error)
            raise unavailable(error) from None  # the cause may show the address

    def verify_first(self, verify: Verify) -> None:
        """Sends nothing else before `verify` has accepted the server."""
        self._verify = verify

    async def _verify_server(self) -> None:
        """Raises Unavailable if it is not accepted, and the library's errors."""
        if self._verify is None:
            return
        (info,) = _checked(await self._execute([("INFO",)]))
        try:
            self._verify(info)
        except StartupError as error:
            if self._fault != str(error):
                self._fault = str(error)
                logger.warning("a server cannot be used: %s", error)
            raise Unavailable(
                "the journal's store cannot be used", code="backend_unavailable", retry_after=2.0
            ) from None
        self._verify = None

    async def run_first(self, commands: Sequence[Command]) -> list[Any]:
        """As `run`, when a process starts: raises StartupError with the reason, logs nothing."""
        try:
            return await self._run(commands, attempts=ATTEMPTS, quiet=True)
        except (RedisError, OSError) as error:
            raise startup_error(error) from None

    async def _run(
        self, commands: Sequence[Command], *, attempts: int, quiet: bool = False
    ) -> list[Any]:
        """Raises Unavailable once closed, and the library's errors."""
        if not commands:
            return []
        if self._closed:
            raise Unavailable("the queue was closed", code="backend_unavailable")
        delays = backoff(longest=0.2)
        for attempt in range(1, attempts + 1):
            client = self._redis
            try:
                await self._verify_server()
                replies = await self._replies(commands)
            except (RedisError, OSError) as error:
                self._lost(error, quiet=quiet)
                moved = refuses_writes(error)
                if moved:
                    await self._drop_connections(client)
                again = moved or isinstance(error, RedisConnectionError | OSError | NoScriptError)
                if not again or attempt == attempts or isinstance(error, AuthenticationError):
                    raise
                await asyncio.sleep(next(delays))
            else:
                self._answered(commands)
                return _checked(replies)
        raise AssertionError("the last attempt returns or raises")

    async def _replies(self, commands: Sequence[Command]) -> list[Any]:
        """Loads the scripts if the server lacks them. Raises if it accepts no writes, or if it is
        no longer the server into which they were loaded.
        """
        replies = await self._execute(commands)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            await self._execute([("SCRIPT", "LOAD", s.text) for s in self._scripts.values()])
            replies = await self._execute(commands)
        for reply in replies:
            if isinstance(reply, RedisError) and (
                isinstance(reply, NoScriptError) or refuses_writes(reply)
            ):
                raise reply
        return replies

    async def _execute(self, commands: Sequence[Command]) -> list[Any]:
        client = self._redis
        pipeline = client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        task = asyncio.current_task()
        before = task.cancelling() if task else 0
        try:
            replies: list[Any] = await pipeline.execute(raise_on_error=False)
        finally:
            if client is not self._redis:  # dropped meanwhile, except the connection in use here
                await client.connection_pool.disconnect(inuse_connections=False)
            # The library's `asyncio.wait_for` may lose a cancellation that arrives at the moment of
            # success, and the caller that cancelled would never return.
            if task and task.cancelling() > before:
                raise asyncio.CancelledError
        return replies

    async def _drop_connections(self, client: Redis) -> None:
        """Drops those of `client`, so that the next command finds the primary again.

        Does nothing if another command has done it. Connections in use are closed when their
        commands end.
        """
        if client is self._redis:
            self._redis = Redis(connection_pool=self._server.pool())
            await client.connection_pool.disconnect(inuse_connections=False)

    def _lost(self, error: Exception, *, quiet: bool) -> None:
        self._refused |= refuses_writes(error)
        began, self.away = not self.away, True
        if began and not quiet:
            logger.warning("redis is away: %s", cause_of(error))

    def _answered(self, commands: Sequence[Command]) -> None:
        """After refused writes only a write proves that the server is back: it serves reads."""
        if self.away and (not self._refused or self._writes(commands)):
            self.away = self._refused = False
            self.restored_at = asyncio.get_running_loop().time()
            self._restored()

    def _writes(self, commands: Sequence[Command]) -> bool:
        writing = {script.sha for script in self._scripts.values() if script.writes}
        return any(command[0] == "DEL" or writing & {*command[1:2]} for command in commands)

    async def read(self, *commands: Command) -> list[Any]:
        """As `run`, but commands of many readers at about the same time share a pipeline."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in commands]
        self._pending += zip(commands, futures, strict=True)
        if self._flush is None or self._flush.done():
            self._flush = loop.create_task(self._flush_pending())
        return await asyncio.gather(*futures)

    async def _flush_pending(self) -> None:
        await asyncio.sleep(0)  # readers that are ready in this turn of the loop join
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                replies = await self.run([command for command, _ in batch])
            except Unavailable as error:
                _fail(batch, error)
                continue
            except asyncio.CancelledError:
                _fail(batch, unavailable(RedisConnectionError()))
                raise
            for (_, future), reply in zip(batch, replies, strict=True):
                if not future.done():
                    future.set_result(reply)

    def refuse(self) -> None:
        """From now on every call raises Unavailable."""
        self._closed = True

    async def close(self) -> None:
        """Cancels reads in progress and closes the connections."""
        if self._flush is not None and not self._flush.done():
            self._flush.cancel()
            await asyncio.wait([self._flush])
        _fail(self._pending, unavailable(RedisConnectionError()))
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()
        await self._server.close()


def present(**fields: object) -> dict[str, object]:
    """Those that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def _fail(batch: Sequence[tuple[Command, asyncio.Future[Any]]], error: Unavailable) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)
            future.exception()  # retrieved: a reader of several futures raises only one


def _checked(replies: list[Any]) -> list[Any]:
    """Raises the first error among the replies."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def _report_refused(error: Exception) -> None:
    """Logs an error that a server replied to a command."""
    if isinstance(error, OutOfMemoryError):
        return
    # For example an error in a script: the text has no address and no credentials.
    text = str(error) if type(error) is ResponseError else cause_of(error)
    logger.warning("redis refused a command: %s", text)
