"""Failover of Redis while connections stay open, and servers that are refused at the start.

A relay stands for the DNS name of the server: `behind` is what the name resolves to, and a change
of it affects new connections only, as with a real name.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis

from service.errors import StartupError, Unavailable
from service.messages import Record
from service.queues.contract import QueueLimits, SubmitStatus, WriteStatus
from service.queues.observer import QueueEvent
from service.queues.redis.queue import RedisQueue
from tests.cluster.redis_process import AOF, RedisServer, free_port
from tests.cluster.relay import Connection, Relay
from tests.queues.builders import (
    Counts,
    answer_of,
    append,
    claim_one,
    finish,
    make_submission,
    stop_at,
)
from tests.queues.contract import LIMITS
from tests.support.certificates import make_certificate, tls_options
from tests.support.waiting import PATIENCE, available, until

pytestmark = pytest.mark.slow

LogCapture = pytest.LogCaptureFixture
Queues = Callable[[str, QueueLimits], RedisQueue]
LONG = replace(LIMITS, lease=30.0, resume_window=60.0)
PASSWORD = "hunter2"


class HostName(Relay):
    """Passes each new connection to `behind`."""

    def __init__(self, behind: RedisServer) -> None:
        super().__init__()
        self.behind = behind

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def connect(self) -> Connection:
        return await asyncio.open_connection("127.0.0.1", self.behind.port)


@pytest.fixture
def primary(own_redis: RedisServer) -> RedisServer:
    own_redis.ask("CONFIG", "SET", "repl-diskless-sync-delay", "0")
    return own_redis


@pytest.fixture
async def replica(primary: RedisServer, tmp_path: Path) -> AsyncIterator[RedisServer]:
    """Of the primary, in step with it."""
    server = RedisServer(tmp_path / "replica", options=AOF)
    await asyncio.to_thread(server.start)
    server.ask("REPLICAOF", "127.0.0.1", primary.port)
    await until(lambda: in_step(server, primary))
    yield server
    server.close()


@pytest.fixture
async def name(primary: RedisServer) -> AsyncIterator[HostName]:
    async with HostName(primary) as relay:
        yield relay


async def collect(queue: RedisQueue, request_id: str) -> list[Record]:
    return [record async for record in queue.follow(request_id)]


def num_clients(server: RedisServer) -> int:
    """Open connections to it, pub/sub included, but not those of replicas and of this function."""
    with Redis(port=server.port) as admin:
        return sum(client["flags"] in {"N", "P"} for client in admin.client_list()) - 1


def num_channels(server: RedisServer) -> int:
    with Redis(port=server.port) as admin:
        return len(admin.pubsub_shardchannels())


def in_step(replica: RedisServer, primary: RedisServer) -> bool:
    """Whether the replica has all that the primary has."""
    with Redis(port=primary.port) as one, Redis(port=replica.port) as other:
        behind, ahead = other.info("replication"), one.info("replication")
    has = behind["slave_repl_offset"] if behind.get("master_link_status") == "up" else None
    return bool(has == ahead["master_repl_offset"])


def rewrites(server: RedisServer) -> bool:
    """Whether it is writing its append-only file anew."""
    with Redis(port=server.port) as admin:
        return bool(admin.info("persistence")["aof_rewrite_in_progress"])


def fail_over(primary: RedisServer, replica: RedisServer) -> None:
    """As Sentinel does: the replica is promoted, the old primary follows it. Nothing is closed."""
    assert replica.ask("REPLICAOF", "NO", "ONE") == "+OK"
    assert primary.ask("REPLICAOF", "127.0.0.1", replica.port) == "+OK"


async def test_a_demoted_primary_is_left_for_the_new_one(
    primary: RedisServer,
    replica: RedisServer,
    name: HostName,
    redis_queues: Queues,
    counts: Counts,
) -> None:
    """All connections to the old primary stay open and answer READONLY. Every call was
    refused until they were closed from outside. Here nothing closes them but the queue.
    """
    queue = redis_queues(name.url, LONG)
    await queue.open()
    await queue.submit(make_submission())
    claim = await claim_one(queue)
    rid = claim.request.id
    following = asyncio.create_task(collect(queue, rid))
    await append(queue, claim.lease, answer_of(rid, 0, 2))
    await asyncio.gather(*(queue.depth() for _ in range(8)))  # several connections in the pool
    await until(lambda: num_clients(primary) >= 4 and num_channels(primary))
    await until(lambda: in_step(replica, primary))
    fail_over(primary, replica)

    with pytest.raises(Unavailable) as caught:
        await queue.check()
    assert caught.value.code == "backend_unavailable"
    with pytest.raises(Unavailable):
        await queue.depth()  # a replica may be behind: it is not read either
    name.behind = replica
    await available(queue.check)
    assert (await append(queue, claim.lease, answer_of(rid, 2, 4))).status is WriteStatus.OK
    await until(lambda: num_clients(primary) == 0 and num_channels(replica))
    await append(queue, claim.lease, stop_at(4))
    async with asyncio.timeout(PATIENCE):
        got = await following
    assert got == [answer_of(rid, 0, 2), answer_of(rid, 2, 4), stop_at(4)]
    assert counts[QueueEvent.OUTAGE] == 1, "reads from the old primary count as no answer"


async def test_a_failover_costs_no_call(
    primary: RedisServer, replica: RedisServer, name: HostName, redis_queues: Queues
) -> None:
    """If the name leads to the new primary, calls that meet the old one are repeated there."""
    queue = redis_queues(name.url, replace(LONG, max_requests=8, max_per_tenant=8))
    for old, new in ((primary, replica), (replica, primary)):
        await asyncio.gather(*(queue.check() for _ in range(8)))
        await until(lambda: in_step(new, old))  # noqa: B023
        fail_over(old, new)
        name.behind = new
        submissions = [make_submission() for _ in range(8)]
        replies = await asyncio.gather(*(queue.submit(each) for each in submissions))
        assert {reply.status for reply in replies} == {SubmitStatus.OK}
        for _ in submissions:
            await finish(queue, await claim_one(queue), length=2)
        await until(lambda: num_clients(old) == 0)  # noqa: B023


async def test_the_check_is_a_write(
    primary: RedisServer, name: HostName, redis_queues: Queues
) -> None:
    """A server that only answers reads is not ready; one whose memory is full is."""
    queue = redis_queues(name.url, LONG)
    await queue.open()
    primary.ask("CONFIG", "SET", "maxmemory", "1mb")
    assert primary.ask("SET", "x", "y").startswith("-OOM")
    await queue.check()
    primary.ask("CONFIG", "SET", "maxmemory", "0")
    primary.ask("CONFIG", "SET", "min-replicas-to-write", "1")
    with pytest.raises(Unavailable):
        await queue.check()
    primary.ask("CONFIG", "SET", "min-replicas-to-write", "0")
    await queue.check()
    assert primary.ask("DBSIZE") == ":0"


async def test_a_server_that_loads_its_data_is_waited_for(
    primary: RedisServer, redis_queues: Queues
) -> None:
    queue = redis_queues(primary.url, LONG)
    await queue.submit(make_submission())
    for index in range(100):
        primary.ask("SET", f"key {index}", "v" * 1024)
    primary.ask("CONFIG", "SET", "rdbcompression", "no")
    primary.ask("BGREWRITEAOF")  # as a dump: while it loads one, the server answers clients
    base = primary.directory / "appendonlydir" / "appendonly.aof.2.base.rdb"
    await until(lambda: base.exists() and not rewrites(primary))
    primary.kill()
    slow = (*AOF, "--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024")
    loading = RedisServer(primary.directory, options=slow, first_reply="-LOADING")
    loading.port = primary.port
    try:
        await asyncio.to_thread(loading.start)
        with pytest.raises(StartupError, match="still loading"):
            await redis_queues(primary.url, LONG).open()
        with pytest.raises(Unavailable):
            await queue.check()
        await available(queue.check)
        await finish(queue, await claim_one(queue), length=1)
    finally:
        loading.close()


# --- servers that are refused at the start ----------------------------------------------------
async def refusal_of(queue: RedisQueue) -> str:
    with pytest.raises(StartupError) as caught:
        await queue.open()
    assert caught.value.__cause__ is None
    text = str(caught.value)
    assert "\n" not in text
    return text


def assert_no_secret(text: str, *servers: RedisServer) -> None:
    """Neither a message nor a log line may name the address or the credentials."""
    for secret in (PASSWORD, "127.0.0.1", "alice", *(str(server.port) for server in servers)):
        assert secret not in text


async def test_a_replica_is_refused_at_the_start(
    primary: RedisServer, replica: RedisServer, redis_queues: Queues, caplog: LogCapture
) -> None:
    caplog.set_level("DEBUG")
    text = await refusal_of(redis_queues(replica.url, LONG))
    assert "read-only replica" in text
    assert_no_secret(text + caplog.text, replica, primary)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (f":{PASSWORD}@{{}}/0", None),
        (f"alice:{PASSWORD}@{{}}/0", "credentials"),
        (":wrong@{}/0", "credentials"),
        ("{}/0", "credentials"),
        (f":{PASSWORD}@{{}}/99", "no database with the number"),
        (f":{PASSWORD}@{{}}/?db=99", "no database with the number"),
        (f":{PASSWORD}@{{}}/one", "number of a database"),
    ],
)
async def test_credentials_and_database_are_checked_at_the_start(
    place: str,
    message: str | None,
    own_redis: RedisServer,
    redis_queues: Queues,
    caplog: LogCapture,
) -> None:
    caplog.set_level("DEBUG")
    own_redis.ask("CONFIG", "SET", "requirepass", PASSWORD)
    url = "redis://" + place.format(f"127.0.0.1:{own_redis.port}")
    if message is None:
        await redis_queues(url, LONG).open()
        return
    if "one" in place:
        with pytest.raises(StartupError, match=message):
            redis_queues(url, LONG)
        return
    text = await refusal_of(redis_queues(url, LONG))
    assert message in text
    assert_no_secret(text + caplog.text, own_redis)


async def test_a_user_without_permissions_is_refused_at_the_start(
    own_redis: RedisServer, redis_queues: Queues
) -> None:
    own_redis.ask("ACL", "SETUSER", "alice", "on", f">{PASSWORD}", "+@read", "+info", "~*")
    text = await refusal_of(
        redis_queues(f"redis://alice:{PASSWORD}@127.0.0.1:{own_redis.port}/0", LONG)
    )
    assert "lacks permissions" in text
    assert_no_secret(text, own_redis)


async def test_a_unix_socket_may_be_used(tmp_path: Path, redis_queues: Queues) -> None:
    socket = tmp_path / "socket"
    server = RedisServer(tmp_path / "redis", options=(*AOF, "--unixsocket", str(socket)))
    server.start()
    try:
        queue = redis_queues(f"unix://{socket}?db=1", LONG)
        await queue.open()
        await queue.submit(make_submission())
        await finish(queue, await claim_one(queue), length=2)
    finally:
        server.close()
    text = await refusal_of(redis_queues(f"unix://{tmp_path}/none", LONG))
    assert "cannot be opened" in text
    assert str(tmp_path) not in text


async def test_an_absent_server_is_refused_at_the_start(redis_queues: Queues) -> None:
    port = free_port()
    text = await refusal_of(redis_queues(f"redis://:{PASSWORD}@127.0.0.1:{port}/0", LONG))
    assert "no server accepts connections" in text
    assert PASSWORD not in text
    assert str(port) not in text


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two certificates, one for the server's address and one for another address."""
    folder = tmp_path_factory.mktemp("certificates")
    make_certificate(folder, "right", address="127.0.0.1")
    make_certificate(folder, "other", address="127.0.0.2")
    return folder


