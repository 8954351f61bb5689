"""The queue in Redis: the contract over a real server, and what only it has."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import pytest
from redis import Redis

from service.errors import StartupError, Unavailable
from service.messages import (
    Allowance,
    End,
    FinishReason,
    Record,
    TokenLogprob,
    Tokens,
)
from service.queues import open_queue
from service.queues.contract import HELD_FOR, PAGE_TOKENS, RESERVED_FOR, QueueLimits, Write
from service.queues.observer import QueueEvent
from service.queues.redis.codec import Malformed, decode_entry, encode_tokens
from service.queues.redis.connection import check_server
from service.queues.redis.journal import JournalState, Page, PageCache
from service.queues.redis.queue import RedisQueue
from service.queues.redis.registry import encode_report
from tests.cluster.redis_process import RedisServer
from tests.queues.builders import (
    Counts,
    answer_of,
    append,
    claim_one,
    finish,
    make_engine,
    make_submission,
    make_tokens,
    stop_at,
)
from tests.queues.contract import LIMITS, NOTHING, OVER, Passes, QueueContract
from tests.queues.test_record_formats import END, ENGINE, MANIFEST, REQUEST, SCORED, TOKENS, golden
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.slow

Queues = Callable[[str, QueueLimits], RedisQueue]


@pytest.fixture
def queue(redis_server: RedisServer, redis_queues: Queues) -> RedisQueue:
    return redis_queues(redis_server.url, LIMITS)


@pytest.fixture
def passes(redis_server: RedisServer) -> Passes:
    async def advance(seconds: float) -> None:
        redis_server.advance(seconds)

    return advance


class TestRedisQueue(QueueContract):
    """All of the contract."""


async def test_deployments_with_different_prefixes_share_a_server(
    redis_server: RedisServer, redis_queues: Queues
) -> None:
    one, other = (redis_queues(f"{redis_server.url}?prefix={name}", LIMITS) for name in "ab")
    submission = make_submission()
    await one.submit(submission)
    assert redis_server.ask("EXISTS", "a:2:{s0}:adm") == ":1"
    assert redis_server.ask("EXISTS", "quire:2:{s0}:adm") == ":0"
    assert await other.claim(make_engine(), limit=1, wait=0) == []
    assert await other.lookup(submission.id) is None
    assert await other.depth() == NOTHING
    await finish(one, await claim_one(one), length=1)


async def test_a_token_takes_at_most_100_bytes(
    redis_server: RedisServer, redis_queues: Queues
) -> None:
    """One token a record, as a streamed answer is written; MEMORY USAGE is Redis's own count."""
    queue = redis_queues(redis_server.url, replace(LIMITS, max_tokens=10_000))
    for length in (128, 512, 2000):
        await queue.submit(make_submission(max_tokens=length))
        claim = await claim_one(queue)
        rid = claim.request.id
        records = [answer_of(rid, i, i + 1) for i in range(length)]
        await queue.write([Write(claim.lease, record) for record in records])
        key = f"quire:2:{{s0}}:t:{rid}"
        used = int(redis_server.ask("MEMORY", "USAGE", key, "SAMPLES", 0).lstrip(":"))
        assert 10 < used / length <= 100, length
        await append(queue, claim.lease, stop_at(length))


