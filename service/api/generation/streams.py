"""Streams of events: sent over ASGI, resumed at any replica, read again, cancelled.

    relay:  journal -> event -> send       one send in flight: it waits until the socket drains
    watch:  receive -> client gone         also between tokens; and it sends the keep-alive

Whichever ends first ends the other; both end when the replica shuts down. An error after the
headers is an event of its own, then the body ends without `[DONE]`. A resumed stream is read up to
the position that its client names:

    journal      | 0 ........ record | record ........ |
    the client   | received ............... |          the record is split, its rest is sent
    the client   | received ..................................... |   the journal is behind: wait

The journal is behind its reader if the store lost its tail. The engine that has the request, or
another one after a failover, writes the same tokens again.
"""

from __future__ import annotations

import asyncio
import codecs
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from time import monotonic
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from starlette.types import Receive, Scope, Send

from service.api.generation.deltas import StreamDelta
from service.api.generation.dialect import Dialect, EventRenderer
from service.api.generation.follow import split
from service.api.generation.manifest import Endpoint, Manifest
from service.api.generation.reader import AnswerReader
from service.api.http.auth import Tenant
from service.api.http.call import DROP, HEAD_ONLY, call_age, first_of, gone
from service.api.http.context import ApiContext, Caller, Context
from service.api.http.models import StreamCancelled, described, json_response
from service.errors import BadRequest, Gone, NotFound, QuireError, StreamDivergence, Unavailable
from service.messages import End, FinishReason, Record, Tokens, child_ids, rolling_digest
from service.queues.contract import StoredSubmission
from service.thinking import prefix_at_end

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


_POSITION = re.compile(r"(0|[1-9][0-9]{0,8})\.([0-9a-f]{6})")


def resumed_reader(
    call_id: str, manifest: Manifest, request: Request, context: ApiContext, tenant: Tenant
) -> AnswerReader:
    """A reader of a stored answer from its beginning, for an HTTP request that names its id."""
    request.state.request_id = call_id
    arrived = request.state.arrived
    return AnswerReader(
        call_id, manifest, context, tenant=tenant.name, arrived=arrived, resumed=True
    )


async def read_to_event(reader: AnswerReader, renderer: EventRenderer, event_id: str) -> None:
    """Reads the journal up to an SSE event id: `<tokens so far>.<6 hex digits of their digest>` for
    each choice, in order, joined by commas.

    Replaying the journal up to there puts the reader and the renderer into the state that they had:
    the bytes that follow are those that followed before. Raises BadRequest, StreamDivergence or
    Unavailable.
    """
    too_long = len(event_id) > reader.context.limits.max_event_id_chars
    positions = [] if too_long else [_POSITION.fullmatch(part) for part in event_id.split(",")]
    if len(positions) != len(reader.choices):
        raise _bad_event_id()
    for choice, position in enumerate(positions):
        if position is None:
            raise _bad_event_id()
        await read_to(reader, renderer, choice=choice, count=int(position[1]))
        if reader.choices[choice].position != position[0]:
            raise StreamDivergence(
                "the journal differs from what was sent", param="last-event-id", retryable=False
            )


def _bad_event_id() -> BadRequest:
    return BadRequest(
        "the event id is not one of this stream", code="invalid_event_id", param="last-event-id"
    )


async def read_to(reader: AnswerReader, renderer: EventRenderer, *, choice: int, count: int) -> int:
    """Reads a choice's journal up to `count` tokens, or to its end if the answer has fewer.

    Returns the number of tokens read. Raises Unavailable if the journal stays behind, and
    StreamDivergence if its records contradict each other.
    """
    position = reader.choices[choice]
    while position.count < count:
        async with aclosing(reader.pages(choice)) as pages:
            async for page in pages:
                if await _read(reader, renderer, page, choice=choice, count=count):
                    return position.count
        await _growth(reader, choice=choice)
    return position.count


async def _read(
    reader: AnswerReader,
    renderer: EventRenderer,
    page: Sequence[Record],
    *,
    choice: int,
    count: int,
) -> bool:
    """Reads records up to `count` tokens; returns whether they reach it, or the answer's end."""
    position = reader.choices[choice]
    for record in page:
        if isinstance(record, End):
            return True
        if record.end > count:
            record = await _received(reader, record, choice=choice, count=count)  # noqa: PLW2901
        for delta in reader.read(choice, record):
            renderer.skip(delta)
        if position.count == count:
            return True
    return False


