"""Wakeups: the one pub/sub connection of a process and shard. Messages are hints, or hold records.

Channels are sharded ones: in a cluster only the node with the shard's slot hears of them.

Watchers must also look again after some time by themselves: messages are lost when the connection
breaks. It is reconnected, and then all watchers are woken. Watching only changes a set; one task
makes the subscriptions accordingly.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from redis.asyncio import Connection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from service.queues.redis.connection import backoff
from service.queues.waiting import woken_within

logger = logging.getLogger(__name__)

Wake = Callable[[bytes], None]
"""Called with the message; empty if messages may have been missed."""

PING_EVERY = 3.0
"""Seconds; a connection that is silent for twice as long is broken."""


class Wakeups:
    """Starts its task with the first `watch`; `close` ends it."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._watchers: dict[bytes, set[Wake]] = {}
        self._subscribed: set[bytes] = set()
        self._changed = asyncio.Event()
        self._outdated = False
        self._task: asyncio.Task[None] | None = None

    def watch(self, channel: str, wake: Wake) -> None:
        """Calls `wake`, which must not block, when subscribed and at each message."""
        self._watchers.setdefault(channel.encode(), set()).add(wake)
        self._changed.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._serve())

    def reconnect(self) -> None:
        """Reconnects: the server may no longer be the primary, or the network may have dropped the
        connection silently.
        """
        self._outdated = True
        self._changed.set()

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            await _end(task, patience=1.0)
        self._wake_all()

    async def _serve(self) -> None:
        delays = backoff(longest=1.0)
        while True:
            connection = self._connect()
            writer: asyncio.Task[None] | None = None
            try:
                self._outdated = False
                await connection.connect()  # type: ignore[no-untyped-call]
                delays = backoff(longest=1.0)
                writer = asyncio.create_task(self._write(connection))
                await self._read(connection)
            except (RedisError, OSError, TimeoutError) as error:
                logger.info("pub/sub connection lost: %s", type(error).__name__)
            finally:
                try:
                    if writer is not None:
                        await _end(writer, patience=0.1)
                finally:  # `close` may cancel again meanwhile
                    await connection.disconnect(nowait=True)
            self._wake_all()
            await asyncio.sleep(next(delays))

    async def _write(self, connection: Connection) -> None:
        """Subscribes the channels that have watchers, and pings if nothing else was sent.

        A further watcher may add no channel, so a ping is due by the time of the last command. If
        this fails, the connection is broken or soon silent, and `_read` fails too.
        """
        self._subscribed = set()
        self._changed.set()
        sent = time.monotonic()
        while True:
            await woken_within(sent + PING_EVERY - time.monotonic(), self._changed)
            self._changed.clear()
            if self._outdated:
                await connection.disconnect(nowait=True)  # and then `_read` fails
                return
            new = self._watchers.keys() - self._subscribed
            self._subscribed |= new
            if new:
                await connection.send_command("SSUBSCRIBE", *new)
                sent = time.monotonic()
            elif time.monotonic() - sent >= PING_EVERY:
                await connection.send_command("PING")
                sent = time.monotonic()

    async def _read(self, connection: Connection) -> None:
        while True:
            reply: Any = await connection.read_response(timeout=2 * PING_EVERY)
            if reply is None:
                raise TimeoutError
            if not isinstance(reply, list):
                continue
            if reply[0] == b"sunsubscribe" and reply[1] in self._subscribed:
                raise RedisConnectionError("the slot moved to another node")
            if reply[0] in {b"smessage", b"ssubscribe"}:
                message = reply[2] if reply[0] == b"smessage" else b""
                for wake in tuple(self._watchers.get(reply[1], ())):
                    wake(message)

    def _wake_all(self) -> None:
        for watchers in tuple(self._watchers.values()):
            for wake in tuple(watchers):
                wake(b"")


async def _end(task: asyncio.Task[None], *, patience: float) -> None:
    """Cancels until it is done: `asyncio.wait_for` of Python 3.11, which the client library uses,
    loses a cancellation that arrives at the moment of success.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=patience)
    if not task.cancelled():
        task.exception()  # retrieved
