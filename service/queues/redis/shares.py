"""Shares: the limits of a sharded queue hold in total, although each shard admits on its own.

Each shard has an equal share of every limit, and admits what fits into its own. If something does
not fit, or a key has a limit on tokens per minute, the others are asked: they lend what they do
not use, one after the other for the same tenant. The sum of all shares never exceeds the limit: a
part is first taken from a lender and then given to the borrower. If the process dies in between,
that part is missing until `mend`.

Tokens per minute are meters with an equal share of the rate. What does not fit into one is counted
in others, and a refusal first evens out what they have counted, so that they drain together.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter as Counts
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from service.errors import Unavailable
from service.messages import Allowance, Submission
from service.queues.admission import MINUTE, Meter, RateUsage, stored_bytes, submission_cost
from service.queues.contract import QueueLimits, SubmitReply, SubmitStatus
from service.queues.redis.fanout import FanOut
from service.queues.redis.keys import shard_of
from service.queues.redis.queue import RedisQueue

STORAGE = {SubmitStatus.STORAGE, SubmitStatus.TENANT_STORAGE}
LIMITED = {SubmitStatus.FULL, SubmitStatus.TENANT, SubmitStatus.RATE} | STORAGE
LOCKS = 64
"""Tenants that may be looked after at a time."""
ROUNDING = 0.002
"""Tokens: what a shard replies has three decimals."""
MEND_AFTER = 60.0
"""Seconds after which a part that no shard has counts as lost: longer than any loan takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """What a limit counts: `field` of a hash, and `name`, its field in the hash of loans."""

    name: str
    field: str
    limit: int
    needed: int  # by the submission
    stored: bool = False  # bytes

    def of(self, shard: int, shards: int, *, amount: int) -> dict[str, Any]:
        """As `lend.lua` expects it."""
        return {
            "name": self.name,
            "stored": self.stored,
            "field": self.field,
            "most": share(self.limit, shard, shards),
            "amount": amount,
        }


@dataclass(frozen=True, slots=True)
class Level:
    """What a shard uses of its share, and what it has lent."""

    used: int
    lent: int


def share(limit: int, shard: int, shards: int) -> int:
    """A shard's part of a limit; the parts add up to it."""
    return limit // shards + (shard < limit % shards)


def share_limits(limits: QueueLimits, shard: int, shards: int) -> QueueLimits:
    """The limits of one shard."""
    return replace(
        limits,
        max_requests=share(limits.max_requests, shard, shards),
        max_tokens=share(limits.max_tokens, shard, shards),
        max_per_tenant=share(limits.max_per_tenant, shard, shards),
        max_bytes=share(limits.max_bytes, shard, shards),
        max_tenant_bytes=share(limits.max_tenant_bytes, shard, shards),
    )


