"""A client that keeps everything it receives, reconnects and resumes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.bench.sse import DONE, Address, Broken, SseEvent, call

PATIENCE = 100.0  # seconds after which a client gives up, whatever happens


@dataclass
class Transcript:
    """Everything that a client received for one request, over all its connections."""

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
            self.events[-1].data == DONE or self.events[-1].error is not None
        )

    def arrival_of(self, index: int) -> float:
        """Arrival time of a token on the monotonic clock."""
        count = 0
        for event in self.events:
            count += len(event.tokens)
            if count > index:
                return event.at
        raise IndexError(index)


class Client:
    """`addresses` returns the API replicas of the load balancer."""

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
        """Reads one request to its end, resuming at other replicas if necessary."""
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
            # Events after the last one with an id are sent again.
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
            async for event in reply.events():
                if event.error == "shutting_down":  # concerns the replica, not the request
                    raise Broken
                transcript.events.append(event)
        if not transcript.ended:
            raise Broken

    def next_address(self) -> Address:
        """Round robin. Raises Broken if there is none."""
        addresses = self._addresses()
        if not addresses:
            raise Broken
        self._turn += 1
        return addresses[self._turn % len(addresses)]

    async def replay(self, call_id: str, *, after: str | None = None) -> list[SseEvent]:
        """The events of a response from the start, or after an event."""
        headers = {} if after is None else {"last-event-id": after}
        async with call(
            self.next_address(), "GET", f"/v1/streams/{call_id}", headers=headers
        ) as reply:
            assert reply.status == 200, await reply.body()
            return [event async for event in reply.events()]
