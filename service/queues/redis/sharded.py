"""ShardedQueue: one queue over several Redis shards, which do not know each other.

An id names its shard (see `service.queues.contract.slot_of`), so each call goes to one shard, and a
shard that is away stops only what it holds: calls about that raise `Unavailable`, writes get AWAY.
Priorities, the turns of tenants and isolation hold within a shard.

An engine is listed in every shard, and looks for work in some of them first, see `work`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

from service.errors import Unavailable
from service.messages import Allowance, FinishReason, Record, Submission
from service.queues.admission import RateUsage
from service.queues.contract import (
    Claim,
    EngineGroup,
    EngineInfo,
    Lease,
    Queue,
    QueueDepth,
    QueueLimits,
    StoredSubmission,
    SubmitReply,
    Write,
    WriteReply,
    WriteStatus,
)
from service.queues.observer import QueueObserver
from service.queues.redis.depth import sum_depths
from service.queues.redis.errors import ServerAway
from service.queues.redis.fanout import FanOut
from service.queues.redis.keys import shard_of
from service.queues.redis.queue import RedisQueue
from service.queues.redis.servers import Shard, shards_of
from service.queues.redis.shares import Shares, share_limits
from service.queues.redis.work import Work, ranked
from service.queues.usage import Usage, sum_usage
from service.queues.waiting import woken_within

logger = logging.getLogger(__name__)

T = TypeVar("T")


def open_redis(url: str, limits: QueueLimits, observer: QueueObserver | None = None) -> Queue:
    """The queue at a URL of Redis, see `servers`. Raises StartupError."""
    shards = shards_of(url)
    if len(shards) == 1:
        return RedisQueue(limits, shard=shards[0], observer=observer)
    return ShardedQueue(limits, shards=shards, observer=observer)


class ShardedQueue:
    """The contract is `service.queues.contract.Queue`, with the exceptions above."""

    shared = True

    def __init__(
        self, limits: QueueLimits, *, shards: Sequence[Shard], observer: QueueObserver | None = None
    ) -> None:
        self.limits = limits
        self._shards = tuple(
            RedisQueue(share_limits(limits, k, len(shards)), shard=shard, observer=observer)
            for k, shard in enumerate(shards)
        )
        self._fan_out = FanOut(lambda shard: self._shards[shard].check())
        self._shares = Shares(limits, self._shards, self._fan_out)
        self._renewed: dict[int, float] = {}  # shard -> loop time
        self._works: dict[str, Work] = {}  # by engine

    async def open(self) -> None:
        """Starts with the shards that are there; the others are served when they come. Raises
        StartupError if none is there, or one can never be used.
        """
        failures = await asyncio.gather(*map(_open, self._shards))
        away = {shard: error for shard, error in enumerate(failures) if error is not None}
        if len(away) == len(self._shards):
            raise away[0]
        for shard, error in away.items():
            self._fan_out.lost(shard)
            logger.warning("shard %d of %d is away: %s", shard + 1, len(self._shards), error)

    # --- the API's side -------------------------------------------------------------------
    async def charge(self, allowance: Allowance) -> RateUsage:
        """One shard counts all calls of a key; if it is away, the next one does."""
        return await self._by_name(allowance.key, lambda shard: partial(shard.charge, allowance))

    async def take_lease(self, name: str, owner: str, *, seconds: float) -> bool:
        """While its shard is away, the next one has the lease: there may be two owners."""
        return await self._by_name(
            name, lambda shard: partial(shard.take_lease, name, owner, seconds=seconds)
        )

    async def drop_lease(self, name: str, owner: str) -> None:
        await self._by_name(name, lambda shard: partial(shard.drop_lease, name, owner))

    async def submit(self, submission: Submission) -> SubmitReply:
        return await self._shares.submit(submission)

    async def lookup(self, submission_id: str) -> StoredSubmission | None:
        return await self._of(submission_id).lookup(submission_id)

    async def read_input(self, submission_id: str) -> str | None:
        return await self._of(submission_id).read_input(submission_id)

    async def touch(self, submission_ids: Sequence[str]) -> None:
        await self._by_shard(submission_ids, submission_ids, lambda shard: shard.touch)

    async def read(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        return await self._of(request_id).read(request_id, after=after)

    async def read_page(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        return await self._of(request_id).read_page(request_id, after=after)

    def follow(self, request_id: str, *, after: int = 0) -> AsyncIterator[Record]:
        return self._of(request_id).follow(request_id, after=after)

    async def stop(self, request_ids: Sequence[str], reason: FinishReason) -> None:
        await self._by_shard(
            request_ids, request_ids, lambda shard: partial(shard.stop, reason=reason)
        )

    async def heartbeat(self, submission_ids: Sequence[str]) -> None:
        await self._by_shard(submission_ids, submission_ids, lambda shard: shard.heartbeat)

    async def forget(self, submission_id: str) -> None:
        await self._of(submission_id).forget(submission_id)

    async def sweep(self) -> int:
        ended = sum(await self._of_all(lambda shard: shard.sweep))
        await self._shares.mend()
        return ended

    async def usage(self, days: Sequence[int]) -> Sequence[Usage]:
        """Raises Unavailable if a shard does not answer: the sums would be too small."""
        calls = {k: partial(shard.usage, days) for k, shard in enumerate(self._shards)}
        replies = (await self._fan_out.all(calls)).values()
        _raise_if_any(replies)
        return sum_usage(_heard(replies))

    async def depth(self) -> QueueDepth:
        """Of the shards that answer."""
        return sum_depths(await self._of_all(lambda shard: shard.depth))

    async def engines(self) -> Sequence[EngineInfo]:
        """The latest report of each."""
        reports = [each for found in await self._of_all(lambda s: s.reports) for each in found]
        reports.sort(key=lambda report: -report[0])
        return list({info.id: info for _, info in reports}.values())

    async def engine_groups(self) -> Sequence[EngineGroup]:
        """Of the shard that lists the most engines: each engine reports to all."""
        lists = await self._of_all(lambda shard: shard.engine_groups)
        return max(lists, key=lambda groups: sum(group.engines for group in groups))

    async def check(self) -> None:
        """Passes if one shard accepts writes: its answers go on."""
        await self._of_all(lambda shard: shard.check)

    # --- the engine's side ----------------------------------------------------------------
    async def hold(self, engine: str, prefixes: Collection[str]) -> None:
        """Only to shards with news: a call that sends nothing does not show that one is back."""
        replies = await self._fan_out.all(
            {
                index: partial(shard.hold, engine, prefixes)
                for index, shard in enumerate(self._shards)
                if shard.has_news(engine, prefixes)
            }
        )
        _raise_if_none(replies.values())

    async def claim(
        self, engine: EngineInfo, *, limit: int, wait: float, under_served: int = 0
    ) -> Sequence[Claim]:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        work = self._works.get(engine.id)
        if work is None:
            work = self._works[engine.id] = Work(self._shards, engine.id)
        if limit <= 0 and under_served <= 0:
            await self._of_all(lambda shard: partial(shard.claim, engine, limit=0, wait=0.0))
            return []
        if wait <= 0 < limit:
            work.look_everywhere()
        while True:
            if wait <= 0 or work.news.is_set() or loop.time() >= work.due:
                work.news.clear()
                claims, pause = await self._claim_now(
                    engine, work, limit=limit, under_served=under_served, waits=wait > 0
                )
                work.due = loop.time() + pause / work.num_own
                if claims:
                    return claims
                await self._report(engine, work)
            now = loop.time()
            if now >= until:
                return []
            await woken_within(min(until, work.due) - now, work.news)

    async def _claim_now(
        self, engine: EngineInfo, work: Work, *, limit: int, under_served: int, waits: bool
    ) -> tuple[list[Claim], float]:
        """From the shards that have work until the limit is reached; at least one is asked. Also
        returns the seconds after which each of them should be asked again.
        """
        claims: list[Claim] = []
        pauses: list[float] = []
        failure: Unavailable | None = None
        asked = False
        for shard, has_work in work.order():
            room = max(0, limit - len(claims))
            if asked and not (has_work and room):
                break
            if not self._fan_out.is_there(shard):
                continue
            try:
                look = await self._fan_out.one(
                    shard,
                    partial(
                        self._shards[shard].look,
                        engine,
                        limit=room,
                        under_served=0 if claims else under_served,
                        waits=waits and room > 0,
                    ),
                )
            except Unavailable as error:
                failure = error
                continue
            asked = True
            work.listed(shard)
            pauses.append(look.pause)
            if waits and room and not look.claims:
                work.waits_with(look.waiting)
            if room:
                has_more = len(look.claims) == room or look.free_in < float("inf")
                work.looked(shard, exhausted=not has_more)
            if look.claims:
                self._renewed[shard] = asyncio.get_running_loop().time()
            claims += look.claims
        if not asked:
            raise failure or Unavailable(
                "no shard of the journal's store answers", code="backend_unavailable"
            )
        return claims, min(pauses)

    async def _report(self, engine: EngineInfo, work: Work) -> None:
        """To the shards that have heard nothing of an engine for some time."""
        shards = [shard for shard in work.unlisted() if self._fan_out.is_there(shard)]
        if not shards:
            return
        replies = await self._fan_out.all(
            {
                shard: partial(self._shards[shard].claim, engine, limit=0, wait=0.0)
                for shard in shards
            }
        )
        for shard, reply in replies.items():
            if not isinstance(reply, Unavailable):
                work.listed(shard)

    async def write(self, writes: Sequence[Write]) -> Sequence[WriteReply]:
        """Never raises Unavailable: what a shard did not write has the reply AWAY or STORAGE."""
        groups = self._places(write.lease.request_id for write in writes)
        replies = await self._fan_out.all(
            {
                shard: partial(self._shards[shard].write, [writes[place] for place in places])
                for shard, places in groups.items()
            }
        )
        found: dict[int, WriteReply] = {}
        for shard, places in groups.items():
            reply = replies[shard]
            if isinstance(reply, Unavailable):
                full = reply.code == "storage_full"
                status = WriteStatus.STORAGE if full else WriteStatus.AWAY
                found |= dict.fromkeys(places, WriteReply(status, 0))
            else:
                found |= zip(places, reply, strict=True)
        return [found[place] for place in range(len(writes))]

    async def renew(self, leases: Sequence[Lease]) -> Sequence[str]:
        """Those of a shard that did not answer for a whole lease are lost, too."""
        groups = self._places(lease.request_id for lease in leases)
        now = asyncio.get_running_loop().time()
        replies = await self._fan_out.all(
            {
                shard: partial(self._shards[shard].renew, [leases[place] for place in places])
                for shard, places in groups.items()
            }
        )
        _raise_if_none(replies.values())
        lost: list[str] = []
        for shard, reply in replies.items():
            if not isinstance(reply, Unavailable):
                self._renewed[shard] = now
                lost += reply
            elif now - self._renewed.setdefault(shard, now) >= self.limits.lease:
                lost += [leases[place].request_id for place in groups[shard]]
        return lost

    async def release(self, leases: Sequence[Lease], *, died: bool = False) -> None:
        ids = [lease.request_id for lease in leases]
        await self._by_shard(ids, leases, lambda shard: partial(shard.release, died=died))

    async def stops(self) -> AsyncIterator[str]:
        hints: asyncio.Queue[str] = asyncio.Queue()

        async def collect(shard: RedisQueue) -> None:
            async with aclosing(shard.stops()) as stops:  # type: ignore[type-var]  # a generator
                async for request_id in stops:
                    hints.put_nowait(request_id)

        tasks = [asyncio.create_task(collect(shard)) for shard in self._shards]
        try:
            while True:
                yield await hints.get()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        await self._fan_out.close()
        await asyncio.gather(*(shard.close() for shard in self._shards))

    # --- both sides -----------------------------------------------------------------------
    def _of(self, identifier: str) -> RedisQueue:
        return self._shards[shard_of(identifier, shards=len(self._shards))]

    def _places(self, ids: Iterable[str]) -> dict[int, list[int]]:
        """Shard -> the places of the ids that name it."""
        groups: dict[int, list[int]] = {}
        for place, identifier in enumerate(ids):
            shard = shard_of(identifier, shards=len(self._shards))
            groups.setdefault(shard, []).append(place)
        return groups

    async def _by_shard(
        self,
        ids: Sequence[str],
        items: Sequence[T],
        method: Callable[[RedisQueue], Callable[[Sequence[T]], Coroutine[Any, Any, None]]],
    ) -> None:
        """Calls a method of each shard with the items of the ids that name it. Raises Unavailable
        if one of them failed, after the others.
        """
        groups = self._places(ids)
        replies = await self._fan_out.all(
            {
                shard: partial(method(self._shards[shard]), [items[place] for place in places])
                for shard, places in groups.items()
            }
        )
        _raise_if_any(replies.values())

    async def _by_name(
        self, name: str, method: Callable[[RedisQueue], Callable[[], Coroutine[Any, Any, T]]]
    ) -> T:
        """Calls the first shard in the order of a name that is there."""
        order = ranked(name, len(self._shards))
        there = [shard for shard in order if self._fan_out.is_there(shard)]
        for shard in there[:-1]:
            with suppress(Unavailable):
                return await self._fan_out.one(shard, method(self._shards[shard]))
        return await method(self._shards[(there or order)[-1]])()

    async def _of_all(
        self, method: Callable[[RedisQueue], Callable[[], Coroutine[Any, Any, T]]]
    ) -> list[T]:
        """The replies of the shards that answer. Raises Unavailable if none does."""
        calls = {index: method(shard) for index, shard in enumerate(self._shards)}
        return _heard((await self._fan_out.all(calls)).values())


async def _open(shard: RedisQueue) -> ServerAway | None:
    try:
        await shard.open()
    except ServerAway as error:
        return error
    return None


def _heard(replies: Collection[T | Unavailable]) -> list[T]:
    """The replies that came. Raises Unavailable if none did."""
    _raise_if_none(replies)
    return [reply for reply in replies if not isinstance(reply, Unavailable)]


def _raise_if_any(replies: Collection[object]) -> None:
    for failure in (reply for reply in replies if isinstance(reply, Unavailable)):
        raise failure


def _raise_if_none(replies: Collection[object]) -> None:
    """Raises the Unavailable of the first shard if all failed."""
    failures = [reply for reply in replies if isinstance(reply, Unavailable)]
    if failures and len(failures) == len(replies):
        raise failures[0]
