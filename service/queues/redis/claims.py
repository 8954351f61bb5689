"""Claimer: an engine's way to work. When to look for it, and what to make of what was handed out.

The claiming itself is one script. It is not sent twice on its own: where a reply was lost, the next
call asks with the same owner, and the script hands out again what it gave to that owner.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from service.errors import Unavailable
from service.messages import End, FinishReason, GenerationRequest
from service.queues.contract import (
    BLAME_KEPT,
    Claim,
    EngineInfo,
    Lease,
    QueueLimits,
    Write,
    WriteReply,
)
from service.queues.observer import QueueEvent, QueueObserver
from service.queues.redis.codec import decode_ids, encode_end
from service.queues.redis.connection import Command, Wire
from service.queues.redis.keys import ShardKeys, milliseconds
from service.queues.redis.pubsub import Wakeups, woken_within

CLAIM_AGAIN = 0.25
"""Seconds after which a waiting engine looks for work without having been woken."""
ORPHANS_EVERY = 0.5
"""Seconds between an engine's looks for requests whose lease is over; never over lease / 3."""

DEADLINE = encode_end(End(count=0, reason=FinishReason.DEADLINE))
CRASH_LOOP = encode_end(End(count=0, reason=FinishReason.ERROR, error="engine_crash_loop"))


class Claimer:
    """`dropped` is told of messages that are none; `write` ends requests that cannot be read."""

    def __init__(
        self,
        wire: Wire,
        wakeups: Wakeups,
        *,
        limits: QueueLimits,
        shards: Sequence[ShardKeys],
        observer: QueueObserver,
        dropped: Callable[[str, int], None],
        write: Callable[[Sequence[Write]], Awaitable[Sequence[WriteReply]]],
    ) -> None:
        self._wire = wire
        self._wakeups = wakeups
        self._limits = limits
        self._shards = shards
        self._observer = observer
        self._dropped = dropped
        self._write = write
        self._waiting: set[asyncio.Event] = set()
        self._unanswered: dict[tuple[str, int], str] = {}  # (engine, shard) -> owner
        self._next_orphans = 0.0  # loop time
        self._hold_until: float | None = None  # loop time; None before the first claim

    async def claim(
        self, engine: EngineInfo, *, limit: int, wait: float, under_served: int = 0
    ) -> Sequence[Claim]:
        """See `Queue.claim`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        news = asyncio.Event()
        self._waiting.add(news)
        for keys in self._shards:
            self._wakeups.watch(keys.work, self._work_came)
        try:
            while True:
                news.clear()
                claims = await self._claim_now(engine, limit=limit, under_served=under_served)
                left = until - loop.time()
                if claims or left <= 0:
                    return claims
                await woken_within(min(left, CLAIM_AGAIN), news)
        finally:
            self._waiting.discard(news)

    def _work_came(self, message: bytes) -> None:
        if message == b"released":
            self._next_orphans = 0.0
        for news in self._waiting:
            news.set()

    async def _claim_now(self, engine: EngineInfo, *, limit: int, under_served: int) -> list[Claim]:
        orphans = await self._may_take_orphans()
        claims: list[Claim] = []
        for keys in self._shards:
            room = (max(0, limit - len(claims)), limit + under_served - len(claims))
            owner, reply = await self._ask(keys, engine, room=room, orphans=orphans)
            found, reclaimed, dropped, overdue, crashed = reply
            for event, count in (
                (QueueEvent.RECLAIMED, reclaimed),
                (QueueEvent.EXPIRED, overdue),
                (QueueEvent.CRASHED, crashed),
            ):
                if count:
                    self._observer.happened(event, count)
            if dropped:
                self._dropped("entry of a queue", dropped)
            for fields in found:
                claim = await self._claim_of(fields, owner=owner)
                if claim is not None:
                    claims.append(claim)
        return claims

    async def _may_take_orphans(self) -> bool:
        """After an outage or a restart of Redis the owners get one lease to renew theirs first.

        Also not while the server is away: this very call may be the first to find it back.
        """
        now = asyncio.get_running_loop().time()
        if self._hold_until is None:
            (info,) = await self._wire.run([("INFO", "server")])
            self._hold_until = now + self._limits.lease - int(info["uptime_in_seconds"])
        restored = self._wire.restored_at
        if restored is not None:
            self._hold_until = max(self._hold_until, restored + self._limits.lease)
        if self._wire.away or now < max(self._hold_until, self._next_orphans):
            return False
        self._next_orphans = now + min(ORPHANS_EVERY, self._limits.lease / 3)
        return True

    async def _ask(
        self, keys: ShardKeys, engine: EngineInfo, *, room: tuple[int, int], orphans: bool
    ) -> tuple[str, list[Any]]:
        """The owner of what was claimed, and the script's reply."""
        place = (engine.id, keys.shard)
        unanswered = self._unanswered.pop(place, None)
        owner = unanswered or f"{engine.id}:{secrets.token_hex(6)}"
        command = self._command(
            keys, engine, owner, room=room, orphans=orphans, replay=unanswered is not None
        )
        answered = False
        try:
            (reply,) = await self._wire.run([command], attempts=1)
            answered = True
        finally:
            if not answered:  # failed or cancelled: the script may have run all the same
                self._unanswered[place] = owner
        return owner, reply

    def _command(
        self,
        keys: ShardKeys,
        engine: EngineInfo,
        owner: str,
        *,
        room: tuple[int, int],
        orphans: bool,
        replay: bool,
    ) -> Command:
        """`room` is for anybody, and with under_served."""
        limits = self._limits
        told = json.dumps(asdict(engine), separators=(",", ":"))
        numbers = (milliseconds(limits.lease), limits.max_attempts, int(orphans), int(replay))
        times = (milliseconds(limits.live_ttl), milliseconds(limits.resume_window))
        return self._wire.script(
            "claim",
            keys.admission,
            *(engine.id, owner, engine.numeric_class, room[0]),
            *numbers,
            *times,
            *(DEADLINE, CRASH_LOOP, told, room[1]),
            *(" ".join(engine.features), milliseconds(BLAME_KEPT)),
        )

    async def _claim_of(self, fields: list[Any], *, owner: str) -> Claim | None:
        """What the script handed out; None for what is no request and was ended for that."""
        request_id, epoch, deaths, remaining, waited, body, isolated_until, *values = fields
        lease = Lease(request_id.decode(), epoch, owner)
        ids: list[int] = []
        try:
            for value in values:
                ids += decode_ids(value)
            request = GenerationRequest.from_json(body)
        except (ValueError, TypeError, KeyError, AttributeError):
            self._dropped("stored request", 1)
            end = End(count=len(ids), reason=FinishReason.ERROR, error="malformed_request")
            with suppress(Unavailable):  # the lease runs out then, and the next claim ends it
                await self._write([Write(lease, end)])
                self._observer.happened(QueueEvent.MALFORMED)
            return None
        return Claim(
            lease=lease,
            request=request,
            tokens=tuple(ids),
            attempt=deaths + 1,
            remaining_ms=None if remaining == b"" else remaining,
            waited_ms=None if waited == b"" else waited,
            isolated_until=None if isolated_until == b"" else isolated_until,
        )