async def _received(reader: AnswerReader, record: Tokens, *, choice: int, count: int) -> Tokens:
    """The part of a record up to `count` tokens, as it was sent to a client that has it.

    All text was sent but the bytes of an unfinished character and what may begin a stop string.
    """
    position, manifest = reader.choices[choice], reader.manifest
    known = record.ids[: count - record.start]
    journal = await reader.context.queue.read(reader.request_ids[choice])
    before = [r.ids for r in journal if isinstance(r, Tokens) and r.end <= record.start]
    tokenizer = reader.context.tokenizer
    skip = manifest.skip_special_tokens
    token_bytes = tokenizer.token_bytes if skip else tokenizer.visible_bytes
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(b"".join(token_bytes[id_] for ids in [*before, known] for id_ in ids))
    held_back = max((len(prefix_at_end(text, stop)) for stop in manifest.stop), default=0)
    num_chars = len(text) - held_back - position.num_chars
    digest = rolling_digest(known, previous=position.digest)
    return split(record, len(known), num_chars=num_chars, digest=digest)[0]


async def _growth(reader: AnswerReader, *, choice: int) -> None:
    """Returns when the journal has more records than were read. Raises Unavailable if it has not
    grown for as long as a failover takes.
    """
    queue, position = reader.context.queue, reader.choices[choice]
    with suppress(TimeoutError):
        async with asyncio.timeout(queue.limits.failover):
            async for _ in queue.follow(reader.request_ids[choice], after=position.count):
                return
    raise Unavailable(
        "the store lost the end of this answer's journal, and no engine has written it again yet",
        code="journal_behind",
        retry_after=queue.limits.lease,
    )


CallId = Annotated[str, Path(description="The x-request-id of the call to read.")]
After = Annotated[
    str | None,
    Query(description="The id of the last event received; Last-Event-ID takes precedence."),
]
LastEventId = Annotated[
    str | None,
    Header(description="The id of the last event received. Default: from the start."),
]


def stream_routes(dialects: Mapping[Endpoint, Dialect[Any]]) -> APIRouter:
    """The routes. Each stream is rendered in the dialect that it was requested in."""
    router = APIRouter()

    @router.get("/v1/streams/{call_id}", responses=described(None, stream=True))
    async def resume_stream(
        call_id: CallId,
        request: Request,
        context: Context,
        tenant: Caller,
        *,
        after: After = None,
        last_event_id: LastEventId = None,
    ) -> Response:
        """Returns the events of a call, during its generation and for a while after it, from the
        start or after a given event. They have ids.
        """
        reader = await _reader(call_id, request, context, tenant)
        renderer = dialects[reader.manifest.endpoint].stream(reader, event_ids=True)
        if event_id := last_event_id or after:
            await read_to_event(reader, renderer, event_id)
        return EventStream(reader, renderer)

    @router.delete("/v1/streams/{call_id}", responses=described(StreamCancelled))
    async def cancel_stream(call_id: CallId, context: Context, tenant: Caller) -> Response:
        """Ends the unfinished choices of a call, with the finish reason `cancelled`."""
        stored = await find_call(call_id, context, tenant)
        await context.queue.stop(child_ids(stored.id, stored.num_requests), FinishReason.CANCELLED)
        return json_response({"id": stored.id, "object": "stream", "cancelled": True})

    return router


async def _reader(
    call_id: str, request: Request, context: ApiContext, tenant: Tenant
) -> AnswerReader:
    stored = await find_call(call_id, context, tenant)
    manifest = Manifest.from_json(stored.manifest)
    if manifest.result_note is not None:
        kind = "encodings" if manifest.encoding else "decisions"
        raise BadRequest(
            f"this answer is no stream: GET /v1/{kind}/{{id}} returns it", code="not_a_stream"
        )
    if manifest.width > manifest.keep:
        raise BadRequest("best_of cannot be streamed", code="unsupported_parameter")
    if not manifest.stored:
        raise NotFound("there is no such stream", code="stream_not_found")
    await context.queue.heartbeat([stored.id])
    return resumed_reader(stored.id, manifest, request, context, tenant)


async def find_call(call_id: str, context: ApiContext, tenant: Tenant) -> StoredSubmission:
    """Raises NotFound, with one text for unknown, malformed and other tenants' ids, or Gone."""
    age = call_age(call_id)
    stored = None if age is None else await context.queue.lookup(call_id)
    if stored is not None and stored.tenant == tenant.name:
        return stored
    if age is not None and age > context.limits.resume_window:
        raise Gone("this stream is no longer kept, or never existed", retryable=False)
    raise NotFound("there is no such stream", code="stream_not_found")
