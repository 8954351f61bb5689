"""A client that keeps everything: a raw HTTP/1.1 and SSE reader which reconnects and resumes.

It knows nothing of the service but its documented API, and no HTTP library: what it is given are
the bytes that came over the socket.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Address = tuple[str, int]
PATIENCE = 60.0  # seconds after which a client gives up, whatever happens


class Broken(Exception):
    """The connection ended before the answer did."""


@dataclass
class Reply:
    """An answer's status and headers, and its body as it comes."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body. Raises Broken where it does not come to its end."""
        try:
            if "content-length" in self.headers:
                yield await self.reader.readexactly(int(self.headers["content-length"]))
                return
            while size := int(await self.reader.readline() or b"x", 16):
                yield await self.reader.readexactly(size)
                await self.reader.readline()
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            raise Broken from error

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    async def json(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(await self.body())
        return parsed

    def reset(self) -> None:
        """Closes with RST instead of FIN."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@asynccontextmanager
async def call(
    address: Address,
    method: str,
    path: str,
    *,
    body: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> AsyncIterator[Reply]:
    """One request on a connection of its own. Raises Broken where no answer begins."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    try:
        reader, writer = await asyncio.open_connection(*address)
    except OSError as error:
        raise Broken from error
    try:
        try:
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        except (OSError, asyncio.IncompleteReadError) as error:
            raise Broken from error
        pairs = (line.split(": ", 1) for line in head[1:] if line)
        fields = {name.lower(): value for name, value in pairs}
        yield Reply(int(head[0].split()[1]), fields, reader, writer)
    finally:
        writer.transport.abort()


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One event: its bytes as they came, comments left out, and what they say."""

    raw: bytes
    id: str | None
    data: str
    at: float  # when it came, on the monotonic clock

    @property
    def tokens(self) -> list[int]:
        found: list[int] = []
        for choice in self._choices():
            found += choice.get("token_ids") or []
        return found

    @property
    def text(self) -> str:
        return "".join(choice["text"] for choice in self._choices())

    @property
    def finish_reason(self) -> str | None:
        reasons = [choice["finish_reason"] for choice in self._choices()]
        return next((reason for reason in reasons if reason), None)

    @property
    def error(self) -> str | None:
        """The code of an error event."""
        if self.data == "[DONE]":
            return None
        code: str | None = json.loads(self.data).get("error", {}).get("code")
        return code

    def _choices(self) -> list[dict[str, Any]]:
        if self.data == "[DONE]":
            return []
        found: list[dict[str, Any]] = json.loads(self.data).get("choices", [])
        return found


async def events(reply: Reply) -> AsyncIterator[SseEvent]:
    """Whole events only: what was cut off is not the client's. Raises Broken."""
    buffer = b""
    async for piece in reply.pieces():
        buffer += piece
        while b"\n\n" in buffer:
            block, buffer = buffer.split(b"\n\n", 1)
            lines = [line for line in block.split(b"\n") if not line.startswith(b":")]
            fields = dict(line.decode().split(": ", 1) for line in lines)
            raw = b"\n".join(lines) + b"\n\n"
            yield SseEvent(raw, fields.get("id"), fields["data"], time.monotonic())


@dataclass
class Transcript:
    """All that one client got for one request, over all its connections."""

    body: dict[str, Any]
    call_id: str | None = None
    events: list[SseEvent] = field(default_factory=list)
    connections: int = 0
    refusals: list[int] = field(default_factory=list)  # statuses that were not 200

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event.tokens]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def raw(self) -> bytes:
        return b"".join(event.raw for event in self.events)

    @property
    def finish_reason(self) -> str | None:
        return next((event.finish_reason for event in self.events if event.finish_reason), None)

    @property
    def error(self) -> str | None:
        return self.events[-1].error if self.events else None

    @property
    def last_id(self) -> str | None:
        return next((event.id for event in reversed(self.events) if event.id), None)

    @property
    def ended(self) -> bool:
        return bool(self.events) and (
            self.events[-1].data == "[DONE]" or self.events[-1].error is not None
        )

    def came_at(self, index: int) -> float:
        """When a token came, on the monotonic clock."""
        count = 0
        for event in self.events:
            count += len(event.tokens)
            if count > index:
                return event.at
        raise IndexError(index)


class Client:
    """`addresses` are the API replicas that a load balancer would choose from now."""

    def __init__(self, addresses: Callable[[], Sequence[Address]]) -> None:
        self._addresses = addresses
        self._turn = 0

    async def stream(
        self,
        body: dict[str, Any],
        *,
        into: Transcript | None = None,
        patience: float = PATIENCE,
        **headers: str,
    ) -> Transcript:
        """Follows one request to its end, by whatever replicas there are."""
        transcript = into or Transcript(body)
        key = {"idempotency-key": f"key-{id(transcript)}-{time.time_ns()}"}
        fields = {"x-quire-event-ids": "1", **key}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        async with asyncio.timeout(patience):
            while not transcript.ended:
                try:
                    await self._connect(transcript, fields)
                except Broken:
                    await asyncio.sleep(0.05)
        return transcript

    async def _connect(self, transcript: Transcript, headers: dict[str, str]) -> None:
        address = self.next_address()
        if transcript.call_id is None:
            opening = call(
                address, "POST", "/v1/completions", body=transcript.body, headers=headers
            )
        else:
            # What came after the last event with an id comes again.
            while transcript.events and transcript.events[-1].id is None:
                transcript.events.pop()
            last = transcript.last_id
            fields = {} if last is None else {"last-event-id": last}
            opening = call(address, "GET", f"/v1/streams/{transcript.call_id}", headers=fields)
        transcript.connections += 1
        async with opening as reply:
            if reply.status != 200:
                transcript.refusals.append(reply.status)
                if reply.status == 503:
                    await asyncio.sleep(min(1.0, float(reply.headers["retry-after"])))
                    return
                raise AssertionError(f"{reply.status}: {(await reply.body()).decode()}")
            transcript.call_id = reply.headers["x-request-id"]
            async for event in events(reply):
                if event.error == "shutting_down":  # of the replica, not of the request
                    raise Broken
                transcript.events.append(event)
        if not transcript.ended:
            raise Broken

    def next_address(self) -> Address:
        """Round robin. Raises Broken where there is none."""
        addresses = self._addresses()
        if not addresses:
            raise Broken
        self._turn += 1
        return addresses[self._turn % len(addresses)]

    async def replay(self, call_id: str, *, after: str | None = None) -> list[SseEvent]:
        """An answer from the start or after an event, as any replica gives it."""
        headers = {} if after is None else {"last-event-id": after}
        async with call(
            self.next_address(), "GET", f"/v1/streams/{call_id}", headers=headers
        ) as reply:
            assert reply.status == 200, await reply.body()
            return [event async for event in events(reply)]
