"""Claimer: claims work for an engine: when to look for it, and how to read what was handed out.

Claiming is one script. It is not retried: if a reply is lost, the next call has the same owner, and
the script hands out again what it gave to that owner.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from service.errors import Unavailable
from service.messages import End, FinishReason, GenerationRequest
from service.queues.contract import Claim, EngineInfo, Lease, Write, WriteReply
from service.queues.observer import QueueEvent, QueueObserver
from service.queues.redis.codec import decode_ids
from service.queues.redis.connection import RedisClient
from service.queues.redis.keys import ShardKeys
from service.queues.redis.pubsub import Wake, Wakeups, woken_within

CLAIM_AGAIN = 0.25
"""Seconds after which a waiting engine looks for work without having been woken."""
ORPHANS_EVERY = 0.5
"""Seconds between an engine's looks for requests whose lease is over; at most lease / 3."""


class Claimer:
    """`rules`: the limits that the scripts read, see `RedisQueue`. Calls `dropped` with malformed
    entries, and `write` to end requests that cannot be decoded. `lease` is in seconds.
    """

    def __init__(
        self,
        client: RedisClient,
        wakeups: Wakeups,
        *,
        lease: float,
        rules: Mapping[str, int],
        keys: ShardKeys,
        observer: QueueObserver,
        dropped: Callable[[str, int], None],
        write: Callable[[Sequence[Write]], Awaitable[Sequence[WriteReply]]],
    ) -> None:
        self._client = client
        self._wakeups = wakeups
        self._lease = lease
        self._rules = rules
        self._keys = keys
        self._observer = observer
        self._dropped = dropped
        self._write = write
        self._waiting: set[asyncio.Event] = set()
        self._unanswered: dict[str, str] = {}  # engine -> owner
        self._next_orphans = 0.0  # loop time
        self._hold_until: float | None = None  # loop time; None before the first claim

    async def claim(
        self, engine: EngineInfo, *, limit: int, wait: float, under_served: int
    ) -> Sequence[Claim]:
        """See `Queue.claim`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        woken = asyncio.Event()
        self._waiting.add(woken)
        self._wakeups.watch(self._keys.work, self._wake)
        try:
            while True:
                woken.clear()
                claims = await self._claim_now(engine, limit=limit, most=limit + under_served)
                left = until - loop.time()
                if claims or left <= 0:
                    return claims
                await woken_within(min(left, CLAIM_AGAIN), woken)
        finally:
            self._waiting.discard(woken)

    def watch(self, wake: Wake) -> None:
        """For good: calls `wake` whenever there may be something to claim."""
        self._wakeups.watch(self._keys.work, self._wake)
        self._wakeups.watch(self._keys.work, wake)

    def _wake(self, message: bytes) -> None:
        if message == b"released":
            self._next_orphans = 0.0
        for woken in self._waiting:
            woken.set()

    async def _claim_now(self, engine: EngineInfo, *, limit: int, most: int) -> list[Claim]:
        orphans = await self._may_take_orphans()
        owner, reply = await self._ask(engine, limit=limit, most=most, orphans=orphans)
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
        claims = [await self._claim_of(fields, owner=owner) for fields in found]
        return [claim for claim in claims if claim is not None]

    async def _may_take_orphans(self) -> bool:
        """After an outage or a restart of Redis the owners get one lease to renew theirs first.

        False also while the server is away: this very call may be the first to reach it again.
        """
        now = asyncio.get_running_loop().time()
        if self._hold_until is None:
            (info,) = await self._client.run([("INFO", "server")])
            self._hold_until = now + self._lease - int(info["uptime_in_seconds"])
        restored = self._client.restored_at
        if restored is not None:
            self._hold_until = max(self._hold_until, restored + self._lease)
        if self._client.away or now < max(self._hold_until, self._next_orphans):
            return False
        self._next_orphans = now + min(ORPHANS_EVERY, self._lease / 3)
        return True

    async def _ask(
        self, engine: EngineInfo, *, limit: int, most: int, orphans: bool
    ) -> tuple[str, list[Any]]:
        """The owner of what was claimed, and the script's reply."""
        unanswered = self._unanswered.pop(engine.id, None)
        owner = unanswered or f"{engine.id}:{secrets.token_hex(6)}"
        command = self._client.script(
            "claim",
            self._keys.admission,
            engine=engine.id,
            numeric_class=engine.numeric_class,
            features=engine.features,
            report=json.dumps(asdict(engine), separators=(",", ":")),
            owner=owner,
            replay=unanswered is not None,
            limit=limit,
            most=most,
            orphans=orphans,
            **self._rules,
        )
        answered = False
        try:
            (reply,) = await self._client.run([command], attempts=1)
            answered = True
        finally:
            if not answered:  # failed or cancelled: the script may have run nevertheless
                self._unanswered[engine.id] = owner
        return owner, reply

    async def _claim_of(self, fields: list[Any], *, owner: str) -> Claim | None:
        """A claim from the script's reply; None if it is malformed, and its request was ended."""
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
            with suppress(Unavailable):  # then the lease runs out, and the next claim ends it
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
