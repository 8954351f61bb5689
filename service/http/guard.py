"""Guard: what a connection may send before a request is one, and how long it may take to.

uvicorn bounds neither the size of a request's head nor the time that it takes to arrive, answers
bad HTTP with plain text, and writes that into an answer that is under way. Here each connection has
one timer, which bytes that drip do not put off:

    HEAD    nothing yet, or a part of a request's head: `head_timeout`, then 408
    IDLE    between two requests: uvicorn's keep-alive
    END     a last answer was given, or one before its request's body came: `linger`
    none    a request is being answered; the application bounds the body's time

What two readers of one request could take for two different ones is refused: a body framed twice,
codings other than chunked, no Host or two. Bodies and routes are the application's business.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent
from uvicorn._types import Scope as ServerScope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api.call import new_call_id
from service.api.errors import error_body, error_headers
from service.errors import (
    BadRequest,
    HeadersTooLarge,
    MethodNotAllowed,
    QuireError,
    RequestTimeout,
    UrlTooLong,
)
from service.http.half_closed import HalfClosed


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """Caps on one connection. Times are in seconds. What is over a cap ends the connection."""

    max_url_bytes: int = 8192
    max_head_bytes: int = 2**17  # request line and headers; also a body's framing around no content
    max_headers: int = 128
    head_timeout: float = 10.0  # from the connection's begin, or the first byte of a later head
    linger: float = 2.0  # what still comes is read so long, or the answer could be lost


class Wait(StrEnum):
    """What a connection's timer waits for the end of."""

    HEAD = "head"
    IDLE = "idle"
    END = "end"


