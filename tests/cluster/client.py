"""A client that keeps everything it receives, reconnects and resumes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtest.sse import DONE, Address, Broken, SseEvent, call

PATIENCE = 60.0  # seconds after which a client gives up, whatever happens


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
            self.events[-1].data == DONE or self.events[-1].error is not None
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
            async for event in reply.events():
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
            return [event async for event in reply.events()]
