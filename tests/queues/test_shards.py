"""Queues of several servers: the contract over each kind of URL, with one primary per shard."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from service.queues.contract import Queue
from service.queues.redis.sharded import open_redis
from tests.cluster.redis_process import valkey
from tests.cluster.redis_sets import Cluster, Independent, RedisSet, SentinelSet
from tests.queues.builders import Counts
from tests.queues.contract import LIMITS, Passes, QueueContract

pytestmark = pytest.mark.slow

ONE_SHARD = {
    "test_higher_priorities_and_older_ones_come_first",
    "test_tenants_take_turns",
    "test_a_full_engine_takes_requests_of_under_served_tenants",
    "test_suspects_are_isolated_in_one_engine_half_of_them_at_a_time",
    "test_stop_ends_in_every_state_and_once",
    "test_a_last_attempt_is_made_alone_and_others_are_not_blamed",
    "test_a_begun_answer_stays_in_its_numeric_class",
    "test_kept_submissions_make_room_for_new_ones",
    "test_turns_and_priorities_are_older_than_prefixes",
    "test_the_tenant_that_keeps_most_makes_room",
}
"""Laws of the order of claims and evictions and of the lane, which hold within a shard."""

MakeSet = Callable[[Path], RedisSet]


@pytest.fixture(scope="class")
def redis_set(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisSet]:
    make: MakeSet = request.cls.make
    servers = make(tmp_path_factory.mktemp("set"))
    try:
        servers.start()
        yield servers
    finally:
        servers.close()


@pytest.fixture
async def queue(
    redis_set: RedisSet,
    counts: Counts,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Queue]:
    redis_set.empty()
    if request.function.__name__ in ONE_SHARD:
        monkeypatch.setattr("tests.queues.builders.random_slot", lambda: 7)
    queue = open_redis(redis_set.url, LIMITS, counts)
    yield queue
    await queue.close()


@pytest.fixture
def passes(redis_set: RedisSet) -> Passes:
    async def advance(seconds: float) -> None:
        redis_set.advance(seconds)

    return advance


class TestThreeServers(QueueContract):
    """All of the contract over three independent servers."""

    @staticmethod
    def make(folder: Path) -> RedisSet:
        return Independent(folder, frozen_clock=True)


@pytest.mark.longer
class TestCluster(QueueContract):
    """All of the contract over a Redis Cluster of three nodes."""

    @staticmethod
    def make(folder: Path) -> RedisSet:
        return Cluster(folder, frozen_clock=True)


@pytest.mark.longer
class TestValkeyCluster(QueueContract):
    """All of the contract over a Valkey cluster of three nodes."""

    @staticmethod
    def make(folder: Path) -> RedisSet:
        return Cluster(folder, frozen_clock=True, program=valkey())


@pytest.mark.longer
class TestSentinel(QueueContract):
    """All of the contract over a primary that Sentinels watch, and its replica."""

    @staticmethod
    def make(folder: Path) -> RedisSet:
        servers = SentinelSet(folder, frozen_clock=True)
        servers.url += "?wait=1"
        return servers
