"""The deployed Redis: the queue's contract holds for the one user that it has."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import AsyncIterator, Iterator

import pytest
from redis import Redis
from redis.exceptions import NoPermissionError

from service.queues import open_queue
from service.queues.contract import QueueLimits
from tests.deploy.conftest import PASSWORD, DeployedRedis
from tests.deploy.manifests import containers, get, render
from tests.queues.builders import be_patient, make_engine, make_submission
from tests.queues.contract import LIMITS, Passes, QueueContract
from tests.support.waiting import PATIENCE


@pytest.fixture(scope="module")
def deployed_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeployedRedis]:
    """One of this module's own, whose clock stands still."""
    server = DeployedRedis(tmp_path_factory.mktemp("frozen") / "redis", frozen_clock=True)
    server.start()
    server.advance(3600)
    yield server
    server.close()


@pytest.fixture
def empty(deployed_redis: DeployedRedis) -> DeployedRedis:
    """The deployed Redis without what the tests before left in it."""
    ours = Redis.from_url(deployed_redis.url)
    for key in ours.scan_iter("quire:*"):
        ours.unlink(key)
    ours.close()
    return deployed_redis


@pytest.fixture
async def queue(empty: DeployedRedis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[object]:
    """Opened as a replica does it."""
    be_patient(monkeypatch)
    queue = open_queue(empty.url, LIMITS)
    await queue.open()
    yield queue
    await queue.close()


def ask(client: Redis, *words: str) -> object:
    return client.execute_command(*words)  # type: ignore[no-untyped-call]  # the library's


@pytest.fixture
def passes(deployed_redis: DeployedRedis) -> Passes:
    async def advance(seconds: float) -> None:
        deployed_redis.advance(seconds)

    return advance


@pytest.mark.slow
class TestTheContractUnderTheAccessList(QueueContract):
    """All of it: no script, channel or reply needs a right that the user has not."""


async def test_an_orphan_counts_as_work(empty: DeployedRedis) -> None:
    """What the scaler's query rests on: an engine that died leaves its requests in the sum."""
    queue = open_queue(empty.url, QueueLimits(lease=0.05))
    await queue.open()
    submission = make_submission(2)
    await queue.submit(submission)
    assert len(await queue.claim(make_engine("dead"), limit=1, wait=0)) == 1
    empty.advance(0.1)
    depth = await queue.depth()
    assert (depth.queued_requests, depth.running_requests) == (1, 1)
    await queue.forget(submission.id)
    await queue.close()


def test_the_user_may_not_do_what_it_need_not(deployed_redis: DeployedRedis) -> None:
    client = Redis.from_url(deployed_redis.url)
    refused = [
        ("FLUSHALL",), ("CONFIG", "SET", "maxmemory-policy", "allkeys-lru"), ("SHUTDOWN",),
        ("KEYS", "*"), ("ACL", "SETUSER", "quire", "allkeys"), ("MONITOR",),
        ("SET", "another:key", "1"), ("PUBLISH", "another", "1"), ("REPLICAOF", "h", "1"),
    ]  # fmt: skip
    for command in refused:
        with pytest.raises(NoPermissionError):
            ask(client, *command)
    assert ask(client, "SET", "quire:test", "1")
    ask(client, "DEL", "quire:test")
    client.close()


@pytest.mark.parametrize("user", ["default", "quire", "nobody"])
def test_nobody_comes_in_without_the_password(deployed_redis: DeployedRedis, user: str) -> None:
    assert deployed_redis.ask("AUTH", user, "wrong").startswith("-WRONGPASS")
    assert deployed_redis.ask("GET", "quire:test").startswith("-NOAUTH")


def test_the_list_does_not_hold_the_password(deployed_redis: DeployedRedis) -> None:
    text = deployed_redis.acl.read_text()
    assert PASSWORD not in text
    assert re.search(r"^user quire on #[0-9a-f]{64} ", text, re.MULTILINE)
    assert deployed_redis.acl.stat().st_mode & 0o077 == 0


def test_its_configuration_is_what_replicas_demand(deployed_redis: DeployedRedis) -> None:
    client = Redis.from_url(deployed_redis.url)
    info = client.info()
    assert (info["aof_enabled"], info["maxmemory_policy"]) == (1, "noeviction")
    assert info["maxmemory"] > 0
    client.close()


def test_its_probe_is_answered_and_may_nothing_else(deployed_redis: DeployedRedis) -> None:
    (container,) = containers(get(render("cpu"), "StatefulSet", "quire-redis"), with_init=False)
    for probe in ("startupProbe", "readinessProbe"):
        shell, flag, line = container[probe]["exec"]["command"]
        here = line.replace("redis-cli", f"redis-cli -p {deployed_redis.port}", 1)
        assert subprocess.run([shell, flag, here], check=False, timeout=PATIENCE).returncode == 0
        nowhere = line.replace("redis-cli", "redis-cli -p 1", 1)
        refused = subprocess.run(
            [shell, flag, nowhere], check=False, timeout=PATIENCE, capture_output=True
        )
        assert refused.returncode != 0
    words = shlex.split(container["readinessProbe"]["exec"]["command"][2])
    assert words[words.index("--user") + 1] == "probe"
    client = Redis(port=deployed_redis.port, username="probe", password="-")
    assert client.ping()
    for command in (("GET", "quire:test"), ("INFO",)):
        with pytest.raises(NoPermissionError):
            ask(client, *command)
    client.close()
