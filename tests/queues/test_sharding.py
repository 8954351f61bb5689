"""What URLs name, calls to several shards at once, and where an engine looks for work."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from redis.crc import key_slot

from service.errors import StartupError, Unavailable
from service.queues.redis import fanout
from service.queues.redis.fanout import FanOut
from service.queues.redis.servers import shards_of
from service.queues.redis.work import FEW, MANY, OWN, Work
from tests.support.waiting import PATIENCE, until


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LATE", "AWAY_WAIT"):
        monkeypatch.setattr(fanout, name, 0.0)


class Shard:
    """Replies with its number once it may; fails if it is down."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.may = asyncio.Event()
        self.may.set()
        self.down = False
        self.calls = 0

    async def call(self) -> int:
        self.calls += 1
        await self.may.wait()
        if self.down:
            raise Unavailable("down", code="backend_unavailable")
        return self.number


@pytest.fixture
async def shards() -> list[Shard]:
    return [Shard(number) for number in range(3)]


def fan_out_over(shards: list[Shard]) -> FanOut:
    async def probe(shard: int) -> None:
        await shards[shard].call()

    return FanOut(probe)


async def test_a_shard_that_does_not_answer_delays_no_other(
    impatient: None, shards: list[Shard]
) -> None:
    fan_out = fan_out_over(shards)
    shards[1].may.clear()
    calls = {shard.number: shard.call for shard in shards}
    async with asyncio.timeout(PATIENCE):
        replies = await fan_out.all(calls)
    assert (replies[0], replies[2]) == (0, 2)
    assert isinstance(replies[1], Unavailable)
    assert not fan_out.is_there(1)
    again = await fan_out.all(calls)
    assert isinstance(again[1], Unavailable)
    assert shards[1].calls == 1, "the first call is still in flight"
    alone = await fan_out.all({1: shards[1].call})
    assert isinstance(alone[1], Unavailable)
    shards[1].may.set()
    await until(lambda: fan_out.is_there(1))
    assert (await fan_out.all(calls))[1] == 1
    await fan_out.close()


async def test_without_any_reply_all_are_waited_for(impatient: None, shards: list[Shard]) -> None:
    """A machine that stands still makes no shard late."""
    fan_out = fan_out_over(shards)
    for shard in shards:
        shard.may.clear()
    waiting = asyncio.create_task(fan_out.all({shard.number: shard.call for shard in shards}))
    await until(lambda: all(shard.calls for shard in shards))
    assert not waiting.done()
    for shard in shards:
        shard.may.set()
    assert await waiting == {0: 0, 1: 1, 2: 2}


async def test_a_shard_that_fails_is_away_until_it_replies(shards: list[Shard]) -> None:
    fan_out = fan_out_over(shards)
    shards[0].down = True
    replies = await fan_out.all({shard.number: shard.call for shard in shards})
    assert isinstance(replies[0], Unavailable)
    with pytest.raises(Unavailable):
        await fan_out.one(0, shards[0].call)
    assert not fan_out.is_there(0)
    shards[0].down = False
    await until(lambda: fan_out.is_there(0))
    await fan_out.close()


async def test_two_calls_in_flight_both_end(
    shards: list[Shard], caplog: pytest.LogCaptureFixture
) -> None:
    """Of two calls to one shard, the second one's end was an error in the event loop."""
    fan_out = fan_out_over(shards)
    shards[1].down = True
    for _ in range(2):
        fan_out._leave(1, asyncio.create_task(shards[1].call()))
    await until(lambda: not fan_out._in_flight)
    assert shards[1].calls == 2
    assert not caplog.records
    await fan_out.close()


async def test_closing_ends_the_calls_in_flight(impatient: None, shards: list[Shard]) -> None:
    fan_out = fan_out_over(shards)
    shards[0].may.clear()
    await fan_out.all({shard.number: shard.call for shard in shards})
    async with asyncio.timeout(PATIENCE):
        await fan_out.close()


# --- what a URL names -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://u:hunter2@a,,b/0", "host in the URL's list"),
        ("redis://u:hunter2@a,b/0?shards=1", "from 2 to 1024"),
        ("redis://u:hunter2@a/0?wait=x", "must be numbers"),
        ("redis://u:hunter2@a/0?wait=17", "from 0 to 16"),
        ("redis+sentinel://u:hunter2@a,b", "redis\\+sentinel://a,b,c/name"),
        ("redis+sentinel://u:hunter2@a:x/name", "malformed"),
        ("redis+sentinel://u:hunter2@a/name?sentinel_db=1", "sentinel_username"),
        ("redis+cluster://u:hunter2@a/3", "only database 0"),
    ],
)
def test_a_wrong_url_states_the_fix(url: str, message: str) -> None:
    with pytest.raises(StartupError, match=message) as caught:
        shards_of(url)
    assert "hunter2" not in str(caught.value)


async def test_a_url_names_shards_and_their_servers() -> None:
    def tags(url: str) -> list[str]:
        return [shard.keys.prefix.split(":")[2] for shard in shards_of(url)]

    assert tags("redis://a/0") == tags("redis+sentinel://a,b/name") == ["{s0}"]
    assert tags("redis://u:p@a,b:1,c/0?wait=1") == ["{s0}", "{s1}", "{s2}"]
    assert len({id(shard.server) for shard in shards_of("redis://a,b/0?shards=4")}) == 2
    assert tags("redis+sentinel://a,b/one,two/1") == ["{s0}", "{s1}"]
    for count in (1, 2, 3, 6, 100):
        shards = shards_of(f"redis+cluster://a,b?shards={count}")
        slots = [key_slot(shard.keys.admission.encode()) for shard in shards]
        assert [slot * count // 16384 for slot in slots] == list(range(count)), "one in each part"
    assert len(tags("redis+cluster://a")) == 3


# --- who looks where ------------------------------------------------------------------------
def fresh_work(count: int, engine: str = "engine") -> Work:
    shard: Any = SimpleNamespace(watch_work=lambda wake: None)
    work = Work([shard] * count, engine)
    work._reported.clear()
    return work


@pytest.mark.parametrize("count", [2, 5, 16])
def test_an_engine_looks_into_every_shard_in_turns(count: int) -> None:
    """Also into those that are not its own, and as often into one as into another."""
    work = fresh_work(count)
    for _ in range(count):
        work.waits_with(MANY + 1)
    assert work.num_own == min(OWN, count)
    firsts = [work.order()[0][0] for _ in range(8 * count * OWN)]
    assert set(firsts) == set(range(count))
    for _ in range(count):
        work.waits_with(FEW - 1)
    assert work.num_own == count


def test_shards_with_work_come_first_and_own_ones_before_others() -> None:
    work = fresh_work(16)
    work.num_own = 4
    own = {work.order()[index][0] for index in range(4)}
    other = next(shard for shard in range(16) if shard not in own)
    for shard in (other, min(own)):
        work.looked(shard, exhausted=False)
    order = work.order()
    assert order[:2] == [(min(own), True), (other, True)]
    assert sorted(shard for shard, _ in order) == list(range(16))
    assert not any(has_work for _, has_work in order[2:])
    work.looked(other, exhausted=True)
    assert work.order()[0] == (min(own), True)


def test_each_shard_has_engines_of_its_own() -> None:
    """Rendezvous hashing: 40 engines with 4 of 12 shards each leave none out."""
    owners = [0] * 12
    for engine in range(40):
        work = fresh_work(12, f"engine {engine}")
        work.num_own = 4
        for shard, _ in work.order()[:4]:
            owners[shard] += 1
    assert min(owners) >= 3
