"""The SSE client of the load tests and of the test cluster: HTTP/1.1 and SSE over asyncio streams.

It has no HTTP library below it because it shares two cores with the server that it measures: per
streamed token it takes 32 us of CPU, `httpx` takes 95 us (16 streams, one chunk per token). The
fault tests also need what libraries hide: the raw bytes of each event, and a close by RST. Each
request has a connection of its own; there are no redirects and no retries.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson

Address = tuple[str, int]
DONE = b"[DONE]"
_STATUS = re.compile(r"HTTP/1\.[01] ([1-5][0-9]{2})\b")


class Broken(Exception):
    """The connection failed or ended before the response did; the message is the cause."""


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One event of an OpenAI-compatible stream. Properties parse it: use `json` on a hot path."""

    raw: bytes  # as received, without comments
    data: bytes
    at: float  # time.monotonic() when its last byte was read
    id: str | None = None

    def json(self) -> dict[str, Any]:
        """The payload; empty for `[DONE]`. Raises ValueError for invalid JSON."""
        parsed: dict[str, Any] = {} if self.data == DONE else orjson.loads(self.data)
        return parsed

    @property
    def tokens(self) -> list[int]:
        return [token for choice in self._choices() for token in choice.get("token_ids") or ()]

    @property
    def text(self) -> str:
        return "".join(choice["text"] for choice in self._choices())

    @property
    def finish_reason(self) -> str | None:
        reasons = (choice["finish_reason"] for choice in self._choices())
        return next((reason for reason in reasons if reason), None)

    @property
    def error(self) -> str | None:
        """The code of an error event."""
        code: str | None = self.json().get("error", {}).get("code")
        return code

    def _choices(self) -> list[dict[str, Any]]:
        choices: list[dict[str, Any]] = self.json().get("choices", [])
        return choices


class SseDecoder:
    """Splits a byte stream, cut anywhere, into events. Drops comments and unknown fields."""

    def __init__(self) -> None:
        self._rest = b""
        self._lines: list[bytes] = []

    def feed(self, data: bytes, *, at: float) -> list[SseEvent]:
        """Returns the events that these bytes complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        events = []
        for line in lines:
            if line.startswith(b":"):
                continue
            if line.strip(b"\r"):
                self._lines.append(line)
            elif self._lines:
                event = _parse([*self._lines, line], at=at)
                self._lines = []
                if event is not None:
                    events.append(event)
        return events


def _parse(lines: list[bytes], *, at: float) -> SseEvent | None:
    """The event of these lines, or None if it has no data."""
    data, event_id = [], None
    for line in lines:
        name, _, value = line.removesuffix(b"\r").partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
        elif name == b"id":
            event_id = value.strip().decode()
    raw = b"\n".join(lines) + b"\n"
    return SseEvent(raw, b"\n".join(data), at, event_id) if data else None


@dataclass(slots=True)
class Reply:
    """Status and headers of a response, and its body as it arrives."""

    status: int
    headers: dict[str, str]  # names in lower case
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body. Raises Broken if it is cut off."""
        try:
            if self.headers.get("transfer-encoding", "").lower() == "chunked":
                while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
                    yield (await self.reader.readexactly(size + 2))[:-2]
            elif (length := self.headers.get("content-length")) is not None:
                yield await self.reader.readexactly(int(length))
            else:
                while piece := await self.reader.read(65536):
                    yield piece
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise _broken(error) from error

    async def events(self) -> AsyncGenerator[SseEvent, None]:
        """Complete events only. Raises Broken if the body is cut off."""
        decoder = SseDecoder()
        async for piece in self.pieces():
            for event in decoder.feed(piece, at=time.monotonic()):
                yield event

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    async def json(self) -> dict[str, Any]:
        parsed: dict[str, Any] = orjson.loads(await self.body())
        return parsed

    def reset(self) -> None:
        """Closes the connection with RST instead of FIN."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@asynccontextmanager
async def call(
    address: Address,
    method: str,
    path: str,
    *,
    body: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    tls: bool = False,
) -> AsyncIterator[Reply]:
    """Sends one request on a connection of its own. Raises Broken if no response arrives."""
    data = b"" if body is None else orjson.dumps(dict(body))
    lines = [f"{method} {path} HTTP/1.1", f"Host: {address[0]}:{address[1]}", "Connection: close"]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    try:
        reader, writer = await asyncio.open_connection(*address, ssl=tls or None)
    except OSError as error:
        raise _broken(error) from error
    try:
        try:
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            raise _broken(error) from error
        first = _STATUS.match(head[0])
        if first is None:
            raise Broken("what answers there does not speak HTTP/1.1")
        fields = (line.partition(":") for line in head[1:] if line)
        named = {name.lower(): value.strip() for name, _, value in fields}
        yield Reply(int(first[1]), named, reader, writer)
    finally:
        writer.transport.abort()


def _broken(error: Exception) -> Broken:
    return Broken(f"{type(error).__name__}: {error}")
