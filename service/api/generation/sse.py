"""Server-sent events over ASGI: an answer's events, keep-alives, clients that leave.

    relay:  journal -> event -> send       one send in flight: it waits until the socket drains
    watch:  receive -> client gone         also between tokens; and it sends the keep-alive

Whichever ends first ends the other; both end when the replica shuts down. An error after the
headers is an event of its own, then the body ends without `[DONE]`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from time import monotonic

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.call import DROP, HEAD_ONLY, first_of, gone
from service.api.generation.deltas import StreamDelta
from service.api.generation.dialect import EventRenderer
from service.api.generation.reader import AnswerReader
from service.errors import QuireError

HEADERS = {
    "cache-control": "no-store",
    "x-accel-buffering": "no",
    "content-type": "text/event-stream; charset=utf-8",
}


class EventStream(Response):
    """The streamed answer. Its headers are sent at once: the call was admitted before."""

    def __init__(self, reader: AnswerReader, renderer: EventRenderer) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._reader = reader
        self._renderer = renderer
        self._sending_since: float | None = None
        self._last_sent = monotonic()
        self._stalled = False
        self._error: QuireError | None = None
        self._unsent = b""  # was given to a `send` that did not return
        self._ending = False  # the last event was rendered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until the answer ends or the client is gone."""
        if scope["state"].get(HEAD_ONLY):
            await super().__call__(scope, receive, send)  # the headers and an empty body
            return
        with self._reader.connected():
            try:
                await send(
                    {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                )
                relay = asyncio.create_task(self._relay(send))
                watch = asyncio.create_task(self._watch(receive, send))
                closing = self._reader.context.closing
                await first_of(relay, watch, asyncio.create_task(closing.wait()))
                if closing.is_set():
                    await self._interrupt(send)
                drop = scope["state"].get(DROP)
                if self._stalled and drop is not None:
                    drop()
                    await gone(receive)
            finally:
                self._reader.report(streamed=True, error=self._error)

    async def _relay(self, send: Send) -> None:
        renderer = self._renderer
        try:
            if first := renderer.begin():
                await self._send(send, first)
            async with aclosing(self._reader.deltas()) as batches:
                async for batch in batches:
                    await self._send_batch(send, batch)
            last = renderer.finish()
        except QuireError as error:
            self._error = error
            last = renderer.fail(error)
        self._ending = True
        await self._send(send, last, more=False)

    async def _interrupt(self, send: Send) -> None:
        """Ends a stream that has not ended. Nothing is left out or sent twice."""
        if self._ending and not self._unsent:
            return
        last = self._unsent
        if not self._ending:
            self._error = self._reader.interrupt(streamed=True)
            last += self._renderer.fail(self._error)
        await self._send(send, last, more=False)

    async def _send_batch(self, send: Send, batch: Iterator[tuple[int, StreamDelta]]) -> None:
        """Events before an error are sent before it."""
        events: list[bytes] = []
        try:
            for choice, delta in batch:
                events.append(self._renderer.event(choice, delta))
        finally:
            if body := b"".join(events):
                await self._send(send, body)

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        self._sending_since = monotonic()
        self._unsent = body
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self._unsent = b""
        self._sending_since = None
        self._last_sent = monotonic()

    async def _watch(self, receive: Receive, send: Send) -> None:
        """Returns when the client is gone, or has read nothing for too long."""
        limits = self._reader.context.limits
        while True:
            try:
                async with asyncio.timeout(min(limits.keep_alive, limits.stall_timeout) / 2):
                    await gone(receive)
                    return
            except TimeoutError:
                now = monotonic()
            if self._sending_since is not None:
                if now - self._sending_since > limits.stall_timeout:
                    self._stalled = True
                    return
            elif now - self._last_sent >= limits.keep_alive / 2:
                self._last_sent = now
                beat = self._renderer.keep_alive
                await send({"type": "http.response.body", "body": beat, "more_body": True})