@pytest.fixture
def tls_server(
    request: pytest.FixtureRequest, certificates: Path, tmp_path: Path
) -> Iterator[tuple[RedisServer, int]]:
    """A server with the certificate that the parameter names, and its TLS port."""
    port = free_port()
    options = tls_options(certificates / f"{request.param}.pem", port=port)
    server = RedisServer(tmp_path / "tls", options=(*AOF, *options))
    server.start()
    yield server, port
    server.close()


@pytest.mark.parametrize(
    ("tls_server", "url", "message"),
    [
        ("right", "rediss://127.0.0.1:{tls}/0?ssl_ca_certs={folder}/right.pem", None),
        ("right", "rediss://127.0.0.1:{tls}/0", "not signed by a known authority"),
        ("right", "rediss://127.0.0.1:{tls}/0?ssl_ca_certs={folder}/other.pem",
         "not signed by a known authority"),
        ("other", "rediss://127.0.0.1:{tls}/0?ssl_ca_certs={folder}/other.pem",
         "not valid for the host"),
        ("right", "rediss://127.0.0.1:{tls}/0?ssl_ca_certs={folder}/none.pem", "cannot be opened"),
        ("right", "rediss://127.0.0.1:{tls}/0?ssl_ca_certs={folder}/right.key", "TLS handshake"),
        ("right", "rediss://127.0.0.1:{plain}/0", "redis://"),
        ("right", "redis://127.0.0.1:{tls}/0", "rediss://"),
    ],
    indirect=["tls_server"],
)  # fmt: skip
async def test_certificates_are_checked_at_the_start(
    tls_server: tuple[RedisServer, int],
    url: str,
    message: str | None,
    certificates: Path,
    redis_queues: Queues,
    caplog: LogCapture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("DEBUG")
    server, tls = tls_server
    if "plain" in url:  # it waits for a handshake that never comes
        monkeypatch.setattr("service.queues.redis.servers.CONNECT_TIMEOUT", 1.0)
    queue = redis_queues(url.format(tls=tls, plain=server.port, folder=certificates), LONG)
    if message is None:
        await queue.open()
        return
    text = await refusal_of(queue)
    assert message in text
    assert_no_secret(text + caplog.text, server)
    assert str(tls) not in text + caplog.text
    assert str(certificates) not in text + caplog.text
