"""Claimer: claims work for an engine: when to look for it, and how to read what was handed out.

An engine that waits asks a cheap script first. Claiming is one script, too. It is not retried: if a
reply is lost, the next call has the same owner, and the script hands out again what it gave to that
owner.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from service.errors import Unavailable
from service.messages import End, FinishReason, GenerationRequest
from service.queues.contract import Claim, EngineInfo, Lease, Write, WriteReply
from service.queues.observer import QueueEvent, QueueObserver
from service.queues.redis.codec import decode_ids
from service.queues.redis.connection import Command, RedisClient
from service.queues.redis.keys import ShardKeys, milliseconds
from service.queues.redis.mailbox import Mailbox
from service.queues.redis.registry import encode_report
from service.queues.waiting import woken_within

LOOK_AGAIN = 0.5
"""Seconds after which a waiting engine looks for work without having been woken; at most lease / 3.
A lost wake-up delays a request by so much."""
LOOKS_PER_SECOND = 200
"""Of all waiting engines of a kind together: if there are many, each looks less often."""
LONGEST_PAUSE = 2.5
"""Seconds between two looks of an engine, which are its heartbeats, too."""
WAITS = 5.0
"""Seconds for which an engine that waits may be woken."""
ORPHANS_EVERY = 0.25
"""Seconds between the looks of all engines of a kind for requests whose lease is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What an engine found. If it waits, it should look again after `pause` seconds."""

    claims: Sequence[Claim] = ()
    pause: float
    waiting: int  # engines of its kind that wait; 0: it does not
    free_in: float = float("inf")  # seconds until a request that was left to others is free


@dataclass(slots=True)
class _Turn:
    """When an engine looks for work next: at `due` (loop time), or when it is woken."""

    due: float = 0.0
    woken: asyncio.Event = field(default_factory=asyncio.Event)


class Claimer:
    """`rules`: the limits that the scripts read, see `RedisQueue`. Calls `dropped` with malformed
    entries, and `write` to end requests that cannot be decoded. `lease` is in seconds.
    """

    def __init__(
        self,
        client: RedisClient,
        mailbox: Mailbox,
        *,
        lease: float,
        rules: Mapping[str, int],
        keys: ShardKeys,
        observer: QueueObserver,
        dropped: Callable[[str, int], None],
        write: Callable[[Sequence[Write]], Awaitable[Sequence[WriteReply]]],
    ) -> None:
        self._client = client
        self._mailbox = mailbox
        self._lease = lease
        self._rules = rules
        self._keys = keys
        self._observer = observer
        self._dropped = dropped
        self._write = write
        self._turns: dict[str, _Turn] = {}  # by engine
        self._unanswered: dict[str, str] = {}  # engine -> owner
        self._released = False  # requests were, since the last look for orphans
        self._hold_until: float | None = None  # loop time; None before the first claim

    async def claim(
        self, engine: EngineInfo, *, limit: int, wait: float, under_served: int
    ) -> Sequence[Claim]:
        """See `Queue.claim`. While it waits, nothing is sent before the engine's turn."""
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        turn = self._turns.setdefault(engine.id, _Turn())
        while True:
            if wait <= 0 or turn.woken.is_set() or loop.time() >= turn.due:
                look = await self.look(
                    engine, limit=limit, under_served=under_served, waits=wait > 0 and limit > 0
                )
                turn.due = loop.time() + look.pause
                if look.claims:
                    return look.claims
            now = loop.time()
            if now >= until:
                return []
            await woken_within(min(until, turn.due) - now, turn.woken)

    async def look(self, engine: EngineInfo, *, limit: int, under_served: int, waits: bool) -> Look:
        """Claims what is there. If that is nothing and the engine `waits`, it can be woken."""
        turn = self._turns.setdefault(engine.id, _Turn())
        self._mailbox.watch(self._wake)
        self._mailbox.subscribe(engine.id)
        turn.due = 0.0  # at once, if there is no reply
        orphans = await self._orphans_pause()
        if waits and not turn.woken.is_set() and engine.id not in self._unanswered:
            (waiting,) = await self._client.run(
                [self._command("poll", engine, orphans=orphans, waits=milliseconds(WAITS))],
                attempts=1,
            )
            if waiting > 0:
                return Look(pause=self._pause(waiting), waiting=waiting)
            orphans = 0 if waiting < 0 else orphans
        turn.woken.clear()
        owner, reply = await self._ask(
            engine, limit=limit, most=limit + under_served, orphans=orphans, waits=waits
        )
        found, reclaimed, dropped, overdue, crashed, free_in, waiting = reply
        free_in = float("inf") if free_in < 0 else (free_in + 1) / 1000
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
        return Look(
            claims=[claim for claim in claims if claim is not None],
            pause=min(self._pause(waiting), free_in),
            waiting=waiting,
            free_in=free_in,
        )

    def _pause(self, waiting: int) -> float:
        """Seconds to the next look of each of so many engines; 0 if none waits."""
        if not waiting:
            return 0.0
        pause = max(LOOK_AGAIN, min(LONGEST_PAUSE, waiting / LOOKS_PER_SECOND))
        return min(pause, self._lease / 3) * random.uniform(0.8, 1.0)

    def _wake(self, message: bytes) -> None:
        if message[:1] == b"s":
            return
        self._released |= message == b"r"
        for turn in self._turns.values():
            turn.woken.set()

    async def _orphans_pause(self) -> int | None:
        """Milliseconds between two looks for orphans; None: none now. After an outage or a restart
        of Redis the owners get one lease to renew theirs first.

        None also while the server is away: this very call may be the first to reach it again.
        """
        now = asyncio.get_running_loop().time()
        if self._hold_until is None:
            (info,) = await self._client.run([("INFO", "server")])
            self._hold_until = now + self._lease - int(info["uptime_in_seconds"])
        restored = self._client.restored_at
        if restored is not None:
            self._hold_until = max(self._hold_until, restored + self._lease)
        if self._client.away or now < self._hold_until:
            return None
        released, self._released = self._released, False
        return 0 if released else milliseconds(min(ORPHANS_EVERY, self._lease / 3))

    async def _ask(
        self, engine: EngineInfo, *, limit: int, most: int, orphans: int | None, waits: bool
    ) -> tuple[str, list[Any]]:
        """The owner of what was claimed, and the script's reply."""
        unanswered = self._unanswered.pop(engine.id, None)
        owner = unanswered or f"{engine.id}:{secrets.token_hex(6)}"
        command = self._command(
            "claim",
            engine,
            running=engine.running,
            owner=owner,
            replay=unanswered is not None,
            limit=limit,
            most=most,
            orphans=orphans,
            waits=milliseconds(WAITS) if waits else None,
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

    def _command(self, script: str, engine: EngineInfo, **arguments: object) -> Command:
        return self._client.script(
            script,
            self._keys.admission,
            engine=engine.id,
            kind="\n".join((engine.numeric_class, " ".join(sorted(engine.features)))),
            report=encode_report(engine),
            **arguments,
        )

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
