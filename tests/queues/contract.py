"""The queue contract: the same laws over every implementation.

A test class inherits `QueueContract` and gives two fixtures: `queue`, a new empty queue with
`LIMITS`, and `passes`, which lets so many seconds go by on the queue's clock.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from service.errors import NotFound, StreamDivergence, Unavailable
from service.messages import (
    Allowance,
    End,
    FinishReason,
    Record,
    Submission,
    TokenLogprob,
    Tokens,
    model_feature,
)
from service.queues.admission import (
    RateUsage,
    admission_cost,
    idempotency_bytes,
    kept_bytes,
    request_bytes,
    stored_bytes,
    token_bytes,
)
from service.queues.contract import (
    CLEARED_AFTER,
    ENGINE_SILENCE,
    FINAL_SILENCE,
    MAX_HOLDERS,
    OVERLOADED,
    PAGE_TOKENS,
    RESERVED_FOR,
    Claim,
    EngineInfo,
    Lease,
    ModelDepth,
    Queue,
    QueueDepth,
    QueueLimits,
    SubmitStatus,
    Write,
    WriteReply,
    WriteStatus,
)
from service.queues.usage import DAY
from tests.queues.builders import (
    answer_of,
    append,
    claim_one,
    count_stored,
    finish,
    ids_claimed,
    ids_of,
    make_engine,
    make_submission,
    make_tokens,
    stop_at,
)
from tests.support.waiting import PATIENCE

TENANTS = itertools.count()
LIMITS = QueueLimits(
    max_requests=6,
    max_tokens=100,
    max_per_tenant=4,
    lease=0.8,
    max_attempts=3,
    resume_window=1.0,
    live_ttl=60.0,
    sweep_pause=1.0,
    max_bytes=70_000,
    max_tenant_bytes=30_000,
    idempotency_ttl=1.2,
)
LARGE = "x" * 20_000
KEEP = 3.0
"""Seconds: more than the resume window."""
OVER = LIMITS.lease + 0.05
"""Seconds after which a lease that was not renewed is over."""
# Of what is submitted in one millisecond, none is the older one: tests let two pass between.

Passes = Callable[[float], Awaitable[None]]
NOTHING = QueueDepth(queued_requests=0, queued_tokens=0, running_requests=0)


class QueueContract:
    """Every law holds for every queue."""

    # --- admission ------------------------------------------------------------------------
    async def test_a_submission_is_stored_and_counted(self, queue: Queue) -> None:
        submission = make_submission(2)
        reply = await queue.submit(submission)
        assert (reply.status, reply.submission_id) == (SubmitStatus.OK, submission.id)
        cost = 2 * (3 + 16 // 4)
        assert (reply.queued_requests, reply.queued_tokens) == (2, cost)
        stored = await queue.lookup(submission.id)
        assert stored is not None
        assert (stored.tenant, stored.num_requests) == ("public", 2)
        assert stored.manifest == submission.manifest
        depth = QueueDepth(queued_requests=2, queued_tokens=cost, running_requests=0)
        assert await queue.depth() == depth
        assert await queue.lookup("s0-unknown") is None

    async def test_submitting_again_is_admitted_once(self, queue: Queue) -> None:
        submission = make_submission(key="k")
        await queue.submit(submission)
        for again in (submission, make_submission(key="k")):
            reply = await queue.submit(again)
            assert (reply.status, reply.submission_id) == (SubmitStatus.EXISTS, submission.id)
        other_body = await queue.submit(make_submission(key="k", fingerprint="other"))
        assert other_body.status is SubmitStatus.CONFLICT
        other_tenant = await queue.submit(make_submission(key="k", tenant="other"))
        assert other_tenant.status is SubmitStatus.OK
        assert (await queue.depth()).queued_requests == 2

    async def test_parallel_submissions_with_one_key_make_one(self, queue: Queue) -> None:
        replies = await asyncio.gather(*(queue.submit(make_submission(key="k")) for _ in range(8)))
        assert sorted(reply.status for reply in replies) == ["exists"] * 7 + ["ok"]
        assert len({reply.submission_id for reply in replies}) == 1

    async def test_limits_refuse_whole_submissions(self, queue: Queue) -> None:
        """Requests, tokens and the tenant's share: what does not fit wholly is not there at all."""
        assert (await queue.submit(make_submission(5))).status is SubmitStatus.TENANT
        for tenant, count in (("a", 4), ("b", 1)):
            await queue.submit(make_submission(count, tenant=tenant))
        full = make_submission(2, tenant="c", key="k")
        assert (await queue.submit(full)).status is SubmitStatus.FULL
        assert await queue.lookup(full.id) is None
        too_long = make_submission(tenant="c", prompt_ids=(1,) * 70)
        assert (await queue.submit(too_long)).status is SubmitStatus.FULL
        assert (await queue.depth()).queued_requests == 5
        assert (await queue.submit(make_submission(tenant="a"))).status is SubmitStatus.TENANT
        # A refusal leaves no trace of the key either.
        one = await queue.submit(make_submission(1, tenant="c", key="k", fingerprint="new"))
        assert one.status is SubmitStatus.OK

    async def test_running_requests_count_for_the_tenant_only(self, queue: Queue) -> None:
        await queue.submit(make_submission(4))
        claims = await queue.claim(make_engine(), limit=4, wait=0)
        expected = QueueDepth(queued_requests=0, queued_tokens=0, running_requests=4)
        assert await queue.depth() == expected
        assert (await queue.submit(make_submission())).status is SubmitStatus.TENANT
        await finish(queue, claims[0], length=1)
        assert (await queue.submit(make_submission())).status is SubmitStatus.OK

    async def test_each_model_counts_its_own(self, queue: Queue) -> None:
        """Queued requests, their tokens and running requests, until every way to end."""
        for model, count in (("a", 2), ("b", 1), ("", 1)):
            await queue.submit(make_submission(count, tenant=model or "c", model=model))
        cost = admission_cost(make_submission().requests[0])
        of_a = ModelDepth(queued_requests=2, queued_tokens=2 * cost)
        of_b = ModelDepth(queued_requests=1, queued_tokens=cost)
        assert (await queue.depth()).by_model == {"a": of_a, "b": of_b, "": of_b}
        grammar = make_submission(tenant="d", model="b", grammar="x")
        await queue.submit(grammar)
        of_b = ModelDepth(queued_requests=2, queued_tokens=2 * cost)
        assert (await queue.depth()).by_model["b"] == of_b, "whatever else it needs of an engine"
        await queue.stop([grammar.requests[0].id], FinishReason.CANCELLED)
        engine = make_engine(features=("model:a",))
        first, *others = await queue.claim(engine, limit=4, wait=0)
        assert {claim.request.model for claim in (first, *others)} == {"a", ""}
        depth = await queue.depth()
        one = ModelDepth(running_requests=1)
        of_b = ModelDepth(queued_requests=1, queued_tokens=cost)
        assert depth.by_model == {"a": ModelDepth(running_requests=2), "b": of_b, "": one}
        for claim in (first, *others):
            await finish(queue, claim, length=1)
        assert (await queue.depth()).by_model == {"b": of_b}

    # --- affinity -------------------------------------------------------------------------
    async def test_a_prefix_goes_to_the_engine_that_holds_it(
        self, queue: Queue, passes: Passes
    ) -> None:
        """Whoever asks first, while others get what is behind it; then to anyone."""
        holder, other = await self.holder_and_other(queue, held=["ab", "a"])
        first = await self.submit(queue, "abc", "ab")
        second = await self.submit(queue, "x")
        assert await ids_claimed(queue, other, limit=4) == [second]
        assert await ids_claimed(queue, holder, limit=4) == [first]
        third = await self.submit(queue, "a")
        assert await ids_claimed(queue, other) == []
        await passes(RESERVED_FOR + 0.01)
        assert await ids_claimed(queue, other) == [third]

    async def test_turns_and_priorities_are_older_than_prefixes(
        self, queue: Queue, passes: Passes
    ) -> None:
        """A holder takes what is first, not what it holds; so do all."""
        holder, other = await self.holder_and_other(queue, held=["a"])
        last = await self.submit(queue, "a", priority=2)
        early = await self.submit(queue)
        await passes(0.002)
        late = await self.submit(queue, "a")
        first = await self.submit(queue, "x", priority=0)
        assert await ids_claimed(queue, holder, limit=4) == [first, early, late, last]
        assert await ids_claimed(queue, other, limit=4) == []

    async def test_nothing_is_reserved_for_an_engine_that_is_gone(
        self, queue: Queue, passes: Passes
    ) -> None:
        """Not listed any more, or it dropped the prefix, or never was there."""
        holder, other = await self.holder_and_other(queue, held=["a"])
        await queue.hold("never", ["b"])
        unknown = await self.submit(queue, "b")
        assert await ids_claimed(queue, other) == [unknown]
        await queue.hold(holder.id, ["c"])
        dropped = await self.submit(queue, "a")
        assert await ids_claimed(queue, other) == [dropped]
        await passes(ENGINE_SILENCE + 0.01)
        await queue.claim(other, limit=0, wait=0)
        silent = await self.submit(queue, "c")
        assert silent in await ids_claimed(queue, other, limit=3)

    async def test_a_reservation_ends_with_its_request_or_its_holder(self, queue: Queue) -> None:
        holder, other = await self.holder_and_other(queue, held=["a"])
        cancelled = await self.submit(queue, "a")
        await queue.stop([cancelled], FinishReason.CANCELLED)
        freed = await self.submit(queue, "a")
        await queue.hold(holder.id, [])
        assert await ids_claimed(queue, other) == [freed]
        assert await ids_claimed(queue, holder) == []

    async def test_the_only_engine_waits_for_nothing(self, queue: Queue) -> None:
        """Not even for one that held a prefix under another id before it was restarted."""
        only = make_engine("only")
        await queue.claim(only, limit=0, wait=0)
        await queue.hold("before", ["a"])
        submitted = await self.submit(queue, "a")
        assert await ids_claimed(queue, only) == [submitted]

    async def test_many_holders_and_one_with_much_work_reserve_nothing(self, queue: Queue) -> None:
        holder, other = await self.holder_and_other(queue, held=["a"], running=OVERLOADED + 1)
        free = await self.submit(queue, "a")
        assert await ids_claimed(queue, other) == [free]
        await queue.claim(replace(holder, running=OVERLOADED), limit=0, wait=0)
        reserved = await self.submit(queue, "a")
        assert await ids_claimed(queue, other) == []
        assert await ids_claimed(queue, holder) == [reserved]
        for number in range(MAX_HOLDERS):
            await queue.claim(make_engine(f"{number}"), limit=0, wait=0)
            await queue.hold(f"{number}", ["a"])
        common = await self.submit(queue, "a")
        assert await ids_claimed(queue, other) == [common]

    async def test_a_waiting_engine_gets_what_is_not_claimed_in_time(
        self, queue: Queue, passes: Passes
    ) -> None:
        _, other = await self.holder_and_other(queue, held=["a"])
        submitted = await self.submit(queue, "a")
        claiming = asyncio.create_task(queue.claim(other, limit=1, wait=PATIENCE))
        await asyncio.sleep(0)
        await passes(RESERVED_FOR + 0.01)
        async with asyncio.timeout(PATIENCE / 2):
            (claim,) = await claiming
        assert claim.request.id == submitted

    @staticmethod
    async def holder_and_other(
        queue: Queue, *, held: Sequence[str], running: int = 0
    ) -> tuple[EngineInfo, EngineInfo]:
        """Two engines that the queue knows; the first one holds prefixes."""
        holder, other = make_engine("holder", running=running), make_engine("other")
        for engine in (holder, other):
            assert await queue.claim(engine, limit=0, wait=0) == []
        await queue.hold(holder.id, held)
        return holder, other

    @staticmethod
    async def submit(queue: Queue, *prefixes: str, **fields: Any) -> str:
        """The id of a new request, of a tenant of its own."""
        tenant = f"t{next(TENANTS)}"
        submission = replace(make_submission(tenant=tenant, **fields), prefixes=(prefixes,))
        assert (await queue.submit(submission)).status is SubmitStatus.OK
        return submission.requests[0].id

    # --- what a key may use ---------------------------------------------------------------
    async def test_requests_a_minute(self, queue: Queue) -> None:
        """A minute's limit may come at once; then one each share of a minute."""
        allowance = Allowance(key="a", requests_per_minute=2, tokens_per_minute=100)
        for remaining, refused in ((1, False), (0, False), (0, True), (0, True)):
            usage = await queue.charge(allowance)
            assert usage.requests is not None
            assert usage.tokens is None
            assert (usage.requests.limit, usage.requests.remaining) == (2, remaining)
            assert 30 * (2 - remaining) - 5 < usage.requests.reset <= 30 * (2 - remaining)
            if refused:
                assert 25 < usage.wait <= 30, "what is refused is not counted"
            else:
                assert usage.wait == 0
        submitted = await queue.submit(make_submission(allowance=allowance))
        assert submitted.status is SubmitStatus.OK, "a submission is no second call"
        assert (await queue.charge(Allowance(key="b", requests_per_minute=1))).wait == 0
        assert await queue.charge(Allowance(key="c")) == RateUsage()
        unlimited = make_submission(allowance=Allowance(key="c"))
        assert (await queue.submit(unlimited)).usage == RateUsage()

    async def test_calls_come_back_one_by_one(self, queue: Queue, passes: Passes) -> None:
        allowance = Allowance(key="a", requests_per_minute=60)
        calls = 0
        while not (wait := (await queue.charge(allowance)).wait):
            calls += 1
        assert 60 <= calls < 100, "some may have come back meanwhile"
        assert wait <= 1
        await passes(wait + 0.01)
        assert (await queue.charge(allowance)).wait == 0

    # --- usage ----------------------------------------------------------------------------
    async def test_usage_counts_each_request_once(self, queue: Queue) -> None:
        """Failovers, repeated ends and a request that never ran change nothing."""
        never = make_submission(1)
        await queue.submit(never)
        await queue.stop([never.requests[0].id], FinishReason.CANCELLED)
        keyed = make_submission(2, allowance=Allowance(key="k"))
        await queue.submit(replace(keyed, model="a b"))
        await queue.submit(replace(make_submission(1), model="a b"))
        dropped = await claim_one(queue, make_engine("one"))
        await append(queue, dropped.lease, answer_of(dropped.request.id, 0, 2))
        await queue.release([dropped.lease])
        claims: list[Claim] = []
        while len(claims) < 3:
            claims += await queue.claim(make_engine("two"), limit=3, wait=PATIENCE)
        for claim in claims:
            await finish(queue, claim, length=5)
        for claim in (*claims, dropped):  # replies that were lost, a lease that was
            await queue.write([Write(claim.lease, stop_at(5))])
        today = int(time.time()) // DAY
        rows = await queue.usage(range(today - 2, today + 3))
        assert {(row.tenant, row.key, row.model) for row in rows} == {
            ("public", "k", "a b"),
            ("public", "-", "a b"),
        }
        for key, num_requests in (("k", 2), ("-", 1)):
            own = [row for row in rows if row.key == key]  # two rows if a day ended meanwhile
            assert sum(row.requests for row in own) == num_requests
            assert sum(row.prompt_tokens for row in own) == 3  # of the first choice
            assert sum(row.generated_tokens for row in own) == 5 * num_requests
        assert await queue.usage([today + 3]) == []

    # --- named leases ---------------------------------------------------------------------
    async def test_a_lease_has_one_owner_until_it_ends(self, queue: Queue, passes: Passes) -> None:
        assert await queue.take_lease("a", "one", seconds=LIMITS.lease)
        assert not await queue.take_lease("a", "two", seconds=LIMITS.lease)
        assert await queue.take_lease("b", "two", seconds=60.0)
        assert await queue.take_lease("a", "one", seconds=LIMITS.lease)  # extended
        await passes(OVER)
        assert await queue.take_lease("a", "two", seconds=60.0)
        assert not await queue.take_lease("a", "one", seconds=60.0)
        assert not await queue.take_lease("b", "one", seconds=60.0)

    async def test_a_lease_is_dropped_by_its_owner_only(self, queue: Queue) -> None:
        assert await queue.take_lease("a", "one", seconds=60.0)
        await queue.drop_lease("a", "two")
        assert not await queue.take_lease("a", "two", seconds=60.0)
        await queue.drop_lease("a", "one")
        await queue.drop_lease("a", "one")
        assert await queue.take_lease("a", "two", seconds=60.0)

    async def test_a_minute_comes_back_bit_by_bit(self, queue: Queue, passes: Passes) -> None:
        allowance = Allowance(key="a", tokens_per_minute=90)
        large = make_submission(allowance=allowance, prompt_ids=(1,) * 85)
        small = make_submission(allowance=allowance, prompt_ids=(1,), max_tokens=4)
        assert (await queue.submit(large)).status is SubmitStatus.OK
        reply = await queue.submit(small)
        assert reply.status is SubmitStatus.RATE
        assert 0 < reply.usage.wait <= 60 / 90
        await passes(reply.usage.wait + 0.01)
        assert (await queue.submit(small)).status is SubmitStatus.OK
        too_large = make_submission(allowance=allowance, prompt_ids=(1,) * 91)
        assert (await queue.submit(too_large)).status is SubmitStatus.RATE

    async def test_what_is_refused_is_not_counted(self, queue: Queue) -> None:
        allowance = Allowance(key="a", tokens_per_minute=600)
        too_many = make_submission(5, allowance=allowance)
        assert (await queue.submit(too_many)).status is SubmitStatus.TENANT
        too_long = make_submission(allowance=allowance, prompt_ids=(1,) * 101)
        assert (await queue.submit(too_long)).status is SubmitStatus.FULL
        usage = (await queue.submit(make_submission(2, allowance=allowance))).usage
        assert usage.tokens is not None
        assert usage.tokens.remaining == 600 - 2 * (3 + 16 // 4)

    async def test_tokens_are_settled_when_an_answer_ends(self, queue: Queue) -> None:
        """Admission counts a share of max_tokens; in the end it is what was generated."""
        allowance = Allowance(key="a", tokens_per_minute=60)

        async def left(submission: Submission) -> int:
            again = await queue.submit(submission)
            assert again.usage.tokens is not None
            return again.usage.tokens.remaining

        short, long = (make_submission(allowance=allowance) for _ in range(2))
        await queue.submit(short)
        await queue.submit(long)
        assert 60 - 2 * 7 <= await left(short) <= 60 - 2 * 7 + 2
        await queue.stop([short.requests[0].id], FinishReason.CANCELLED)
        assert 60 - 7 - 3 <= await left(short) <= 60 - 7 - 3 + 2
        await finish(queue, await claim_one(queue), length=40)
        assert 60 - 43 - 3 <= await left(long) <= 60 - 43 - 3 + 2
        await queue.submit(make_submission(allowance=allowance))
        await finish(queue, await claim_one(queue), length=100)
        reply = await queue.submit(make_submission(allowance=allowance))
        assert reply.status is SubmitStatus.RATE
        assert 80 < reply.usage.wait < 100, "a debt is paid, too"

    async def test_requests_in_flight_of_a_key(self, queue: Queue) -> None:
        """A key's own limit, within its tenant's."""
        few, more = Allowance(key="a", max_in_flight=2), Allowance(key="b", max_in_flight=9)
        running = make_submission(2, allowance=few)
        assert (await queue.submit(running)).status is SubmitStatus.OK
        await queue.claim(make_engine(), limit=2, wait=0)
        assert (await queue.submit(make_submission(allowance=few))).status is SubmitStatus.TENANT
        assert (await queue.submit(make_submission(2, allowance=more))).status is SubmitStatus.OK
        assert (await queue.submit(make_submission(allowance=more))).status is SubmitStatus.TENANT
        await queue.stop([running.requests[0].id], FinishReason.CANCELLED)
        assert (await queue.submit(make_submission(2, allowance=few))).status is SubmitStatus.TENANT
        assert (await queue.submit(make_submission(allowance=few))).status is SubmitStatus.OK

    # --- what is stored -------------------------------------------------------------------
    async def test_stored_bytes_are_bounded_for_each_tenant_and_in_all(self, queue: Queue) -> None:
        """In the manifest or in a body; and what is refused is neither stored nor counted."""
        kept = [make_submission(tenant=name, manifest=LARGE) for name in "abc"]
        for submission in kept:
            assert (await queue.submit(submission)).status is SubmitStatus.OK
        depth = await queue.depth()
        assert depth.stored_bytes == sum(map(stored_bytes, kept)) > 3 * len(LARGE)
        for fields in ({"manifest": LARGE}, {"grammar": LARGE}, {"stop": (LARGE,)}):
            refused = make_submission(tenant="a", key="k", **fields)
            assert (await queue.submit(refused)).status is SubmitStatus.TENANT_STORAGE
            assert await queue.lookup(refused.id) is None
        many = make_submission(4, tenant="d", grammar=LARGE)
        assert (await queue.submit(many)).status is SubmitStatus.TENANT_STORAGE
        ids = make_submission(tenant="d", prompt_ids=(1,) * 2000, max_tokens=1)
        assert (await queue.submit(ids)).status is SubmitStatus.FULL
        last = make_submission(tenant="d", manifest=LARGE)
        assert (await queue.submit(last)).status is SubmitStatus.STORAGE
        assert (await queue.depth()).stored_bytes == depth.stored_bytes
        small = make_submission(tenant="d", key="k")
        assert (await queue.submit(small)).status is SubmitStatus.OK
        counted, again = await count_stored(queue, [*kept, refused, many, ids, last, small])
        assert counted == again == {s.tenant: stored_bytes(s) for s in (*kept, small)}

    async def test_bytes_are_counted_until_they_are_gone(
        self, queue: Queue, passes: Passes
    ) -> None:
        """A body to its request's end, the rest to the end of the resume window."""
        submission = make_submission(2, tenant="a", grammar="x" * 9000, key="k", manifest=LARGE[:9])
        body = request_bytes(submission.requests[0])
        assert 9000 < body < 11_000
        await queue.submit(submission)
        sizes = [(await queue.depth()).stored_bytes]
        for claim in await queue.claim(make_engine(), limit=2, wait=0):
            await finish(queue, claim, length=2)
            sizes.append((await queue.depth()).stored_bytes)
        assert sizes == [stored_bytes(submission) - ended * body for ended in range(3)]
        await queue.sweep()
        size = (await queue.depth()).stored_bytes
        if await queue.lookup(submission.id) is not None:  # else this machine is slow
            assert size >= kept_bytes(submission), "it can still be read"
        await passes(LIMITS.resume_window + 0.05)
        await queue.sweep()
        assert (await queue.depth()).stored_bytes == idempotency_bytes(submission)
        assert await queue.lookup(submission.id) is None
        await passes(LIMITS.idempotency_ttl)
        await queue.sweep()
        assert (await queue.depth()).stored_bytes == 0
        assert await count_stored(queue, [submission]) == ({}, {})

    async def test_an_idempotency_key_that_comes_again_is_counted_once(
        self, queue: Queue, passes: Passes
    ) -> None:
        """Also if its record is over and nothing was swept since."""
        first, second = (make_submission(key="k", fingerprint=name) for name in "ab")
        await queue.submit(first)
        await finish(queue, await claim_one(queue), length=1)
        await passes(LIMITS.idempotency_ttl + 0.05)
        assert (await queue.submit(second)).status is SubmitStatus.OK
        counted, again = await count_stored(queue, [first, second])
        assert counted == again
        await queue.stop([second.requests[0].id], FinishReason.CANCELLED)
        await passes(LIMITS.idempotency_ttl + 0.05)
        await queue.sweep()
        assert await count_stored(queue, [first, second]) == ({}, {})

    async def test_every_way_to_end_gives_the_bytes_back(
        self, queue: Queue, passes: Passes
    ) -> None:
        stopped, abandoned, forgotten, late = (
            make_submission(tenant=name, manifest=LARGE[:999], **fields)
            for name, fields in (
                ("a", {}), ("b", {"grace": 0.1}), ("c", {}), ("d", {"timeout_ms": 100}),
            )
        )  # fmt: skip
        everything = [stopped, abandoned, forgotten, late]
        for submission in everything:
            await queue.submit(submission)
            await queue.submit(submission)  # the reply was lost
        counted, again = await count_stored(queue, everything)
        assert counted == again == {s.tenant: stored_bytes(s) for s in everything}
        ended = await queue.sweep()
        for _ in range(2):
            await queue.stop([stopped.requests[0].id], FinishReason.CANCELLED)
            await queue.forget(forgotten.id)
        await passes(0.15)
        assert ended + await queue.sweep() == 2
        counted, again = await count_stored(queue, everything)
        assert counted == again
        assert all(counted.get(name, 0) <= kept_bytes(stopped) for name in "abcd")
        await passes(LIMITS.resume_window + 0.05)
        await queue.sweep()
        counted, again = await count_stored(queue, everything)
        assert counted == again
        assert counted.keys() <= {"c"}, "its readers have a moment to read on"

    # --- claims ---------------------------------------------------------------------------
    async def test_higher_priorities_and_older_ones_come_first(
        self, queue: Queue, passes: Passes
    ) -> None:
        order = {}
        for priority in (2, 1, 0, 1):
            submission = make_submission(priority=priority)
            order[submission.requests[0].id] = priority
            await queue.submit(submission)
            await passes(0.002)
        first = await queue.claim(make_engine(), limit=3, wait=0)
        rest = await queue.claim(make_engine(), limit=3, wait=0)
        got = [claim.request.id for claim in (*first, *rest)]
        assert got == sorted(order, key=lambda rid: order[rid])
        assert len(first) == 3

    async def test_tenants_take_turns(self, queue: Queue, passes: Passes) -> None:
        """By tokens, however many of one wait already; and age decides within a tenant."""
        names = {}
        for tenant, costs in (("a", (5, 5, 5, 5)), ("b", (10, 10))):
            for index, cost in enumerate(costs):
                submission = make_submission(
                    tenant=tenant, prompt_ids=(1,) * (cost - 1), max_tokens=4
                )
                names[submission.requests[0].id] = f"{tenant}{index}"
                await queue.submit(submission)
                await passes(0.002)
        taken = await queue.claim(make_engine(), limit=6, wait=0)
        assert "".join(names[claim.request.id] for claim in taken) in {
            "a0b0a1a2b1a3", "a0b0a1b1a2a3",
        }  # fmt: skip
        late = make_submission(tenant="b", prompt_ids=(1,))
        await queue.submit(make_submission(tenant="c", prompt_ids=(1,)))
        await queue.submit(late)
        await queue.stop([claim.request.id for claim in taken], FinishReason.CANCELLED)
        rested = make_submission(tenant="a", prompt_ids=(1,))
        await queue.submit(rested)
        order = [claim.request.id for claim in await queue.claim(make_engine(), limit=3, wait=0)]
        assert order.index(rested.requests[0].id) < order.index(late.requests[0].id)

    async def test_a_full_engine_takes_requests_of_under_served_tenants(self, queue: Queue) -> None:
        """Of tenants that have fewer running requests than others: no flood shuts them out."""
        for _ in range(4):
            await queue.submit(make_submission(tenant="flood", prompt_ids=(1,)))
        assert len(await queue.claim(make_engine(), limit=3, wait=0)) == 3
        assert not await queue.claim(make_engine(), limit=0, under_served=2, wait=0)
        quiet = make_submission(3, tenant="quiet", prompt_ids=(1,))
        await queue.submit(quiet)
        assert not await queue.claim(make_engine(), limit=0, wait=0)
        first = await queue.claim(make_engine(), limit=0, under_served=1, wait=0)
        second = await queue.claim(make_engine(), limit=0, under_served=5, wait=0)
        taken = [claim.request for claim in (*first, *second)]
        assert taken == list(quiet.requests[:2]), "two of five, and no more, are below the average"
        assert len(await queue.claim(make_engine(), limit=9, under_served=2, wait=0)) == 2

    async def test_a_claim_carries_the_whole_request(self, queue: Queue) -> None:
        submission = make_submission(stop=("é\n",), stop_token_ids=(5,), timeout_ms=60_000)
        await queue.submit(submission)
        claim = await claim_one(queue)
        assert claim.request == submission.requests[0]
        assert (claim.tokens, claim.attempt) == ((), 1)
        assert claim.remaining_ms is not None
        assert 50_000 < claim.remaining_ms <= 60_000
        assert not await queue.claim(make_engine(), limit=1, wait=0)

    async def test_a_waiting_claim_is_woken(self, queue: Queue) -> None:
        waiting = asyncio.create_task(claim_one(queue, wait=2 * PATIENCE))
        await asyncio.sleep(0.05)
        submission = make_submission()
        await queue.submit(submission)
        async with asyncio.timeout(PATIENCE):
            assert (await waiting).request.id == submission.requests[0].id

    async def test_a_claim_can_be_cancelled(self, queue: Queue) -> None:
        waiting = asyncio.create_task(claim_one(queue, wait=2 * PATIENCE))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await queue.submit(make_submission())
        await claim_one(queue)

    async def test_two_engines_never_get_one_request(self, queue: Queue) -> None:
        await queue.submit(make_submission(4))
        found = await asyncio.gather(
            *(queue.claim(make_engine(f"e{i}"), limit=2, wait=0) for i in range(3))
        )
        ids = [claim.request.id for claims in found for claim in claims]
        assert len(ids) == len(set(ids)) == 4

    async def test_no_limit_means_a_sign_of_life_only(self, queue: Queue) -> None:
        await queue.submit(make_submission())
        engine = make_engine("alive", max_model_len=3, running=2)
        assert not await queue.claim(engine, limit=0, wait=0)
        assert list(await queue.engines()) == [engine]

    @pytest.mark.parametrize("seed", range(4))
    async def test_groups_sum_up_the_engines(self, queue: Queue, passes: Passes, seed: int) -> None:
        draw = random.Random(seed)
        assert list(await queue.engine_groups()) == []
        for number in range(draw.randint(0, 30)):
            await queue.claim(
                make_engine(
                    f"e{number}",
                    running=draw.randint(0, 9),
                    tokens_per_second=draw.choice([0.0, 1e-7, 0.25, 1234.5]),
                    numeric_class=draw.choice(["a", 'b"}']),
                    features=draw.choice([(), ("x", "y")]),
                ),
                limit=0,
                wait=0,
            )
            await passes(draw.choice([*[0.0] * 9, ENGINE_SILENCE / 2]))
        await passes(1.0)  # for which sums are shared
        groups = await queue.engine_groups()
        listed = await queue.engines()
        assert {group.info for group in groups} == {info.without_load() for info in listed}
        assert len(groups) == len({group.info for group in groups})
        for group in groups:
            members = [info for info in listed if info.without_load() == group.info]
            assert group.engines == len(members)
            assert group.tokens_per_second == pytest.approx(
                sum(info.tokens_per_second for info in members)
            )

    # --- writing --------------------------------------------------------------------------
    async def test_replies_to_writes(self, queue: Queue) -> None:
        await queue.submit(make_submission())
        claim = await claim_one(queue)
        lease = claim.lease
        first, second = make_tokens([1, 2]), make_tokens([3], start=2, before=[1, 2])
        assert await append(queue, lease, first) == WriteReply(WriteStatus.OK, 2)
        assert await append(queue, lease, first) == WriteReply(WriteStatus.DUP, 2)
        hole = make_tokens([9], start=5)
        assert await append(queue, lease, hole) == WriteReply(WriteStatus.GAP, 2)
        overlap = make_tokens([2, 3], start=1, before=[1])
        assert await append(queue, lease, overlap) == WriteReply(WriteStatus.GAP, 2)
        assert await append(queue, lease, stop_at(3)) == WriteReply(WriteStatus.GAP, 2)
        replies = await queue.write([Write(lease, second), Write(lease, stop_at(3))])
        assert list(replies) == [WriteReply(WriteStatus.OK, 3)] * 2
        again = await queue.write([Write(lease, second), Write(lease, stop_at(3))])
        assert list(again) == [WriteReply(WriteStatus.DUP, 3)] * 2
        late = make_tokens([4], start=3, before=[1, 2, 3])
        assert await append(queue, lease, late) == WriteReply(WriteStatus.FENCED, 3)
        other_end = stop_at(3, FinishReason.LENGTH)
        assert (await append(queue, lease, other_end)).status is WriteStatus.FENCED
        expected = [first, second, stop_at(3)]
        assert list(await queue.read(claim.request.id)) == expected

    @pytest.mark.parametrize("seed", range(8))
    async def test_a_step_is_written_as_its_records_one_by_one_are(
        self, queue: Queue, seed: int
    ) -> None:
        """Two requests, whose records are new, repeated, too early, of a stale lease, or ends."""
        draw = random.Random(seed)
        outcomes = []
        steps = [
            [(draw.randrange(2), draw.randrange(5), draw.randrange(1, 4)) for _ in range(12)]
            for _ in range(3)
        ]
        for at_once in (True, False):
            await queue.submit(make_submission(2))
            claims = await queue.claim(make_engine(), limit=2, wait=0)
            claims = sorted(claims, key=lambda claim: claim.request.id)
            counts, ended = [0, 0], set[int]()
            replies: list[WriteReply] = []
            for step in steps:
                writes = []
                for index, kind, length in step:
                    if index in ended:
                        continue
                    rid, start, lease = claims[index].request.id, counts[index], claims[index].lease
                    record: Record = answer_of(rid, start, start + length)
                    if kind == 1:
                        record = answer_of(rid, max(0, start - length), max(1, start))
                    elif kind == 2:
                        record = answer_of(rid, start + 1, start + 1 + length)
                    elif kind == 3:
                        lease = replace(lease, epoch=lease.epoch + 1)
                    elif kind == 4 and step is steps[-1]:
                        record = stop_at(start)
                        ended.add(index)
                    else:
                        counts[index] += length
                    writes.append(Write(lease, record))
                if at_once:
                    replies += await queue.write(writes)
                else:
                    replies += [reply for each in writes for reply in await queue.write([each])]
            journals = [await queue.read(claim.request.id) for claim in claims]
            lengths = [[len(getattr(r, "ids", ())) for r in journal] for journal in journals]
            outcomes.append(([(reply.status, reply.count) for reply in replies], lengths))
            await queue.stop([claim.request.id for claim in claims], FinishReason.CANCELLED)
        assert outcomes[0] == outcomes[1]
        assert {status for status, _ in outcomes[0][0]} >= {"ok", "dup", "fenced"}

    async def test_records_come_back_as_they_were(self, queue: Queue) -> None:
        """Text beyond ASCII, log probabilities to the last bit, a stop string: all of it."""
        logprob = TokenLogprob(-0.123456789012345, ((70_000, -0.1), (0, -17.5)))
        record = Tokens(
            start=0,
            ids=(70_000, 0),
            text="né\n🙂",
            digest=0xFFFF_FFFF,
            logprobs=(logprob, TokenLogprob(float("-inf"))),
            prompt_logprobs=(None, logprob),
        )
        ends = [
            stop_at(2),
            type(stop_at(2))(count=2, reason=FinishReason.STOP, cached_tokens=9, stopped_by="é"),
            type(stop_at(2))(count=2, reason=FinishReason.STOP, stopped_by=11),
            type(stop_at(2))(count=2, reason=FinishReason.ERROR, error="storage_full"),
        ]
        for end in ends:
            submission = make_submission()
            await queue.submit(submission)
            lease = (await claim_one(queue)).lease
            await queue.write([Write(lease, record), Write(lease, end)])
            assert list(await queue.read(submission.requests[0].id)) == [record, end]

    async def test_stale_and_foreign_leases_are_fenced(self, queue: Queue) -> None:
        await queue.submit(make_submission())
        lease = (await claim_one(queue)).lease
        rid = lease.request_id
        stale = Lease(rid, lease.epoch - 1, lease.owner)
        foreign = Lease(rid, lease.epoch, "other:nonce")
        unknown = Lease("s0-unknown.0", 1, lease.owner)
        for wrong in (stale, foreign, unknown):
            for record in (make_tokens([1]), stop_at(0)):
                assert await append(queue, wrong, record) == WriteReply(WriteStatus.FENCED, 0)
        assert list(await queue.renew([stale, foreign, unknown, lease])) == [
            rid,
            rid,
            unknown.request_id,
        ]
        await queue.release([stale, foreign, unknown])
        assert await append(queue, lease, make_tokens([1])) == WriteReply(WriteStatus.OK, 1)
        assert await queue.write([]) == []
        assert list(await queue.renew([])) == []

    # --- leases ---------------------------------------------------------------------------
    async def test_an_orphan_is_claimed_again_with_its_tokens(
        self, queue: Queue, passes: Passes
    ) -> None:
        submission = make_submission()
        rid = submission.requests[0].id
        await queue.submit(submission)
        dead = await claim_one(queue, make_engine("dead"))
        await append(queue, dead.lease, answer_of(rid, 0, 2))
        await append(queue, dead.lease, answer_of(rid, 2, 3))
        other = make_engine("other")
        assert not await queue.claim(other, limit=1, wait=0)
        await passes(OVER)
        taken = await claim_one(queue, other, wait=PATIENCE)
        assert list(taken.tokens) == ids_of([answer_of(rid, 0, 3)])
        assert (taken.attempt, taken.lease.epoch) == (2, dead.lease.epoch + 1)
        assert (await append(queue, dead.lease, answer_of(rid, 3, 4))).status is WriteStatus.FENCED
        assert list(await queue.renew([dead.lease])) == [rid]
        await finish(queue, taken, length=5)
        assert list(ids_of(await queue.read(rid))) == ids_of([answer_of(rid, 0, 5)])
        assert await queue.depth() == NOTHING

    async def test_an_orphan_with_all_its_tokens_only_has_to_end(
        self, queue: Queue, passes: Passes
    ) -> None:
        await queue.submit(make_submission())
        dead = await claim_one(queue)
        await append(queue, dead.lease, answer_of(dead.request.id, 0, 3))
        await passes(OVER)
        await finish(queue, await claim_one(queue, wait=PATIENCE), length=3)
        assert await queue.depth() == NOTHING

    async def test_an_engine_that_was_late_is_not_taken_for_dead(
        self, queue: Queue, passes: Passes
    ) -> None:
        """Another that takes the request counts a death; the same one taking it back does not."""
        await queue.submit(make_submission())
        await claim_one(queue, make_engine("late"))
        await passes(OVER)
        again = await claim_one(queue, make_engine("late"), wait=PATIENCE)
        assert (again.attempt, again.lease.epoch) == (1, 2)
        await passes(OVER)
        assert (await claim_one(queue, make_engine("other"), wait=PATIENCE)).attempt == 2

    async def test_renewed_leases_do_not_end(self, queue: Queue, passes: Passes) -> None:
        await queue.submit(make_submission())
        claim = await claim_one(queue, make_engine("owner"))
        for _ in range(6):
            await passes(LIMITS.lease / 3)
            assert list(await queue.renew([claim.lease])) == []
            assert not await queue.claim(make_engine("other"), limit=1, wait=0)
        await finish(queue, claim, length=1)

    async def test_an_owner_who_is_late_goes_on_while_nobody_took_over(
        self, queue: Queue, passes: Passes
    ) -> None:
        await queue.submit(make_submission())
        claim = await claim_one(queue)
        await passes(OVER)
        assert (await append(queue, claim.lease, make_tokens([1]))).status is WriteStatus.OK
        assert list(await queue.renew([claim.lease])) == []
        assert not await queue.claim(make_engine("other"), limit=1, wait=0)

    async def test_a_released_request_goes_on_at_once_and_without_blame(self, queue: Queue) -> None:
        await queue.submit(make_submission())
        claim = await claim_one(queue, make_engine("e0"))
        await append(queue, claim.lease, answer_of(claim.request.id, 0, 1))
        for turn in range(1, LIMITS.max_attempts + 3):
            waiting = asyncio.create_task(
                claim_one(queue, make_engine(f"e{turn}"), wait=2 * PATIENCE)
            )
            await asyncio.sleep(0.02)
            await queue.release([claim.lease])
            released = claim
            async with asyncio.timeout(PATIENCE):
                claim = await waiting
            assert (len(claim.tokens), claim.attempt) == (1, 1)
            assert (await append(queue, released.lease, stop_at(1))).status is WriteStatus.FENCED
        await finish(queue, claim, length=2)

    async def test_a_request_that_kills_engines_is_given_up(
        self, queue: Queue, passes: Passes
    ) -> None:
        submission = make_submission()
        rid = submission.requests[0].id
        await queue.submit(submission)
        for attempt in range(1, LIMITS.max_attempts + 1):
            claim = await claim_one(queue, make_engine(f"e{attempt}"), wait=PATIENCE)
            assert claim.attempt == attempt
            await passes(OVER)
        assert not await queue.claim(make_engine("last"), limit=1, wait=0)
        assert not await queue.read(rid), "the last engine may only be frozen"
        await passes(FINAL_SILENCE * LIMITS.lease)
        assert not await queue.claim(make_engine("last"), limit=1, wait=0.3)
        (end,) = await queue.read(rid)
        assert (end.reason, end.error) == (FinishReason.ERROR, "engine_crash_loop")  # type: ignore[union-attr]  # an End: the only record
        assert (await append(queue, claim.lease, make_tokens([1]))).status is WriteStatus.FENCED
        assert await queue.depth() == NOTHING

    async def test_an_engine_gets_only_requests_whose_features_it_has(self, queue: Queue) -> None:
        """And what it leaves to others delays nothing else, in the order of the turns."""
        needy = make_submission(2, grammar="x", tenant="needy")
        plain = make_submission(2, tenant="plain")
        for submission in (needy, plain):
            await queue.submit(submission)
        assert needy.requests[0].features == ("grammar",)
        old = make_engine("old", features=())
        taken = await queue.claim(old, limit=4, wait=0)
        assert {claim.request.id for claim in taken} == {each.id for each in plain.requests}
        await queue.stop([needy.requests[1].id], FinishReason.CANCELLED)
        new = make_engine("new", features=("grammar", "later"))
        claim = await claim_one(queue, new)
        assert claim.request == needy.requests[0]
        await queue.release([claim.lease])
        assert not await queue.claim(old, limit=4, wait=0)
        await finish(queue, await claim_one(queue, new, wait=PATIENCE), length=1)

    async def test_an_engine_gets_only_requests_of_its_model(self, queue: Queue) -> None:
        for model in "abab":
            await queue.submit(make_submission(model=model, tenant=model))
        for model in "ab":
            engine = make_engine(model, features=(model_feature(model),))
            claims = await queue.claim(engine, limit=4, wait=0)
            assert [claim.request.model for claim in claims] == [model] * 2
            await queue.release([claim.lease for claim in claims])
            other = make_engine("other", features=(model_feature("other"),))
            assert not await queue.claim(other, limit=4, wait=0)

    # --- blame ----------------------------------------------------------------------------
    async def test_progress_past_a_death_clears_a_request(
        self, queue: Queue, passes: Passes
    ) -> None:
        """However many engines die, it is never failed."""
        submission = make_submission(max_tokens=200)
        rid = submission.requests[0].id
        await queue.submit(submission)
        count = 0
        claim = await claim_one(queue, make_engine("e0"))
        for death in range(1, 2 * LIMITS.max_attempts + 1):
            await append(queue, claim.lease, answer_of(rid, count, count + CLEARED_AFTER + 1))
            count += CLEARED_AFTER + 1
            await passes(OVER)
            claim = await claim_one(queue, make_engine(f"e{death}"), wait=PATIENCE)
            assert (claim.attempt, claim.isolated_until) == (2, count + CLEARED_AFTER)
            assert len(claim.tokens) == count
        await finish(queue, claim, length=count + 1)
        assert await queue.depth() == NOTHING

    async def test_any_progress_saves_the_last_attempt(self, queue: Queue, passes: Passes) -> None:
        """Too little to be cleared, and one token more than before each time."""
        submission = make_submission()
        rid = submission.requests[0].id
        await queue.submit(submission)
        claim = await claim_one(queue, make_engine("e0"))
        for death in range(1, 3 * LIMITS.max_attempts):
            await append(queue, claim.lease, answer_of(rid, death - 1, death))
            await passes(OVER)
            claim = await claim_one(queue, make_engine(f"e{death}"), wait=PATIENCE)
            assert claim.attempt == min(death + 1, LIMITS.max_attempts)
        await passes((FINAL_SILENCE + 1) * LIMITS.lease)
        assert not await queue.claim(make_engine("last"), limit=1, wait=0.1)
        assert (await queue.read(rid))[-1].error == "engine_crash_loop"  # type: ignore[union-attr]

    async def test_suspects_are_isolated_in_one_engine_half_of_them_at_a_time(
        self, queue: Queue, passes: Passes
    ) -> None:
        """And nothing else waits for them."""
        held = make_submission(4, max_tokens=50)
        await queue.submit(held)
        assert len(await queue.claim(make_engine("dead"), limit=4, wait=0)) == 4
        await passes(OVER)
        fresh = make_submission(2, tenant="fresh")
        await queue.submit(fresh)
        one, other = make_engine("one"), make_engine("other")
        first = await queue.claim(one, limit=3, wait=PATIENCE)
        assert [claim.isolated_until for claim in first] == [CLEARED_AFTER, CLEARED_AFTER, None]
        assert [claim.attempt for claim in first] == [2, 2, 1]
        elsewhere = await queue.claim(other, limit=9, wait=0)
        assert [claim.request.tenant for claim in elsewhere] == ["fresh"]
        await append(queue, first[0].lease, answer_of(first[0].request.id, 0, CLEARED_AFTER))
        assert not await queue.claim(one, limit=9, wait=0), "the other has not passed the position"
        await append(queue, first[1].lease, answer_of(first[1].request.id, 0, CLEARED_AFTER))
        assert not await queue.claim(other, limit=9, wait=0), "none is cleared yet"
        (joined,) = await queue.claim(one, limit=9, wait=0)
        await queue.stop([joined.request.id], FinishReason.CANCELLED)
        await finish(queue, replace(first[0], tokens=(0,) * CLEARED_AFTER), length=CLEARED_AFTER)
        await append(
            queue, first[1].lease, answer_of(first[1].request.id, CLEARED_AFTER, CLEARED_AFTER + 1)
        )
        (third,) = await queue.claim(other, limit=9, wait=0)
        assert third.isolated_until == CLEARED_AFTER
        await queue.release([third.lease])
        (again,) = await queue.claim(one, limit=9, wait=0)
        assert again.attempt == 2, "a release counts no death, and clears of none"

    async def test_a_last_attempt_is_made_alone_and_others_are_not_blamed(
        self, queue: Queue, passes: Passes
    ) -> None:
        pair, bystander = make_submission(2), make_submission(tenant="b")
        await queue.submit(pair)
        assert len(await queue.claim(make_engine("e0"), limit=2, wait=0)) == 2
        for death in range(1, LIMITS.max_attempts - 1):
            for half in range(2):  # one after the other, and both engines die
                await passes(OVER)
                engine = make_engine(f"e{death}-{half}")
                assert (await claim_one(queue, engine, wait=PATIENCE)).attempt == death + 1
        await passes(OVER)
        await queue.submit(bystander)
        third = make_engine("third")
        claims = await queue.claim(third, limit=9, wait=PATIENCE)
        alone = [claim for claim in claims if claim.isolated_until]
        assert [claim.attempt for claim in alone] == [LIMITS.max_attempts]
        others = [claim.request.id for claim in claims if not claim.isolated_until]
        assert others == [bystander.requests[0].id]
        assert not await queue.claim(make_engine("more"), limit=9, wait=0)
        await passes((FINAL_SILENCE + 1) * LIMITS.lease)
        left = await queue.claim(make_engine("fourth"), limit=9, wait=PATIENCE)
        assert {(claim.request.tenant, claim.attempt) for claim in left} == {
            ("public", LIMITS.max_attempts), ("b", 1),
        }  # fmt: skip
        (end,) = await queue.read(alone[0].request.id)
        assert end.error == "engine_crash_loop"  # type: ignore[union-attr]

    async def test_an_engine_that_is_late_but_heard_of_did_not_die(
        self, queue: Queue, passes: Passes
    ) -> None:
        await queue.submit(make_submission())
        await claim_one(queue, make_engine("e0"))
        for turn in range(1, LIMITS.max_attempts + 2):
            await passes(OVER)
            claims: Sequence[Claim] = ()
            while not claims:
                await queue.claim(make_engine(f"e{turn - 1}"), limit=0, wait=0)  # a sign of life
                claims = await queue.claim(make_engine(f"e{turn}"), limit=1, wait=0)
            (claim,) = claims
            assert (claim.attempt, claim.isolated_until) == (1, None)

    async def test_a_death_is_taken_back_if_the_engine_is_heard_again(
        self, queue: Queue, passes: Passes
    ) -> None:
        both, frozen = make_submission(3), make_engine("frozen")
        await queue.submit(both)
        claims = await queue.claim(frozen, limit=3, wait=0)
        await passes(OVER)
        (first, second) = await queue.claim(make_engine("other"), limit=3, wait=PATIENCE)
        assert (first.attempt, first.isolated_until) == (2, CLEARED_AFTER)
        assert set(await queue.renew([each.lease for each in claims])) >= {first.request.id}
        await queue.claim(frozen, limit=0, wait=0)
        third = await claim_one(queue, make_engine("third"), wait=PATIENCE)
        assert (third.attempt, third.isolated_until) == (1, None)
        for claim in (first, second):
            await queue.release([claim.lease])
        for claim in await queue.claim(make_engine("fourth"), limit=3, wait=PATIENCE):
            assert (claim.attempt, claim.isolated_until) == (1, None)

    async def test_an_engine_may_report_its_own_death(self, queue: Queue) -> None:
        """No engine has to wait for a lease; and it counts."""
        submission = make_submission()
        await queue.submit(submission)
        for attempt in range(1, LIMITS.max_attempts + 1):
            claim = await claim_one(queue, make_engine(f"e{attempt}"), wait=PATIENCE)
            assert claim.attempt == attempt
            await queue.release([claim.lease], died=True)
        (end,) = await queue.read(submission.requests[0].id)
        assert (end.reason, end.error) == (FinishReason.ERROR, "engine_crash_loop")  # type: ignore[union-attr]
        assert await queue.depth() == NOTHING

    async def test_a_begun_answer_stays_in_its_numeric_class(
        self, queue: Queue, passes: Passes
    ) -> None:
        begun, fresh = make_submission(), make_submission()
        await queue.submit(begun)
        await queue.submit(fresh)
        other = make_engine("other", numeric_class="class-b")
        claims = await queue.claim(make_engine("dead"), limit=2, wait=0)
        await append(queue, claims[0].lease, answer_of(claims[0].request.id, 0, 1))
        await passes(OVER)
        taken = await queue.claim(other, limit=2, wait=PATIENCE)
        assert [claim.request.id for claim in taken] == [fresh.requests[0].id]
        assert not await queue.claim(other, limit=2, wait=0.02)
        await finish(queue, taken[0], length=1)
        same = await claim_one(queue, make_engine("same"), wait=PATIENCE)
        assert (same.request.id, len(same.tokens)) == (begun.requests[0].id, 1)

    # --- ends -----------------------------------------------------------------------------
    async def test_stop_ends_in_every_state_and_once(self, queue: Queue, passes: Passes) -> None:
        ids = {}
        for state in ("ended", "running", "orphan", "released", "queued"):
            submission = make_submission(tenant=state)
            ids[state] = submission.requests[0].id
            await queue.submit(submission)
            await passes(0.002)
        ended, running, orphan, released = await queue.claim(make_engine(), limit=4, wait=0)
        await finish(queue, ended, length=1)
        await queue.release([released.lease])
        await passes(OVER)
        await queue.renew([running.lease])
        await append(queue, running.lease, answer_of(running.request.id, 0, 2))
        for _ in range(2):
            await queue.stop([*ids.values(), "s0-unknown.0"], FinishReason.CANCELLED)
        counts = dict.fromkeys(ids, 0) | {"ended": 1, "running": 2}
        for state, rid in ids.items():
            end = (await queue.read(rid))[-1]
            reason = FinishReason.STOP if state == "ended" else FinishReason.CANCELLED
            assert end == stop_at(counts[state], reason), state
            assert sum(not isinstance(record, Tokens) for record in await queue.read(rid)) == 1
        for claim in (running, orphan, released):
            for record in (answer_of(claim.request.id, 2, 3), stop_at(2), stop_at(0)):
                assert (await append(queue, claim.lease, record)).status is WriteStatus.FENCED
        assert await queue.depth() == NOTHING
        assert not await queue.claim(make_engine(), limit=4, wait=0.02)
        await queue.stop([], FinishReason.CANCELLED)

    async def test_deadlines_end_what_waits_and_what_runs(
        self, queue: Queue, passes: Passes
    ) -> None:
        late, running = make_submission(timeout_ms=100), make_submission(timeout_ms=100)
        patient = make_submission(timeout_ms=60_000)
        endless = make_submission()
        await queue.submit(running)
        claim = await claim_one(queue)
        for submission in (late, patient, endless):
            await queue.submit(submission)
        everything = [s.requests[0].id for s in (late, running, patient, endless)]
        assert await queue.sweep() == 0
        await queue.stop(everything, FinishReason.DEADLINE)
        assert (await queue.depth()).queued_requests == 3
        await passes(0.15)
        assert await queue.sweep() == 2
        assert await queue.sweep() == 0
        for submission in (late, running):
            end = (await queue.read(submission.requests[0].id))[-1]
            assert end == stop_at(0, FinishReason.DEADLINE)
        assert (await append(queue, claim.lease, make_tokens([1]))).status is WriteStatus.FENCED
        assert (await queue.depth()).queued_requests == 2

    async def test_an_engine_gets_nothing_past_its_deadline(
        self, queue: Queue, passes: Passes
    ) -> None:
        late = make_submission(timeout_ms=50)
        await queue.submit(late)
        await passes(0.1)
        assert not await queue.claim(make_engine(), limit=1, wait=0)
        assert (await queue.read(late.requests[0].id))[-1] == stop_at(0, FinishReason.DEADLINE)
        assert await queue.depth() == NOTHING

    async def test_what_has_no_heartbeat_is_cancelled_after_its_grace(
        self, queue: Queue, passes: Passes
    ) -> None:
        """Whatever state it is in; and neither what has heartbeats nor what needs none."""
        left = make_submission(2, tenant="left", grace=0.2)
        heard = make_submission(tenant="heard", grace=0.2)
        alone = make_submission(tenant="alone")
        await queue.submit(left)
        claim = await claim_one(queue)
        await append(queue, claim.lease, answer_of(claim.request.id, 0, 1))
        for submission in (heard, alone):
            await queue.submit(submission)
        assert await queue.sweep() == 0
        for _ in range(3):
            await passes(0.1)
            await queue.heartbeat([heard.id, alone.id, "s0-unknown"])
        assert await queue.sweep() == 2
        ends = [(await queue.read(request.id))[-1] for request in left.requests]
        assert ends == [stop_at(count, FinishReason.CANCELLED) for count in (1, 0)]
        late = await append(queue, claim.lease, answer_of(claim.request.id, 1, 2))
        assert late.status is WriteStatus.FENCED
        await queue.heartbeat([left.id, heard.id])
        assert (await queue.depth()).queued_requests == 2
        await passes(0.25)
        assert await queue.sweep() == 1
        await passes(0.25)
        assert await queue.sweep() == 0
        (waiting,) = await queue.claim(make_engine("late"), limit=4, wait=0)
        assert waiting.request.id == alone.requests[0].id

    async def test_nobody_is_abandoned_by_an_absence(self, queue: Queue, passes: Passes) -> None:
        """After a time without heartbeats and sweeps, grace periods start again."""
        submission = make_submission(grace=0.5)
        await queue.submit(submission)
        await queue.sweep()
        await passes(LIMITS.sweep_pause + 0.1)
        assert await queue.sweep() == 0
        await passes(0.2)
        await queue.heartbeat([submission.id])
        await passes(0.4)
        assert await queue.sweep() == 0, "it was heard again in time"
        await passes(0.4)
        assert await queue.sweep() == 1

    async def test_what_has_ended_is_not_abandoned(self, queue: Queue, passes: Passes) -> None:
        submission = make_submission(grace=0.1)
        await queue.submit(submission)
        await queue.sweep()
        await finish(queue, await claim_one(queue), length=2)
        await passes(0.15)
        assert await queue.sweep() == 0
        assert (await queue.read(submission.requests[0].id))[-1] == stop_at(2)

    async def test_what_is_forgotten_is_cancelled_and_not_found(self, queue: Queue) -> None:
        """Its present readers still get its end."""
        running, ended = make_submission(2, key="k"), make_submission(grace=9.0)
        await queue.submit(ended)
        await finish(queue, await claim_one(queue), length=2)
        await queue.submit(running)
        claims = {
            each.request.id: each for each in await queue.claim(make_engine(), limit=2, wait=0)
        }
        rid = running.requests[1].id
        await append(queue, claims[rid].lease, answer_of(rid, 0, 1))
        records = aiter(queue.follow(rid))
        assert await anext(records) == answer_of(rid, 0, 1)
        reading = asyncio.ensure_future(anext(records))
        for submission in (running, ended, make_submission()):
            for _ in range(2):
                await queue.forget(submission.id)
            assert await queue.lookup(submission.id) is None
        async with asyncio.timeout(PATIENCE):
            assert await reading == stop_at(1, FinishReason.CANCELLED)
        assert not await queue.claim(make_engine(), limit=4, wait=0)
        assert await queue.depth() == NOTHING
        reply = await queue.submit(make_submission(key="k"))
        assert (reply.status, reply.submission_id) == (SubmitStatus.EXISTS, running.id)

    async def test_engines_are_told_of_stops(self, queue: Queue) -> None:
        """Those that listen; so requests are stopped until one does."""
        stopped: set[str] = set()
        async with aclosing(queue.stops()) as hints, asyncio.timeout(PATIENCE):  # type: ignore[type-var]  # an async generator, as all of them
            hint = asyncio.ensure_future(anext(hints))
            while not hint.done():
                await queue.submit(make_submission())
                rid = (await claim_one(queue)).request.id
                stopped.add(rid)
                await queue.stop([rid], FinishReason.CANCELLED)
                await asyncio.wait([hint], timeout=0.02)
            assert hint.result() in stopped

    # --- reading --------------------------------------------------------------------------
    async def test_reading_after_so_many_tokens(self, queue: Queue) -> None:
        submission = make_submission()
        rid = submission.requests[0].id
        await queue.submit(submission)
        assert list(await queue.read(rid)) == []
        lease = (await claim_one(queue)).lease
        records: list[Record] = [answer_of(rid, a, b) for a, b in ((0, 1), (1, 3), (3, 4))]
        records.append(stop_at(4))
        await queue.write([Write(lease, record) for record in records])
        for after, first in ((0, 0), (1, 1), (2, 1), (3, 2), (4, 3)):
            assert list(await queue.read(rid, after=after)) == records[first:]
            followed = [record async for record in queue.follow(rid, after=after)]
            assert followed == records[first:]
        with pytest.raises(StreamDivergence):
            await queue.read(rid, after=5)
        with pytest.raises(StreamDivergence):
            await anext(aiter(queue.follow(rid, after=5)))

    async def test_pages_are_together_what_is_read(self, queue: Queue) -> None:
        """From any position, before and after the end, also with records longer than a page."""
        submission = make_submission()
        rid = submission.requests[0].id
        await queue.submit(submission)
        assert list(await queue.read_page(rid)) == []
        lease = (await claim_one(queue)).lease
        sizes = [*[1] * 40, PAGE_TOKENS - 40, 1, 2 * PAGE_TOKENS + 5, 3, 3]
        ends = list(itertools.accumulate(sizes))
        records: list[Record] = [
            answer_of(rid, end - size, end) for end, size in zip(ends, sizes, strict=True)
        ]
        written = 0
        for count in (10, 41, 43, len(sizes)):
            await queue.write([Write(lease, record) for record in records[written:count]])
            written = count
            for after in (0, 5, ends[count - 1] - 1):
                expected = list(await queue.read(rid, after=after))
                assert await self.in_pages(queue, rid, after=after) == expected
            assert list(await queue.read_page(rid, after=ends[count - 1])) == []
        await append(queue, lease, stop_at(ends[-1]))
        for after in (0, 39, PAGE_TOKENS, PAGE_TOKENS + 1, ends[-1] - 3, ends[-1]):
            expected = list(await queue.read(rid, after=after))
            assert await self.in_pages(queue, rid, after=after) == expected
        with pytest.raises(StreamDivergence):
            await queue.read_page(rid, after=ends[-1] + 1)

    @staticmethod
    async def in_pages(queue: Queue, request_id: str, *, after: int) -> list[Record]:
        found: list[Record] = []
        while page := await queue.read_page(request_id, after=after):
            found += page
            if isinstance(last := page[-1], End):
                break
            assert len(page) <= PAGE_TOKENS
            after = last.end
        return found

    async def test_unknown_requests_are_not_found(self, queue: Queue) -> None:
        with pytest.raises(NotFound):
            await queue.read("s0-unknown.0")
        with pytest.raises(NotFound):
            await queue.read_page("s0-unknown.0")
        with pytest.raises(NotFound):
            await anext(aiter(queue.follow("s0-unknown.0")))

    async def test_followers_see_each_record_once_while_it_is_written(self, queue: Queue) -> None:
        submission = make_submission()
        rid = submission.requests[0].id
        await queue.submit(submission)

        async def collect(after: int, delay: float) -> list[Record]:
            await asyncio.sleep(delay)
            return [record async for record in queue.follow(rid, after=after)]

        delays = (0.0, 0.0, 0.02, 0.05)
        async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as tasks:
            readers = [tasks.create_task(collect(3 * i, delay)) for i, delay in enumerate(delays)]
            claim = await claim_one(queue)
            for i in range(40):
                await append(queue, claim.lease, answer_of(rid, i, i + 1))
                await asyncio.sleep(0.002 * (i % 2))
            await append(queue, claim.lease, stop_at(40))
        expected = [*(answer_of(rid, i, i + 1) for i in range(40)), stop_at(40)]
        for i, reader in enumerate(readers):
            assert reader.result() == expected[3 * i :]

    async def test_a_follow_can_be_left(self, queue: Queue) -> None:
        submission = make_submission()
        await queue.submit(submission)
        waiting = asyncio.ensure_future(anext(aiter(queue.follow(submission.requests[0].id))))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    async def test_answers_are_kept_for_the_resume_window(
        self, queue: Queue, passes: Passes
    ) -> None:
        """It begins when the last request of a submission has ended, and for all of them."""
        submission = make_submission(2)
        first, last = (request.id for request in submission.requests)
        await queue.submit(submission)
        claims = await queue.claim(make_engine(), limit=2, wait=0)
        await finish(queue, claims[0], length=2)
        await queue.renew([claims[1].lease])
        await passes(LIMITS.resume_window + 0.1)
        assert len(await queue.read(first)) == 2
        assert len(await queue.read_page(first)) == 2
        await finish(queue, claims[1], length=1)
        assert len(await queue.read(last)) == 2
        await passes(LIMITS.resume_window + 0.1)
        assert await queue.lookup(submission.id) is None
        for rid in (first, last):
            with pytest.raises(NotFound):
                await queue.read(rid)
            with pytest.raises(NotFound):
                await queue.read_page(rid)
        assert await queue.depth() == NOTHING
        await queue.check()

    async def test_what_is_kept_outlives_the_resume_window(
        self, queue: Queue, passes: Passes
    ) -> None:
        kept, plain = make_submission(keep=KEEP, sent="é"), make_submission(sent="x")
        for submission in (kept, plain):
            await queue.submit(submission)
        assert await queue.read_input(kept.id) == "é"
        assert await queue.read_input(plain.id) is None
        assert await queue.read_input("s0-unknown") is None
        for _ in range(2):
            await finish(queue, await claim_one(queue), length=3)
        counted, again = await count_stored(queue, [kept, plain])
        assert counted == again
        await passes(LIMITS.resume_window + 0.1)
        await queue.sweep()
        assert await queue.lookup(plain.id) is None
        assert await queue.lookup(kept.id) is not None
        assert await queue.read_input(kept.id) == "é"
        assert ids_of(await queue.read(kept.requests[0].id)) == ids_of(
            [answer_of(kept.requests[0].id, 0, 3)]
        )
        size = (await queue.depth()).stored_bytes
        assert size == kept_bytes(kept) + 3 * token_bytes(kept)
        await passes(KEEP - LIMITS.resume_window + 0.1)
        await queue.sweep()
        assert await queue.lookup(kept.id) is None
        assert await queue.read_input(kept.id) is None
        assert (await queue.depth()).stored_bytes == 0

    async def test_touching_starts_the_time_again(self, queue: Queue, passes: Passes) -> None:
        touched, other = make_submission(keep=KEEP), make_submission(keep=KEEP)
        plain, running = make_submission(), make_submission(keep=KEEP)
        for submission in (touched, other, plain):
            await queue.submit(submission)
            await finish(queue, await claim_one(queue), length=2)
        await queue.submit(running)
        for _ in range(3):
            await passes(KEEP / 3)
            await queue.touch([touched.id, plain.id, running.id, "s0-unknown"])
        await passes(0.1)
        await queue.sweep()
        assert await queue.lookup(touched.id) is not None
        assert await queue.lookup(other.id) is None
        assert await queue.lookup(plain.id) is None
        assert await queue.lookup(running.id) is not None
        counted, again = await count_stored(queue, [touched, other, plain, running])
        assert counted == again
        await queue.forget(touched.id)
        assert await queue.read_input(touched.id) is None

    async def test_kept_submissions_make_room_for_new_ones(
        self, queue: Queue, passes: Passes
    ) -> None:
        """Oldest first, and only those of the same tenant."""
        mine = [make_submission(tenant="a", keep=60.0, sent="x" * 7_000) for _ in range(3)]
        theirs = make_submission(tenant="b", keep=60.0, sent="x" * 7_000)
        for submission in (theirs, *mine):
            assert (await queue.submit(submission)).status is SubmitStatus.OK
            await finish(queue, await claim_one(queue), length=2)
            await passes(0.01)
        new = make_submission(tenant="a", keep=60.0, sent="x" * 7_000)
        assert (await queue.submit(new)).status is SubmitStatus.OK
        assert await queue.read_input(mine[0].id) is None
        for submission in (*mine[1:], theirs, new):
            assert await queue.read_input(submission.id) is not None
        counted, again = await count_stored(queue, [*mine, theirs, new])
        assert counted == again
        assert counted["a"] <= LIMITS.max_tenant_bytes
        await passes(LIMITS.resume_window + 0.1)
        await queue.sweep()
        assert await queue.lookup(mine[0].id) is None
        another = make_submission(tenant="a", sent="x", manifest="x" * 8_000)
        assert (await queue.submit(another)).status is SubmitStatus.OK
        assert await queue.lookup(mine[1].id) is None, "evicted after its resume window"
        assert await queue.read_input(mine[2].id) is not None
        counted, again = await count_stored(queue, [*mine, theirs, new, another])
        assert counted == again
        huge = make_submission(tenant="a", manifest="x" * (LIMITS.max_tenant_bytes + 1))
        assert (await queue.submit(huge)).status is SubmitStatus.TENANT_STORAGE
        assert await queue.read_input(mine[2].id) is not None, "no room could be made"

    async def test_the_tenant_that_keeps_most_makes_room(
        self, queue: Queue, passes: Passes
    ) -> None:
        small = make_submission(tenant="a", keep=60.0, sent="x" * 9_000)
        large = [make_submission(tenant="b", keep=60.0, sent="x" * 9_000) for _ in range(3)]
        others = [make_submission(tenant=t, keep=60.0, sent="x" * 9_000) for t in "cd"]
        everything = [small, *large, *others]
        for submission in everything:
            assert (await queue.submit(submission)).status is SubmitStatus.OK
            await finish(queue, await claim_one(queue), length=1)
            await passes(0.01)
        new = make_submission(tenant="e", sent="x", manifest="x" * 12_000)
        assert (await queue.submit(new)).status is SubmitStatus.OK
        assert await queue.read_input(large[0].id) is None
        for submission in (small, *large[1:], *others):
            assert await queue.read_input(submission.id) is not None
        counted, again = await count_stored(queue, [*everything, new])
        assert counted == again

    async def test_closing_ends_open_calls(self, queue: Queue) -> None:
        submission = make_submission()
        await queue.submit(submission)
        await claim_one(queue)
        claiming = asyncio.create_task(claim_one(queue, wait=60))
        following = asyncio.ensure_future(anext(aiter(queue.follow(submission.requests[0].id))))
        await asyncio.sleep(0.05)
        await queue.close()
        for task in (claiming, following):
            with pytest.raises(Unavailable):
                await task
        with pytest.raises(Unavailable):
            await queue.check()