class Shares:
    """Submits to a shard, within the limits of all."""

    def __init__(self, limits: QueueLimits, shards: Sequence[RedisQueue], fan_out: FanOut) -> None:
        self._limits = limits
        self._shards = shards
        self._count = len(shards)
        self._fan_out = fan_out
        self._locks = [asyncio.Lock() for _ in range(LOCKS)]
        self._missing: dict[str, tuple[list[int], float]] = {}  # loans, and since when they stand

    async def submit(self, submission: Submission) -> SubmitReply:
        """See `Queue.submit`."""
        shard = shard_of(submission.id, shards=self._count)
        debt = await self._debt(shard, submission)
        part = self._part(submission, shard)
        reply = await self._shards[shard].submit(part, evict=False, debt=debt)
        if reply.status in LIMITED:
            async with self._locks[hash(submission.tenant) % LOCKS]:
                reply = await self._submit_again(shard, submission, reply)
        return await self._in_total(submission, reply)

    def _part(self, submission: Submission, shard: int) -> Submission:
        """The submission with the shard's share of its key's limits."""
        allowance = submission.allowance
        if allowance is None:
            return submission
        tokens, in_flight = allowance.tokens_per_minute, allowance.max_in_flight
        allowance = replace(
            allowance,
            tokens_per_minute=None if tokens is None else self._rate(tokens, shard),
            max_in_flight=None if in_flight is None else share(in_flight, shard, self._count),
        )
        return replace(submission, allowance=allowance)

    def _rate(self, limit: int, shard: int) -> int:
        return max(1, share(limit, shard, self._count))

    async def _submit_again(
        self, shard: int, submission: Submission, reply: SubmitReply
    ) -> SubmitReply:
        queue, part = self._shards[shard], self._part(submission, shard)
        counters = self._counters(submission)
        if await self._borrow(shard, counters):
            debt = await self._debt(shard, submission)
            reply = await queue.submit(part, evict=False, debt=debt)
        if reply.status is SubmitStatus.RATE:
            reply = await self._submit_prepaid(shard, submission, reply)
        if reply.status in STORAGE:
            debt = await self._debt(shard, submission)
            reply = await queue.submit(part, evict=True, debt=debt)
        if reply.status in STORAGE and await self._evict(shard, counters, submission.tenant):
            reply = await queue.submit(part, evict=True, debt=debt)
        return reply

    def _counters(self, submission: Submission) -> list[Counter]:
        limits, allowance = self._limits, submission.allowance
        tenant, count = f"t:{submission.tenant}", len(submission.requests)
        cost, size = submission_cost(submission), stored_bytes(submission)
        counters = [
            Counter(name=tenant, field=tenant, limit=limits.max_per_tenant, needed=count),
            Counter(name="q", field="q", limit=limits.max_requests, needed=count),
            Counter(name="tok", field="tok", limit=limits.max_tokens, needed=cost),
            Counter(
                name=f"b:{submission.tenant}",
                field=tenant,
                limit=limits.max_tenant_bytes,
                needed=size,
                stored=True,
            ),
            Counter(name="b", field="all", limit=limits.max_bytes, needed=size, stored=True),
        ]
        if allowance is not None and allowance.max_in_flight is not None:
            key = f"k:{allowance.key}"
            counters.append(
                Counter(name=key, field=key, limit=allowance.max_in_flight, needed=count)
            )
        return counters

    # --- limits ---------------------------------------------------------------------------
    async def _borrow(self, shard: int, counters: Sequence[Counter]) -> bool:
        """Lets other shards lend what this one lacks. Returns whether there was anything."""
        levels = await self._levels(counters)
        if shard not in levels:
            return False
        asked: dict[int, list[tuple[Counter, int]]] = {}
        for index, counter in enumerate(counters):
            of_shards = {k: found[index] for k, found in levels.items()}
            for lender, amount in self._amounts(shard, counter, of_shards).items():
                asked.setdefault(lender, []).append((counter, amount))
        got: Counts[str] = Counts()
        for amounts in (await self._lend(asked)).values():
            got.update(amounts)
        return await self._give(shard, counters, got)

    async def _evict(self, shard: int, counters: Sequence[Counter], tenant: str) -> bool:
        """Lets other shards, one after the other, evict kept submissions to lend what they took:
        of this tenant, or for the limit of all of any. Returns whether there was anything.
        """
        levels, got = await self._levels(counters), Counts[str]()
        for index, counter in enumerate(counters):
            if not counter.stored or counter.needed > counter.limit or shard not in levels:
                continue
            lacking = counter.needed - self._free(shard, counter, levels[shard][index])
            for lender in levels.keys() - {shard}:
                if lacking > 0:
                    asked = {lender: [(counter, lacking)]}
                    for amounts in (await self._lend(asked, evict=tenant)).values():
                        got.update(amounts)
                        lacking -= amounts[counter.name]
        return await self._give(shard, counters, got)

    async def _give(self, shard: int, counters: Sequence[Counter], got: Counts[str]) -> bool:
        given = [(each, -got[each.name]) for each in counters if got[each.name]]
        if given:
            await self._lend({shard: given})
        return bool(given)

    def _free(self, shard: int, counter: Counter, level: Level) -> int:
        return max(0, share(counter.limit, shard, self._count) - level.lent - level.used)

    def _amounts(self, shard: int, counter: Counter, levels: Mapping[int, Level]) -> dict[int, int]:
        """What each other shard should lend: enough, and so much that all have as much left. If
        all of it is not enough, then nothing or, if evictions can help, all of it.
        """
        free = {k: self._free(k, counter, level) for k, level in levels.items()}
        own = free.pop(shard)
        lacking, available = counter.needed - own, sum(free.values())
        if lacking <= 0 or counter.needed > counter.limit:
            return {}
        if lacking > available:
            return free if counter.stored else {}
        wanted = min(available, max(lacking, (own + available) // len(levels) - own))
        amounts = {k: min(part, -(-wanted * part // available)) for k, part in free.items()}
        return {k: amount for k, amount in amounts.items() if amount}

    async def _levels(self, counters: Sequence[Counter]) -> dict[int, list[Level]]:
        """Of the shards that answer, in the order of the counters."""
        fields = [(each.stored, each.field, each.name) for each in counters]
        replies = await self._fan_out.all(
            {k: partial(queue.lender.levels, fields) for k, queue in enumerate(self._shards)}
        )
        return {
            k: [Level(*pair) for pair in reply]
            for k, reply in replies.items()
            if not isinstance(reply, Unavailable)
        }

    async def _lend(
        self, asked: Mapping[int, Sequence[tuple[Counter, int]]], *, evict: str | None = None
    ) -> dict[int, dict[str, int]]:
        """What each shard lent, by the names of the counters."""
        replies = await self._fan_out.all(
            {
                k: partial(
                    self._shards[k].lender.lend,
                    nonce=secrets.token_hex(8),
                    limits=[each.of(k, self._count, amount=amount) for each, amount in parts],
                    evict=evict,
                )
                for k, parts in asked.items()
            }
        )
        return {
            k: {each.name: int(text) for (each, _), text in zip(asked[k], reply, strict=True)}
            for k, reply in replies.items()
            if not isinstance(reply, Unavailable)
        }

    async def mend(self) -> None:
        """Gives back what was taken from a lender by a process that died before it gave it to the
        borrower: loans of one limit that do not add up to zero and do not change.
        """
        replies = await self._fan_out.all(
            {k: queue.lender.loans for k, queue in enumerate(self._shards)}
        )
        tables = [reply for reply in replies.values() if not isinstance(reply, Unavailable)]
        if len(tables) < self._count:
            return
        now, seen = asyncio.get_running_loop().time(), self._missing
        names = {name for table in tables for name in table}
        loans = {name: [table.get(name, 0) for table in tables] for name in names}
        self._missing = {}
        for name, lent in loans.items():
            if sum(lent) <= 0:
                continue
            before, since = seen.get(name, (lent, now))
            self._missing[name] = (lent, since if before == lent else now)
            if now - self._missing[name][1] >= MEND_AFTER:
                await self._give_back(name, lent)

    async def _give_back(self, name: str, lent: Sequence[int]) -> None:
        """Replicas that do this at the same time use the same nonce, so it happens once."""
        lender = max(range(self._count), key=lambda k: lent[k])
        nonce = f"mend {name} {' '.join(map(str, lent))}"
        part = {"name": name, "stored": False, "field": name, "most": 0, "amount": -sum(lent)}
        await self._shards[lender].lender.lend(nonce=nonce, limits=[part])

    # --- tokens per minute ----------------------------------------------------------------
    async def _submit_prepaid(
        self, shard: int, submission: Submission, reply: SubmitReply
    ) -> SubmitReply:
        """Counts what does not fit into the shard's meter in those of others, if they have room."""
        allowance, cost = submission.allowance, submission_cost(submission)
        limit = None if allowance is None else allowance.tokens_per_minute
        if allowance is None or limit is None:
            return reply
        used = await self._used(allowance.key, limit)
        if shard not in used or sum(used.values()) + cost > limit + ROUNDING * self._count:
            await self._even_out(allowance.key, limit, used)
            return reply
        room = {k: max(0.0, self._rate(limit, k) - tokens) for k, tokens in used.items()}
        margin = ROUNDING + self._rate(limit, shard) * 0.002 / MINUTE  # of 2 ms
        rest = cost - min(cost, max(0.0, room.pop(shard) - margin))
        total = sum(room.values()) or 1.0
        amounts = {k: min(tokens, rest * tokens / total) for k, tokens in room.items() if tokens}
        paid = await self._count_tokens(allowance.key, limit, amounts)
        if sum(paid.values()) >= rest - ROUNDING * self._count:
            part = self._part(submission, shard)
            reply = await self._shards[shard].submit(part, evict=False, prepaid=rest)
            if reply.status is SubmitStatus.OK:
                return reply
        await self._count_tokens(allowance.key, limit, {k: -each for k, each in paid.items()})
        return reply

    async def _debt(self, shard: int, submission: Submission) -> float:
        """Tokens that other shards have counted for the key beyond their shares."""
        allowance = submission.allowance
        if allowance is None or allowance.tokens_per_minute is None:
            return 0.0
        limit = allowance.tokens_per_minute
        used = await self._used(allowance.key, limit)
        beyond = {k: max(0.0, tokens - self._rate(limit, k)) for k, tokens in used.items()}
        return sum(beyond.values()) - beyond.get(shard, 0.0)

    async def _even_out(self, key: str, limit: int, used: Mapping[int, float]) -> None:
        """Counts the same part of each shard's share: first more where there is less."""
        whole = sum(self._rate(limit, k) for k in used)
        level = sum(used.values()) / whole
        missing = {k: level * self._rate(limit, k) - tokens for k, tokens in used.items()}
        if max(abs(each) for each in missing.values()) > 0.05 * whole / len(used):
            more = {k: each for k, each in missing.items() if each > 0}
            done = sum((await self._count_tokens(key, limit, more)).values())
            less = {k: each for k, each in missing.items() if each < 0}
            part = done / (-sum(less.values()) or 1.0)
            await self._count_tokens(key, limit, {k: each * part for k, each in less.items()})

    async def _count_tokens(
        self, key: str, limit: int, amounts: Mapping[int, float]
    ) -> dict[int, float]:
        """The tokens that were counted: at most what fits; negative amounts are taken back."""
        replies = await self._fan_out.all(
            {
                k: partial(
                    self._shards[k].lender.lend,
                    nonce=secrets.token_hex(8),
                    meters=[{"key": key, "limit": self._rate(limit, k), "amount": amount}],
                )
                for k, amount in amounts.items()
            }
        )
        return {
            k: float(reply[0]) for k, reply in replies.items() if not isinstance(reply, Unavailable)
        }

    async def _used(self, key: str, limit: int) -> dict[int, float]:
        """The tokens that each shard's meter has counted."""
        replies = await self._fan_out.all(
            {k: partial(queue.lender.metered, key) for k, queue in enumerate(self._shards)}
        )
        return {
            k: seconds * self._rate(limit, k) / MINUTE
            for k, seconds in replies.items()
            if not isinstance(seconds, Unavailable)
        }

    async def _in_total(self, submission: Submission, reply: SubmitReply) -> SubmitReply:
        """The reply as of one queue: of all shards, if each has as much as this one."""
        if reply.status in LIMITED:
            reply = replace(
                reply,
                queued_requests=reply.queued_requests * self._count,
                queued_tokens=reply.queued_tokens * self._count,
            )
        allowance = submission.allowance
        if allowance is None or allowance.tokens_per_minute is None:
            return reply
        usage = await self._usage(allowance, allowance.tokens_per_minute, submission, reply.status)
        return replace(reply, usage=usage)

    async def _usage(
        self, allowance: Allowance, limit: int, submission: Submission, status: SubmitStatus
    ) -> RateUsage:
        tokens = sum((await self._used(allowance.key, limit)).values()) - ROUNDING * self._count
        used = max(0.0, tokens) * MINUTE / limit
        wait = 0.0
        if status is SubmitStatus.RATE:
            cost = submission_cost(submission)
            wait = max(0.001, used + cost * MINUTE / limit - MINUTE)
        return RateUsage(tokens=Meter(limit=limit, used=used), wait=wait)
