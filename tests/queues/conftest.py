"""Fixtures of the queue tests: a Redis for the session, and builders of queues over it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from service.queues.contract import QueueLimits
from service.queues.redis.queue import RedisQueue
from service.queues.redis.servers import shards_of
from tests.cluster.redis_process import RedisServer
from tests.cluster.redis_sets import UP
from tests.queues.builders import Counts, be_patient


@pytest.fixture(scope="session")
def redis_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"), frozen_clock=True)
    server.start()
    server.advance(UP)
    yield server
    server.close()


@pytest.fixture
def redis_server(redis_session: RedisServer) -> RedisServer:
    """The session's Redis, empty. Its clock stands still."""
    redis_session.ask("FLUSHALL")
    return redis_session


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    be_patient(monkeypatch)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that the test may harm; its clock stands still, too."""
    server = RedisServer(tmp_path / "redis", frozen_clock=True)
    server.start()
    server.advance(UP)
    yield server
    server.close()


@pytest.fixture
def counts() -> Counts:
    """The events that the queues of the test reported."""
    return Counts()


RedisQueues = Callable[..., RedisQueue]


@pytest.fixture
async def redis_queues(counts: Counts) -> AsyncIterator[RedisQueues]:
    """Makes queues (replicas, if several) over a URL; closes them after the test."""
    made: list[RedisQueue] = []

    def make(url: str, limits: QueueLimits) -> RedisQueue:
        made.append(RedisQueue(limits, shard=shards_of(url)[0], observer=counts))
        return made[-1]

    yield make
    for queue in made:
        await queue.close()