async def test_what_a_woken_holder_does_not_take_is_taken_by_another(
    redis_server: RedisServer,
    redis_queues: Queues,
    passes: Passes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the holder was woken once: if it hung, others looked again after half a second or more.
    Here they look again after minutes.
    """
    monkeypatch.setattr("service.queues.redis.claims.LOOK_AGAIN", 10 * PATIENCE)
    limits = replace(LIMITS, lease=30 * PATIENCE)
    hanging, other, api = (redis_queues(redis_server.url, limits) for _ in range(3))
    holder, free = make_engine("holder"), make_engine("free")
    assert await hanging.claim(holder, limit=1, wait=0.01) == [], "it waits from now on"
    await hanging.hold(holder.id, ["a"])
    claiming = asyncio.create_task(other.claim(free, limit=1, wait=PATIENCE))
    waiting = f"quire:2:{{s0}}:waiting:{holder.numeric_class}\n{' '.join(holder.features)}"
    with Redis(port=redis_server.port) as redis:
        async with asyncio.timeout(PATIENCE):
            while (
                redis.zcard(waiting) != 2
                or not redis.pubsub_shardnumsub("quire:2:{s0}:m:free")[0][1]
            ):
                await asyncio.sleep(0.01)
    submission = replace(make_submission(), prefixes=(("a",),))
    await api.submit(submission)
    await passes(RESERVED_FOR + 0.01)
    async with asyncio.timeout(PATIENCE):
        (claim,) = await claiming
    assert claim.request.id == submission.requests[0].id


async def test_only_changes_of_what_is_held_are_sent(
    redis_server: RedisServer, redis_queues: Queues
) -> None:
    """And all of it from time to time, and if a call failed."""
    queue = redis_queues(redis_server.url, LIMITS)
    held, sent = queue._held, list[tuple[list[str], list[str]]]()
    run = queue._client.run

    async def record(commands: Sequence[tuple[Any, ...]], **options: Any) -> list[Any]:
        arguments = json.loads(commands[0][4])
        sent.append((arguments["added"], arguments["removed"]))
        if len(sent) == 3:
            raise Unavailable("away")
        return await run(commands, **options)

    queue._client.run = record  # type: ignore[method-assign]
    for prefixes in (["a", "b"], ["b", "a"], ["b", "c"], [], ["d"]):
        with suppress(Unavailable):
            await queue.hold("e", prefixes)
    assert sent == [(["a", "b"], []), (["c"], ["a"]), ([], ["b", "c"]), (["d"], ["b", "c"])]
    held._refresh_at["e"] = 0.0
    await queue.hold("e", ["d"])
    assert sent[4:] == [(["d"], [])]
    with Redis(port=redis_server.port) as redis:
        keys = {key.decode() for key in redis.keys("*:h:*")}
        assert keys == {"quire:2:{s0}:h:d"}
        assert 0 < redis.pttl("quire:2:{s0}:h:d") <= 1000 * HELD_FOR


async def test_a_key_s_limits_are_the_cluster_s(
    redis_server: RedisServer, redis_queues: Queues, passes: Passes
) -> None:
    """Replicas share its minute; and a meter is gone when its time is over."""
    replicas = [redis_queues(redis_server.url, LIMITS) for _ in range(2)]
    allowance = Allowance(key="a", requests_per_minute=3, tokens_per_minute=6000, max_in_flight=3)
    waits = [(await replicas[i % 2].charge(allowance)).wait for i in range(4)]
    assert [wait > 0 for wait in waits] == [False, False, False, True]
    submissions = [make_submission(allowance=allowance) for _ in range(4)]
    replies = [await replicas[i % 2].submit(each) for i, each in enumerate(submissions)]
    assert [reply.status for reply in replies] == ["ok", "ok", "ok", "tenant"]
    await replicas[0].stop([each.requests[0].id for each in submissions], FinishReason.CANCELLED)
    left = int(redis_server.ask("PTTL", "quire:2:{s0}:k:a:requests").lstrip(":"))
    assert 59_000 < left <= 60_000
    await passes(1)
    assert redis_server.ask("EXISTS", "quire:2:{s0}:k:a:tokens") == ":0"
    assert redis_server.ask("EXISTS", "quire:2:{s0}:adm") == ":0"


async def test_nothing_is_left_in_redis_after_the_resume_window(
    redis_server: RedisServer, redis_queues: Queues, passes: Passes
) -> None:
    queue = redis_queues(redis_server.url, LIMITS)
    for _ in range(3):
        await queue.submit(make_submission(2))
        for claim in await queue.claim(make_engine(), limit=2, wait=0):
            await finish(queue, claim, length=2)
    await passes(max(LIMITS.resume_window, LIMITS.idempotency_ttl) + 0.1)
    await queue.sweep()
    assert (await queue.depth()).stored_bytes == 0
    await passes(LIMITS.sweep_pause + 0.1)
    kept = 4  # the queues' streams with their groups, and the engines heard of
    async with asyncio.timeout(PATIENCE):  # it expires keys in the background
        while int(redis_server.ask("DBSIZE").lstrip(":")) > kept:
            await asyncio.sleep(0.05)
    for priority in range(3):
        assert redis_server.ask("XLEN", f"quire:2:{{s0}}:q{priority}") == ":0"
    assert redis_server.ask("EXISTS", "quire:2:{s0}:adm") == ":0"


async def test_time_without_sweeps_deserts_nobody(
    redis_server: RedisServer, redis_queues: Queues, passes: Passes
) -> None:
    """While Redis was down there were no heartbeats: grace periods start again."""
    queue = redis_queues(redis_server.url, LIMITS)
    await queue.sweep()
    submission = make_submission(grace=0.6)
    await queue.submit(submission)
    await passes(0.7)
    redis_server.ask("DEL", "quire:2:{s0}:swept")  # it expires without a sweep
    assert await queue.sweep() == 0
    await passes(0.1)
    assert await queue.sweep() == 0
    await passes(0.6)
    assert await queue.sweep() == 1
    assert redis_server.ask("EXISTS", "quire:2:{s0}:left") == ":0"
    assert redis_server.ask("PTTL", "quire:2:{s0}:swept") != ":-1"


async def test_a_claim_whose_reply_was_lost_is_handed_out_again(
    redis_server: RedisServer, redis_queues: Queues
) -> None:
    """The call is cancelled after it was sent: the script has run and its reply is lost."""
    queue = redis_queues(redis_server.url, LIMITS)
    await queue.claim(make_engine(), limit=1, wait=0)  # connected
    await queue.submit(make_submission(2))
    cancelled = 0
    while (await queue.depth()).queued_requests:
        claiming = asyncio.ensure_future(queue.claim(make_engine(), limit=2, wait=0))
        for _ in range(3 + cancelled):
            await asyncio.sleep(0)
        if claiming.done():
            break
        claiming.cancel()
        cancelled += 1
        await asyncio.sleep(0.02)
    again = await queue.claim(make_engine(), limit=2, wait=0)
    found = [*again, *(await claiming if not claiming.cancelled() else ())]
    assert cancelled
    assert len(found) == 2
    assert {claim.attempt for claim in found} == {1}
    assert {claim.lease.epoch for claim in found} == {1}
    for claim in found:
        await finish(queue, claim, length=1)


async def test_two_replicas_share_everything(
    redis_server: RedisServer, redis_queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.queues.redis.journal.LOOK_AGAIN", 2 * PATIENCE)
    api, engine = (redis_queues(redis_server.url, LIMITS) for _ in range(2))
    submission = make_submission()
    waiting = asyncio.create_task(claim_one(engine, wait=2 * PATIENCE))
    await asyncio.sleep(0.05)
    await api.submit(submission)
    claim = await waiting
    following = asyncio.ensure_future(anext(aiter(api.follow(submission.requests[0].id))))
    await asyncio.sleep(0.05)
    await append(engine, claim.lease, make_tokens([1]))
    async with asyncio.timeout(PATIENCE):  # woken: shorter than the time to look again
        assert await following == make_tokens([1])
    assert await api.engines() == [make_engine()]


async def test_readers_of_one_answer_share_its_pages(
    redis_server: RedisServer, redis_queues: Queues
) -> None:
    """A hundred readers from any position: each page is asked for and decoded once."""
    queue = redis_queues(redis_server.url, LIMITS)
    submission = make_submission()
    rid = submission.requests[0].id
    await queue.submit(submission)
    lease = (await claim_one(queue)).lease
    records = [answer_of(rid, i, i + 1) for i in range(1000)]
    await queue.write([Write(lease, record) for record in records[:600]])

    async def replay(start: int) -> int:
        count = start
        while page := await queue.read_page(rid, after=count):
            assert [record.start for record in page] == list(range(count, count + len(page)))  # type: ignore[union-attr]  # no end among them
            count += len(page)
        return count

    redis_server.ask("CONFIG", "RESETSTAT")
    assert await asyncio.gather(*(replay(i) for i in range(100))) == [600] * 100
    num_complete, first = 600 // PAGE_TOKENS, await num_calls(queue, "xrange")
    assert first < num_complete + 100  # the last page is not complete: it is read again
    assert await asyncio.gather(*(replay(i) for i in range(100))) == [600] * 100
    assert await num_calls(queue, "xrange") < first + 100
    await queue.write([Write(lease, record) for record in records[600:]])
    await append(queue, lease, stop_at(1000))
    redis_server.ask("CONFIG", "RESETSTAT")
    ends = await asyncio.gather(*(queue.read_page(rid, after=i * 10) for i in range(101)))
    assert ends[-1] == [stop_at(1000)]
    assert await num_calls(queue, "xrange") == 1000 // PAGE_TOKENS + 1 - num_complete


async def num_calls(queue: RedisQueue, command: str) -> int:
    (info,) = await queue._client.run([("INFO", "commandstats")])
    return int(info.get(f"cmdstat_{command}", {"calls": 0})["calls"])


async def test_pages_are_kept_within_their_bound() -> None:
    """Those used last stay; a page that is larger than the bound is read each time."""
    fetched: list[int] = []

    async def fetch(request_id: str, number: int) -> Page:
        fetched.append(number)
        size = 100 if request_id == "small" else 100_000
        return Page(JournalState(ended=True, count=1), (), stored_bytes=size)

    size = Page(JournalState(ended=True, count=1), (), stored_bytes=100).size
    pages = PageCache(fetch, max_bytes=3 * size)
    for number in (0, 1, 2):
        await pages.read("small", number)
    assert pages.get("small", 0) is not None
    await pages.read("small", 3)
    assert [number for number in range(4) if pages.get("small", number)] == [0, 2, 3]
    for _ in range(2):
        assert pages.get("large", 0) is None
        await pages.read("large", 0)
    assert fetched == [0, 1, 2, 3, 0, 0]
    await asyncio.gather(*(pages.read("small", 9) for _ in range(5)))
    assert fetched[6:] == [9]


async def test_garbage_is_dropped_and_counted(
    redis_server: RedisServer, redis_queues: Queues, counts: Counts
) -> None:
    queue = redis_queues(redis_server.url, LIMITS)
    prefix = "quire:2:{s0}:"
    good, bad, odd = (make_submission() for _ in range(3))
    for submission in (bad, good, odd):
        await queue.submit(submission)
    redis_server.ask("XADD", prefix + "q0", "*", "what", "ever")
    redis_server.ask("XADD", prefix + "q0", "*", "rid", "s0-nobody.0")
    redis_server.ask("XADD", prefix + "q1", "*", "rid", good.requests[0].id)
    redis_server.ask("SET", prefix + "r:s0-string.0", "not a hash")
    redis_server.ask("XADD", prefix + "q2", "*", "rid", "s0-string.0")
    redis_server.ask("HSET", prefix + f"r:{bad.requests[0].id}", "body", "{")
    redis_server.ask("HSET", prefix + "engines", "x", "no time")
    claims = await queue.claim(make_engine(), limit=8, wait=0)
    assert [claim.request.id for claim in claims] == [good.requests[0].id, odd.requests[0].id]
    (end,) = await queue.read(bad.requests[0].id)
    assert end.error == "malformed_request"  # type: ignore[union-attr]  # an End: the only record
    assert counts[QueueEvent.DROPPED] == 5
    rid = good.requests[0].id
    redis_server.ask("XADD", prefix + f"t:{rid}", "0-7", "k", "garbage")
    await finish(queue, claims[0], length=1)
    assert list(await queue.read(rid)) == [answer_of(rid, 0, 1), stop_at(1)]
    assert counts[QueueEvent.DROPPED] == 6
    assert await queue.engines() == [make_engine()]
    assert counts[QueueEvent.DROPPED] == 7
    (group,) = await queue.engine_groups()
    assert (group.info, group.engines) == (make_engine().without_load(), 1)
    assert counts[QueueEvent.DROPPED] == 8


async def test_reports_of_other_versions_are_summed_up(
    redis_server: RedisServer, redis_queues: Queues
) -> None:
    """They name no group, or are in another order, or have new fields."""
    queue = redis_queues(redis_server.url, LIMITS)
    await queue.claim(make_engine("new", tokens_per_second=2.0), limit=0, wait=0)
    with Redis(port=redis_server.port) as redis:
        now = int(redis.time()[0]) * 1000
    report = json.dumps(asdict(make_engine("old", tokens_per_second=3.0)) | {"new": [1]})
    redis_server.ask("HSET", "quire:2:{s0}:engines", "old", f"{now} {report}")
    groups = await queue.engine_groups()
    assert {group.info for group in groups} == {make_engine().without_load()}
    assert sum(group.engines for group in groups) == 2
    assert sum(group.tokens_per_second for group in groups) == 5.0


async def test_what_is_stored_has_the_golden_formats(
    redis_server: RedisServer, redis_queues: Queues
) -> None:
    """The samples of the contract between versions are what Redis really holds."""
    queue = redis_queues(redis_server.url, replace(LIMITS, max_tokens=10_000))
    (request,) = make_submission().requests
    request = replace(REQUEST, id=request.id)
    submission = replace(make_submission(), requests=(request,), manifest=MANIFEST.to_json())
    submission = replace(submission, id=request.id.removesuffix(".0"))
    await queue.submit(submission)
    prefix, newest = "quire:2:{s0}:", {name: texts[-1] for name, texts in golden().items()}
    with Redis(port=redis_server.port) as redis:
        stored = str(redis.hget(prefix + f"r:{request.id}", "body"), "utf-8")
        assert stored == newest["request"].replace(REQUEST.id, request.id)
        assert str(redis.hget(prefix + f"s:{submission.id}", "man"), "utf-8") == newest["manifest"]
        further = [name for name in request.features if name not in ENGINE.features]
        served = (*ENGINE.features, *further)
        (claim,) = await queue.claim(replace(ENGINE, features=served), limit=1, wait=0)
        assert claim.request == request
        told = str(redis.hget(prefix + "engines", ENGINE.id), "utf-8")
        assert told.partition(" ")[2] == encode_report(replace(ENGINE, features=served))
        assert encode_report(ENGINE) == newest["engine"]
        await append(queue, claim.lease, SCORED)
        await append(queue, claim.lease, TOKENS)
        await append(queue, claim.lease, replace(END, count=TOKENS.end))
        entries = redis.xrange(prefix + f"t:{request.id}")
    found = [(field, value) for _, fields in entries for field, value in fields.items()]
    assert found == [
        (b"k", bytes.fromhex(newest["scored_tokens"])),
        (b"k", bytes.fromhex(newest["tokens"])),
        (b"e", newest["end"].encode()),
    ]


async def test_records_of_a_later_version_are_served(
    redis_server: RedisServer, redis_queues: Queues, counts: Counts
) -> None:
    """Unknown fields were fatal: the request ended as malformed, the stream never ended."""
    queue = redis_queues(redis_server.url, LIMITS)
    later, wrong = make_submission(), make_submission()
    for submission in (later, wrong):
        await queue.submit(submission)
    for submission, change in ((later, {"new": {"a": 1}}), (wrong, {"max_tokens": "16"})):
        (request,) = submission.requests
        body = json.dumps(json.loads(request.to_json()) | change)
        redis_server.ask("HSET", f"quire:2:{{s0}}:r:{request.id}", "body", body)
    (claim,) = await queue.claim(make_engine(), limit=2, wait=0)
    assert claim.request == later.requests[0]
    (end,) = await queue.read(wrong.requests[0].id)
    assert end == End(count=0, reason=FinishReason.ERROR, error="malformed_request")
    assert counts == {QueueEvent.DROPPED: 1, QueueEvent.MALFORMED: 1}

    following = asyncio.create_task(collect(queue, claim.request.id))
    await append(queue, claim.lease, make_tokens([1]))
    stream = f"quire:2:{{s0}}:t:{claim.request.id}"
    redis_server.ask("XADD", stream, "1-1", "e", '{"r":"paused","z":1}')
    async with asyncio.timeout(PATIENCE):
        got = await following
    unknown = End(count=1, reason=FinishReason.ERROR, error="unknown_finish_reason")
    assert got == [make_tokens([1]), unknown]


async def collect(queue: RedisQueue, request_id: str) -> list[Record]:
    return [record async for record in queue.follow(request_id)]


async def test_replies_are_counted(
    redis_server: RedisServer, redis_queues: Queues, counts: Counts, passes: Passes
) -> None:
    queue = redis_queues(redis_server.url, LIMITS)
    await queue.submit(make_submission())
    claim = await claim_one(queue)
    for record in (make_tokens([1]), make_tokens([1]), make_tokens([1], start=5)):
        await append(queue, claim.lease, record)
    await passes(OVER)
    await claim_one(queue, make_engine("other"), wait=PATIENCE)
    await append(queue, claim.lease, make_tokens([1], start=1))
    expected = {QueueEvent.DUP, QueueEvent.GAP, QueueEvent.FENCED, QueueEvent.RECLAIMED}
    assert counts == dict.fromkeys(expected, 1)


# --- the parts ------------------------------------------------------------------------------
async def test_the_server_of_the_tests_may_be_used(
    redis_server: RedisServer, redis_queues: Queues
) -> None:
    await redis_queues(redis_server.url, LIMITS).open()


GOOD = {"redis_version": "7.0.15", "maxmemory": 0, "maxmemory_policy": "x", "aof_enabled": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"redis_version": "6.2.14"}, "Redis >= 7"),
        ({"maxmemory": 1000, "maxmemory_policy": "allkeys-lru"}, "noeviction"),
        ({"aof_enabled": 0}, "appendonly"),
    ],
)
def test_a_server_that_breaks_promises_is_refused(change: dict[str, object], message: str) -> None:
    check_server(GOOD, allow_volatile=False)
    with pytest.raises(StartupError, match=message):
        check_server(GOOD | change, allow_volatile=False)


def test_a_volatile_server_may_be_allowed() -> None:
    check_server(GOOD | {"aof_enabled": 0}, allow_volatile=True)


@pytest.mark.parametrize(
    "query",
    [
        "shards=0",
        "shards=x",
        "allow_volatile=yes",
        "no_such_option=1",
        "db=x",
        "prefix=",
        "prefix=a:b",
    ],
)
def test_a_wrong_url_is_refused_without_showing_it(query: str) -> None:
    url = f"redis://user:hunter2@host:6379/0?{query}"
    with pytest.raises(StartupError) as caught:
        open_queue(url, LIMITS)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None or "hunter2" not in str(caught.value.__cause__)


@pytest.mark.parametrize("url", ["redis://u:hunter2@[::1/0", "redis://u:hun/ter2@host/0"])
def test_a_malformed_url_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(StartupError) as caught:
        open_queue(url, LIMITS)
    assert "hun" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_an_absent_server_is_unavailable_at_once_and_unnamed(
    redis_queues: Queues, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    queue = redis_queues("redis://user:hunter2@127.0.0.1:1/0", LIMITS)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    with pytest.raises(Unavailable) as caught:
        await queue.submit(make_submission())
    assert loop.time() - begun < PATIENCE
    assert caught.value.code == "backend_unavailable"
    assert caught.value.retry_after
    following = asyncio.ensure_future(anext(aiter(queue.follow("s0-x.0"))))
    await asyncio.sleep(0.2)
    assert not following.done()  # a follower waits for Redis to come back
    following.cancel()
    assert "hunter2" not in caplog.text + str(caught.value)


def test_no_cut_record_is_taken_for_a_whole_one() -> None:
    whole = encode_tokens(
        Tokens(start=2, ids=(1, 300), text="né", digest=9, logprobs=(TokenLogprob(-1.0),) * 2)
    )
    for length in range(len(whole)):
        with pytest.raises(Malformed):
            decode_entry(b"4-0", {b"k": whole[:length]})
    for fields in ({}, {b"m": b"x"}, {b"k": b""}):
        with pytest.raises(Malformed):
            decode_entry(b"4-0", fields)
