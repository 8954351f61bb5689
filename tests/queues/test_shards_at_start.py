"""A process that starts while a server of its queue is down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from service.errors import StartupError, Unavailable
from service.messages import Submission
from service.queues.contract import Claim, Queue, SubmitStatus
from service.queues.redis.keys import shard_of
from service.queues.redis.sharded import open_redis
from tests.cluster.redis_sets import Independent
from tests.queues.builders import (
    finish,
    make_engine,
    make_submission,
)
from tests.queues.contract import LIMITS
from tests.support.waiting import PATIENCE, available

pytestmark = pytest.mark.slow


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Independent]:
    """Three, of which the second one is down."""
    servers = Independent(tmp_path)
    try:
        for server in servers.servers:
            if server is not servers.servers[1]:
                server.start()
        yield servers
    finally:
        servers.close()


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Queue]:
    queue = open_redis(url, replace(LIMITS, lease=10 * PATIENCE))
    try:
        await queue.open()
        yield queue
    finally:
        await queue.close()


def submission_of(shard: int) -> Submission:
    while True:
        submission = make_submission()
        if shard_of(submission.id, shards=3) == shard:
            return submission


async def answer(queue: Queue, submission: Submission) -> None:
    """From the submission to the end of the answer."""
    reply = await available(lambda: queue.submit(submission))
    assert reply.status in {SubmitStatus.OK, SubmitStatus.EXISTS}
    claims: Sequence[Claim] = ()
    async with asyncio.timeout(PATIENCE):
        while not claims:  # the engine may not know yet that the server is back
            claims = await available(lambda: queue.claim(make_engine(), limit=1, wait=0.01))
    (claim,) = claims
    assert claim.request == submission.requests[0]
    await finish(queue, claim, length=1)


async def test_a_process_starts_with_the_servers_that_are_there(
    servers: Independent, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(servers.url) as queue:
        assert "shard 2 of 3 is away: queue: Redis cannot be used: no server" in caplog.text
        await queue.check()
        for shard in (0, 2):
            await answer(queue, submission_of(shard))
        with pytest.raises(Unavailable):
            await queue.submit(submission_of(1))
        servers.servers[1].start()
        await answer(queue, submission_of(1))
        assert [info.id for info in await queue.engines()] == [make_engine().id]


async def test_a_server_that_comes_later_is_checked(
    servers: Independent, caplog: pytest.LogCaptureFixture
) -> None:
    """It keeps no append-only file, so answers in it could be lost: nothing is stored there."""
    late = servers.servers[1]
    late.options = ()
    async with opened(servers.url) as queue:
        late.start()

        async with asyncio.timeout(PATIENCE):
            while "set appendonly yes" not in caplog.text:
                with pytest.raises(Unavailable):
                    await queue.submit(submission_of(1))
        assert late.info("keyspace") == {}
        await answer(queue, submission_of(0))


async def test_without_any_server_there_is_no_start(servers: Independent) -> None:
    for server in servers.servers:
        server.close()
    with pytest.raises(StartupError, match="no server accepts connections"):
        async with opened(servers.url):
            pass


async def test_a_wrong_server_ends_the_start_beside_one_that_is_away(servers: Independent) -> None:
    """It will not become right by itself."""
    wrong = servers.servers[2]
    wrong.close()
    wrong.options = ()
    wrong.start()
    with pytest.raises(StartupError, match="appendonly"):
        async with opened(servers.url):
            pass