class GuardedProtocol(HttpToolsProtocol):
    """HTTP/1.x as uvicorn speaks it, within `HttpLimits`.

    A request is in its head from `on_message_begin` to `on_headers_complete`, in its body until
    `on_message_complete`. Requests may be pipelined: `_open` counts those without a whole answer.
    """

    def __init__(self, *args: Any, limits: HttpLimits, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._open = 0
        self._in_head = False
        self._in_body = False
        self._unframed = 0  # bytes since the head began, or since the body's last content
        self._num_headers = 0
        self._fault: QuireError | None = None  # what a callback of the parser stopped it for
        self._unsaid: QuireError | None = None  # follows the open answers
        self._deaf = False  # what comes is thrown away
        self._last_answer = False  # the open answer says that none follows
        self._probe = b""  # bytes that a client skips at this point of the open answer
        self._half_closed: HalfClosed | None = None  # the client sends no more, and may read
        self._wait: Wait | None = None
        self._timer: asyncio.TimerHandle | None = None

    # --- the connection -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Its first head is awaited."""
        super().connection_made(transport)
        self._wait_for(Wait.HEAD)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keeps the connection while answers are open: the client may still read them."""
        if self._open == 0 or self._in_body:  # nothing was asked, or not all of it arrived
            return False
        self._deaf = True
        self._half_closed = HalfClosed(self.transport, probe=lambda: self._probe, loop=self.loop)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """There is nothing to wait for."""
        self._wait_for(None)
        if self._half_closed is not None:
            self._half_closed.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses, and refuses what is not HTTP or too much of it."""
        if self._deaf or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._unframed += len(data)
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self._stay(data[upgrade.args[0] :])
            self._check_size(self._unframed)
        except httptools.HttpParserInvalidMethodError:
            self._refuse(MethodNotAllowed("the server does not know this method"))
        except httptools.HttpParserError:
            self._refuse(self._fault or _malformed("the request is not valid HTTP/1.1"))
        except BadRequest as fault:
            self._refuse(fault)
        self._set_timer()

    def _stay(self, rest: bytes) -> None:
        """Serves a request to upgrade to another protocol as if it had not asked, and as the last.

        The parser takes the body of such a request for that protocol: it parses again. Java's
        client asks for HTTP/2 so, and sends its body along.
        """
        if self.parser.get_method() == b"CONNECT":
            raise _malformed("this server is no proxy")
        lines = [
            b"%b %b HTTP/%b"
            % (self.parser.get_method(), self.url, self.parser.get_http_version().encode()),
            *(
                b"%b: %b" % header
                for header in self.headers
                if header[0] not in {b"connection", b"upgrade", b"http2-settings"}
            ),
            b"connection: close",
        ]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    # --- the parser's callbacks -----------------------------------------------------------

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._in_head = True
        self._num_headers = 0

    def on_url(self, url: bytes) -> None:
        """A part of the URL."""
        super().on_url(url)
        if len(self.url) > self._limits.max_url_bytes:
            limit = self._limits.max_url_bytes
            raise self._stopped_by(UrlTooLong(f"the URL may have at most {limit} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A whole header; those after a chunked body count, and are dropped."""
        self._num_headers += 1
        if self._num_headers > self._limits.max_headers:
            limit = self._limits.max_headers
            raise self._stopped_by(HeadersTooLarge(f"a request may have at most {limit} headers"))
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole: it is checked, and the application is called."""
        if self.parser.should_upgrade():
            return
        version = self.parser.get_http_version()
        try:
            self._check_size(sum(len(name) + len(value) for name, value in self.headers))
            _check_framing(self.headers, version)
        except BadRequest as fault:
            raise self._stopped_by(fault) from None
        if version == "1.0":
            self.expect_100_continue = False
        super().on_headers_complete()
        self._open += 1
        self._in_head, self._in_body, self._unframed = False, True, 0

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._unframed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self.parser.should_upgrade():
            return
        self._in_body, self._unframed = False, 0
        super().on_message_complete()

    def _check_size(self, size: int) -> None:
        limit = self._limits.max_head_bytes
        if size > limit:
            raise HeadersTooLarge(f"the headers may have at most {limit} bytes together")

    def _stopped_by(self, fault: QuireError) -> QuireError:
        """To be raised in a callback; what the parser raises then is an error of its own."""
        self._fault = fault
        return fault

    # --- answers --------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        super()._start_asgi_task(cycle, self._delimited(cycle, app))

    def _delimited(self, cycle: RequestResponseCycle, app: ASGI3Application) -> ASGI3Application:
        """`app`, with answers that an HTTP/1.0 client can read, and with ends that are ours."""

        async def call(
            scope: ServerScope, receive: ASGIReceiveCallable, send: ASGISendCallable
        ) -> None:
            old = cycle.scope["http_version"] == "1.0"
            by_end = False  # the end of the connection is the end of the answer
            self._probe = b"" if old else _CONTINUE

            async def send_delimited(message: ASGISendEvent) -> None:
                nonlocal by_end
                if message["type"] == "http.response.start":
                    headers = {name.lower(): value for name, value in message["headers"]}
                    by_end = old and b"content-length" not in headers
                    if by_end:
                        cycle.chunked_encoding = False
                    await send(message)
                    events = headers.get(b"content-type", b"").startswith(b"text/event-stream")
                    self._probe = (_COMMENT if by_end else _COMMENT_CHUNK) if events else b""
                    if not cycle.keep_alive:  # the header says so; `_finish` closes, not the cycle
                        self._last_answer = cycle.keep_alive = True
                    return
                if by_end and message["type"] == "http.response.body":
                    cycle.expected_content_length = len(message.get("body", b""))
                await send(message)

            await app(scope, receive, send_delimited)

        return call

    def on_response_complete(self) -> None:
        """An answer was handed to the transport."""
        self._open -= 1
        if self._last_answer:
            self._open -= len(self.pipeline)
            self.pipeline.clear()
            self._unsaid = None
        super().on_response_complete()
        if self._open == 0 and not self.transport.is_closing():
            # Whether a body follows for which 100 was not sent is for the client to choose.
            if self._last_answer or self._deaf or (self._in_body and self.expect_100_continue):
                self._finish()
            self._set_timer()

    def _refuse(self, fault: QuireError) -> None:
        """Answers, once what was asked before has its answer, and ends the connection."""
        self._deaf, self._unsaid = True, fault
        if self._in_body:  # of the newest request: it is the faulty one
            if self.pipeline and self.pipeline[0][0] is self.cycle:
                self.pipeline.popleft()
                self._open -= 1
            elif self.cycle.response_started:
                self._unsaid = None
            else:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
                self._open -= 1
        if self._open == 0:
            self._finish()

    def _finish(self) -> None:
        """Ends the connection when the client does, or after `linger`.

        To close with bytes unread would reset it, and the client might not see the answer.
        """
        self._unset_keepalive_if_required()
        self._deaf = True
        if self._unsaid is not None:
            self.transport.write(_response(self._unsaid))
        if self._half_closed is not None:
            self.transport.close()
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._wait_for(Wait.END)

    # --- time -----------------------------------------------------------------------------

    def _set_timer(self) -> None:
        if self._open:
            self._wait_for(None)
        elif self._deaf or self._in_body:
            self._wait_for(Wait.END)
        else:
            self._wait_for(Wait.HEAD if self._in_head or self._unframed else Wait.IDLE)

    def _wait_for(self, wait: Wait | None) -> None:
        if wait is self._wait:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._wait, self._timer = wait, None
        if wait is not None:
            seconds = {
                Wait.HEAD: self._limits.head_timeout,
                Wait.IDLE: self.timeout_keep_alive,
                Wait.END: self._limits.linger,
            }[wait]
            self._timer = self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self._wait is Wait.HEAD and (self._in_head or self._unframed):
            limit = self._limits.head_timeout
            self._refuse(RequestTimeout(f"a request's head must arrive in {limit:g} seconds"))
        else:
            self.transport.close()


_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_COMMENT = b": probe\n"
_COMMENT_CHUNK = b"%x\r\n%b\r\n" % (len(_COMMENT), _COMMENT)


def _response(fault: QuireError) -> bytes:
    """A whole HTTP answer, the last one of its connection."""
    body = error_body(fault)
    headers = error_headers(fault) | {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-request-id": new_call_id(),
    }
    if isinstance(fault, MethodNotAllowed):
        headers["allow"] = "GET, HEAD, POST, DELETE"
    lines = [f"HTTP/1.1 {fault.status} {HTTPStatus(fault.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _malformed(message: str) -> BadRequest:
    return BadRequest(message, code="invalid_http")


def _check_framing(headers: list[tuple[bytes, bytes]], version: str) -> None:
    """Raises BadRequest where another server could see other requests here."""
    hosts = sum(name == b"host" for name, _ in headers)
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if version not in {"1.0", "1.1"}:
        raise _malformed("only HTTP/1.0 and HTTP/1.1 are spoken here")
    if hosts > 1 or (version == "1.1" and hosts == 0):
        raise _malformed("a request must have one Host")
    if len(lengths) > 1 or not all(value.isdigit() for value in lengths):
        raise _malformed("a request may have one Content-Length, in digits")
    if codings and (codings != [b"chunked"] or lengths or version == "1.0"):
        raise _malformed("a body may be chunked, with no other coding and no Content-Length")
