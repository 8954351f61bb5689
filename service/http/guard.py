"""Guard: limits on what a connection may send and how slowly, above uvicorn's HTTP protocol.

README.md in this folder gives the reasons. A connection is always in one state of reading. While no
response is open, the state's timer runs; bytes that arrive one by one do not extend it.

    NEW      connected, no bytes yet           `head_timeout`, then closed
    HEAD     a request's head is arriving      `head_timeout` (the first: since NEW), then 408
    BODY     its body is arriving              only if it was answered before: `linger`, then closed
    IDLE     between two requests              uvicorn's keep-alive timeout, then closed
    CLOSING  what arrives is discarded         `linger`, then closed

    NEW -> HEAD -> BODY -> IDLE -> HEAD ...    and from each state to CLOSING, which is final

Requests may be pipelined: HEAD and BODY can coexist with open responses to earlier requests.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent
from uvicorn._types import Scope as ServerScope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api.http.call import new_call_id
from service.api.http.errors import error_body, error_headers
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
    """Limits on one connection; exceeding one ends it. Times are in seconds."""

    max_url_bytes: int = 8192
    max_head_bytes: int = 2**17  # request line and headers; also chunk framing around no content
    max_headers: int = 128
    head_timeout: float = 10.0  # since the connection was made, or a later head's first byte
    linger: float = 2.0  # reading goes on for this long: a reset could discard the response


class State(StrEnum):
    """What is read from the connection."""

    NEW = "new"
    HEAD = "head"
    BODY = "body"
    IDLE = "idle"
    CLOSING = "closing"


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.x protocol within `HttpLimits`."""

    def __init__(self, *args: Any, limits: HttpLimits, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._state = State.NEW
        self._timed: State | None = None  # the state whose timer runs
        self._timer: asyncio.TimerHandle | None = None
        self._num_open = 0  # requests whose response is not complete
        self._num_headers = 0  # of the current request, trailers included
        self._framing_bytes = 0  # received since the head began, or since the body's last content
        self._last_response = False  # the open response has "connection: close"
        self._ends_at_close = False  # the end of the connection delimits the open response
        self._pending_error: QuireError | None = None  # sent after the open responses
        self._probe = b""  # bytes that clients skip at this point of the open response
        self._half_closed: HalfClosed | None = None  # set after the client closed its sending side

    # --- the connection -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_timer()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keeps the connection while responses are open: the client may still read them."""
        if self._num_open == 0 or self._state is State.BODY:
            return False
        self._state = State.CLOSING
        self._half_closed = HalfClosed(self.transport, probe=lambda: self._probe, loop=self.loop)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._half_closed is not None:
            self._half_closed.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses, and refuses what is not valid HTTP or exceeds a limit."""
        if self._state is State.CLOSING or self.transport.is_closing():
            return
        if self._state in {State.NEW, State.IDLE}:
            self._state = State.HEAD
        self._framing_bytes += len(data)
        try:
            self._parse(data)
            self._check_size(self._framing_bytes)
        except httptools.HttpParserInvalidMethodError:
            self._refuse(MethodNotAllowed("unknown HTTP method"))
        except httptools.HttpParserError as error:
            raised = error.__context__  # by a callback, below
            malformed = _malformed("the request is not valid HTTP/1.1")
            self._refuse(raised if isinstance(raised, QuireError) else malformed)
        except BadRequest as error:
            self._refuse(error)
        self._set_timer()

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
        else:
            return
        # Not in the handler: its exception would replace the context of what is raised here.
        self._ignore_upgrade(rest)

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Serves a request to upgrade to another protocol as an ordinary one, and as the last.

        The parser stopped in front of the body, so the head without its upgrade is parsed again.
        Java's HTTP client offers HTTP/2 in this way, and sends its body along.
        """
        if self.parser.get_method() == b"CONNECT":
            raise _malformed("CONNECT is not supported: this server is not a proxy")
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

    # --- the parser's callbacks; it keeps what they raise as its error's context -----------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._state = State.HEAD
        self._num_headers = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        limit = self._limits.max_url_bytes
        if len(self.url) > limit:
            raise UrlTooLong(f"the URL must be at most {limit} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes a header. Trailers, which follow a chunked body, are counted and dropped."""
        self._num_headers += 1
        limit = self._limits.max_headers
        if self._num_headers > limit:
            raise HeadersTooLarge(f"a request must have at most {limit} headers")
        if self._state is State.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Checks the head and starts the application."""
        if self.parser.should_upgrade():
            return
        version = self.parser.get_http_version()
        self._check_size(sum(len(name) + len(value) for name, value in self.headers))
        _check_framing(self.headers, version)
        if version == "1.0":
            self.expect_100_continue = False
        super().on_headers_complete()
        self._num_open += 1
        self._state, self._framing_bytes = State.BODY, 0

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._state, self._framing_bytes = State.IDLE, 0
        super().on_message_complete()

    def _check_size(self, size: int) -> None:
        limit = self._limits.max_head_bytes
        if size > limit:
            raise HeadersTooLarge(f"the headers must be at most {limit} bytes in total")

    # --- responses ------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        async def call(
            scope: ServerScope, receive: ASGIReceiveCallable, _send: ASGISendCallable
        ) -> None:
            await app(scope, receive, partial(self._send, cycle))

        self._probe = b"" if cycle.scope["http_version"] == "1.0" else _CONTINUE
        super()._start_asgi_task(cycle, call)

    async def _send(self, cycle: RequestResponseCycle, message: ASGISendEvent) -> None:
        """As uvicorn sends, but without chunks to HTTP/1.0, and `_finish` closes the connection."""
        if message["type"] == "http.response.start":
            headers = {name.lower(): value for name, value in message["headers"]}
            is_old = cycle.scope["http_version"] == "1.0"
            self._ends_at_close = is_old and b"content-length" not in headers
            if self._ends_at_close:
                cycle.chunked_encoding = False
            await cycle.send(message)
            self._probe = b""
            if headers.get(b"content-type", b"").startswith(b"text/event-stream"):
                self._probe = _COMMENT if self._ends_at_close else _COMMENT_CHUNK
            if not cycle.keep_alive:
                self._last_response = cycle.keep_alive = True
            return
        if message["type"] == "http.response.body" and self._ends_at_close:
            cycle.expected_content_length = len(message.get("body", b""))
        await cycle.send(message)

    def on_response_complete(self) -> None:
        self._num_open -= 1
        if self._last_response:
            self._num_open -= len(self.pipeline)
            self.pipeline.clear()
            self._pending_error = None
        super().on_response_complete()
        self._unset_keepalive_if_required()  # the guard has a timer of its own
        if self._num_open == 0 and not self.transport.is_closing():
            # A client that waits for "100 Continue" may or may not send its body now, so the start
            # of the next request is unknown.
            unsent_body = self._state is State.BODY and self.expect_100_continue
            if self._last_response or self._state is State.CLOSING or unsent_body:
                self._finish()
            self._set_timer()

    def _refuse(self, error: QuireError) -> None:
        """Ends the connection with an error response, after the responses to earlier requests."""
        in_body = self._state is State.BODY
        self._state, self._pending_error = State.CLOSING, error
        if in_body:  # the newest request is the faulty one
            if self.pipeline and self.pipeline[0][0] is self.cycle:
                self.pipeline.popleft()
                self._num_open -= 1
            elif self.cycle.response_started:
                self._pending_error = None
            else:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
                self._num_open -= 1
        if self._num_open == 0:
            self._finish()

    def _finish(self) -> None:
        """Sends the pending error. Closes when the client does, or after `linger`.

        Closing with unread bytes would reset the connection, and the client could lose the
        response.
        """
        self._state = State.CLOSING
        if self._pending_error is not None:
            self.transport.write(_response(self._pending_error))
        if self._half_closed is not None:
            self.transport.close()
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._set_timer()

    # --- time -----------------------------------------------------------------------------

    def _set_timer(self) -> None:
        """Starts the timer of the current state, unless it runs already."""
        timed = None if self._num_open else self._state
        if timed is self._timed or (self._timed, timed) == (State.NEW, State.HEAD):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timed, self._timer = timed, None
        if timed is None:
            return
        if timed in {State.NEW, State.HEAD}:
            seconds = self._limits.head_timeout
        else:
            seconds = self.timeout_keep_alive if timed is State.IDLE else self._limits.linger
        self._timer = self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self._state is State.HEAD:
            limit = self._limits.head_timeout
            self._refuse(RequestTimeout(f"the headers must arrive within {limit:g} seconds"))
        else:
            self.transport.close()


_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_COMMENT = b": probe\n"
_COMMENT_CHUNK = b"%x\r\n%b\r\n" % (len(_COMMENT), _COMMENT)


def _response(error: QuireError) -> bytes:
    """A complete HTTP response, the last one of its connection."""
    body = error_body(error)
    headers = error_headers(error) | {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-request-id": new_call_id(),
    }
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = "GET, HEAD, POST, DELETE"
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _malformed(message: str) -> BadRequest:
    return BadRequest(message, code="invalid_http")


def _check_framing(headers: list[tuple[bytes, bytes]], version: str) -> None:
    """Raises BadRequest if another server could find other requests in the same bytes."""
    hosts = sum(name == b"host" for name, _ in headers)
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if version not in {"1.0", "1.1"}:
        raise _malformed("the HTTP version must be 1.0 or 1.1")
    if hosts > 1 or (version == "1.1" and hosts == 0):
        raise _malformed("a request must have exactly one Host header")
    if len(lengths) > 1 or not all(value.isdigit() for value in lengths):
        raise _malformed("Content-Length must be one number in decimal digits")
    if codings and (codings != [b"chunked"] or lengths or version == "1.0"):
        raise _malformed(
            "Transfer-Encoding must be chunked, without Content-Length, and in HTTP/1.1"
        )
