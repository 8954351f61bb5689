"""Faults of Redis under a serving cluster: streams continue, or end with an error."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.bench.sse import call
from tests.cluster.checker import check_all, check_rest
from tests.cluster.client import Transcript
from tests.cluster.cluster import AOF, Cluster
from tests.cluster.processes import run_command
from tests.cluster.redis_process import RedisServer, free_port
from tests.cluster.streams import Streams, until
from tests.faults.proxy import FaultProxy, replicated_redis
from tests.support.certificates import make_certificate, tls_options
from tests.support.waiting import GENEROUS, PATIENCE

pytestmark = pytest.mark.faults

Clusters = Callable[..., Cluster]


def bodies(cluster: Cluster, rng: random.Random, *, number: int, tokens: int) -> list[Any]:
    return [cluster.body(rng, max_tokens=tokens) for _ in range(number)]


def run_id(cluster: Cluster) -> str:
    info: dict[str, str] = cluster.ask("INFO", "server")
    return info["run_id"]


async def post(cluster: Cluster, body: dict[str, Any]) -> tuple[int, dict[str, str], float]:
    """Status, headers and duration."""
    began = time.monotonic()
    address = cluster.client.next_address()
    async with call(address, "POST", "/v1/completions", body=body) as reply:
        return reply.status, reply.headers, time.monotonic() - began


def are_prefixes(cluster: Cluster, transcripts: list[Transcript]) -> bool:
    """P1 and P2 if the journal itself was lost."""
    return all(
        each.tokens == cluster.expected(each.body)[: len(each.tokens)] for each in transcripts
    )


async def test_row_23_redis_is_killed_and_restarted(cluster: Cluster, rng: random.Random) -> None:
    """For less and for more than a lease: live engines keep their requests."""
    streams = Streams(cluster.client, bodies(cluster, rng, number=6, tokens=250))
    calls = await streams.wait_started()
    for down in (0.2, 1.5 * cluster.timings.lease):
        before = run_id(cluster)
        cluster.redis.kill()
        await asyncio.sleep(down)
        await asyncio.to_thread(cluster.redis.start)
        back = time.monotonic()
        assert run_id(cluster) != before
        open_ones = [each for each in streams.transcripts if not each.ended]
        seen = [len(each.tokens) for each in open_ones]
        await until(
            lambda: all(
                len(each.tokens) > count or each.ended
                for each, count in zip(open_ones, seen, strict=True)  # noqa: B023
            ),
            "all go on",
        )
        assert time.monotonic() - back < GENEROUS * 5
    await streams.wait_ended()
    assert all(cluster.deaths(each) == 0 for each in calls)
    assert await check_all(cluster, streams.transcripts) == {"length": 6}


async def test_row_24_redis_loses_its_last_writes(
    own_cluster: Clusters, rng: random.Random
) -> None:
    """Power loss: tokens that clients have received are cut off the append-only file."""
    cluster = await asyncio.to_thread(own_cluster)
    streams = Streams(cluster.client, bodies(cluster, rng, number=4, tokens=150))
    await streams.wait_started(20)
    cluster.redis.kill()
    (newest,) = (cluster.redis.directory / "appendonlydir").glob("*.incr.aof")
    with newest.open("r+b") as tail:
        tail.truncate(newest.stat().st_size - 6000)
    await asyncio.to_thread(cluster.redis.start)
    counts = [int(cluster.state_of_request(each, "n") or 0) for each in streams.call_ids]
    await streams.wait_ended()
    gaps = sum(engine.metric('quire_queue_events_total{event="gap"}') for engine in cluster.engines)
    assert gaps > 0, counts
    for each in streams.transcripts:
        assert each.finish_reason == "length" or each.error == "stream_divergence"
    await check_all(cluster, streams.transcripts, same_bytes=False)


async def test_row_25_failover_to_a_replica_that_lags(
    own_cluster: Clusters, rng: random.Random
) -> None:
    """The replica has the requests, but neither their claims nor tokens: epochs repeat, and nonces
    distinguish the old claims. The same tokens are generated again.
    """
    cluster = await asyncio.to_thread(own_cluster, num_engines=0, num_apis=0)
    async with replicated_redis(cluster) as (front, link, replica):
        for engine in cluster.engines:
            engine.pause()
        streams = Streams(cluster.client, bodies(cluster, rng, number=4, tokens=150))
        await until(lambda: replica.ask("ZCARD", cluster.key("since")) == ":4", "replicated")
        link.black_hole = True
        for engine in cluster.engines:
            engine.resume()
        calls = await streams.wait_started(10)
        assert all(cluster.state_of_request(each, "ep") == "1" for each in calls)
        cluster.redis.kill()
        replica.ask("REPLICAOF", "NO", "ONE")
        cluster.redis = replica
        assert all(cluster.state_of_request(each, "ep") == "0" for each in calls)
        front.redirect(replica.port)
        front.cut()
        await streams.wait_ended()
        for transcript in streams.transcripts:
            assert transcript.finish_reason == "length"
        refused = ('quire_queue_events_total{event="fenced"}', "quire_lost_leases_total")
        assert sum(engine.metric(name) for engine in cluster.engines for name in refused)
        await check_all(cluster, streams.transcripts, same_bytes=False)


async def test_row_26_redis_is_away_for_long(cluster: Cluster, rng: random.Random) -> None:
    """New requests are rejected soon, liveness succeeds, open streams are kept alive."""
    streams = Streams(cluster.client, bodies(cluster, rng, number=4, tokens=100))
    await streams.wait_started()
    before = run_id(cluster)
    cluster.redis.kill()
    for _ in range(3):
        status, headers, took = await post(cluster, cluster.body(rng))
        assert status == 503
        assert float(headers["retry-after"]) >= 1
        assert took < 10
        for path, expected in (("/health/live", 200), ("/health/ready", 503)):
            async with call(cluster.client.next_address(), "GET", path) as reply:
                assert reply.status == expected
        await asyncio.sleep(1)
    assert streams.num_ended == 0
    assert all(each.connections == 1 for each in streams.transcripts)
    await asyncio.to_thread(cluster.redis.start)
    assert run_id(cluster) != before
    await streams.wait_ended()
    assert all(each.connections == 1 for each in streams.transcripts), "a stream was broken off"
    assert await check_all(cluster, streams.transcripts) == {"length": 4}


async def test_row_27_redis_is_slow(own_cluster: Clusters, rng: random.Random) -> None:
    """A tenth of a lease per reply: slower, but no engine is fenced."""
    cluster = await asyncio.to_thread(own_cluster, num_engines=0, num_apis=0, lease=2.0)
    async with FaultProxy(cluster.redis.port) as proxy:
        url = proxy.redis_url
        await asyncio.to_thread(cluster.start_replicas, queue=url)
        proxy.delay = 0.2
        streams = Streams(cluster.client, bodies(cluster, rng, number=6, tokens=100))
        await streams.wait_ended()
        proxy.delay = 0.0
        for engine in cluster.engines:
            assert engine.metric("quire_lost_leases_total") == 0
            assert engine.metric("quire_fenced_writes_total") == 0
            assert engine.metric("quire_take_overs_total") == 0
        assert max(engine.metric("quire_journal_write_seconds_sum") for engine in cluster.engines)
        assert await check_all(cluster, streams.transcripts) == {"length": 6}


@pytest.mark.parametrize("lasting", [False, True])
async def test_row_28_redis_is_full(
    own_cluster: Clusters, rng: random.Random, *, lasting: bool
) -> None:
    cluster = await asyncio.to_thread(own_cluster)
    streams = Streams(cluster.client, bodies(cluster, rng, number=4, tokens=120))
    await streams.wait_started()
    cluster.ask("CONFIG", "SET", "maxmemory", "1mb")
    assert cluster.redis.ask("SET", "x", "y").startswith("-OOM")
    status, headers, _ = await post(cluster, cluster.body(rng))
    assert status == 503
    assert "retry-after" in headers
    if lasting:
        await streams.wait_ended()
        assert {each.error for each in streams.transcripts} == {"storage_full"}
    cluster.ask("CONFIG", "SET", "maxmemory", "0")
    after = Streams(cluster.client, bodies(cluster, rng, number=2, tokens=20))
    transcripts = await streams.wait_ended() + await after.wait_ended()
    ends = {"error": 4, "length": 2} if lasting else {"length": 6}
    assert await check_all(cluster, transcripts) == ends


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ((), "appendonly"),
        ((*AOF, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"), "noeviction"),
    ],
)
@pytest.mark.parametrize("command", ["api", "engine"])
async def test_row_29_a_redis_that_cannot_keep_the_promise(
    tmp_path: Path, folder_of_model: Path, *, command: str, options: tuple[str, ...], word: str
) -> None:
    server = RedisServer(tmp_path / "redis", options=options)
    await asyncio.to_thread(server.start)
    try:
        ports = ["--admin-port", "0", *(("--port", "0") if command == "api" else ())]
        places = ["--queue", server.url, "--model", str(folder_of_model)]
        replica = run_command(command, tmp_path / "log", *places, *ports)
        assert await asyncio.to_thread(replica.exit_code, seconds=60) == 2
        said = replica.log.read_text().strip()
        assert word in said
        assert "Traceback" not in said
    finally:
        server.close()


@pytest.mark.parametrize("command", ["api", "engine"])
@pytest.mark.parametrize(
    ("place", "word"),
    [
        ("redis://:wrong@127.0.0.1:{plain}/0", "credentials"),
        ("redis://:hunter2@127.0.0.1:{plain}/99", "database"),
        ("rediss://:hunter2@127.0.0.1:{tls}/0", "not signed by a known authority"),
        ("redis://:hunter2@127.0.0.1:{replica}/0", "read-only replica"),
        ("redis://:hunter2@127.0.0.1:1/0", "no server accepts connections"),
    ],
)
async def test_row_29_a_redis_that_cannot_be_used(
    tmp_path: Path, folder_of_model: Path, *, command: str, place: str, word: str
) -> None:
    """One line, without a traceback, a password or an address."""
    certificate = make_certificate(tmp_path, "redis", address="127.0.0.1")
    tls = free_port()
    password = ("--requirepass", "hunter2")
    replica_of = ("--replicaof", "127.0.0.1", "1")
    options = (*AOF, *password, *tls_options(certificate, port=tls))
    server = RedisServer(tmp_path / "redis", options=options, first_reply="-NOAUTH")
    options = (*AOF, *password, *replica_of)
    replica = RedisServer(tmp_path / "replica", options=options, first_reply="-NOAUTH")
    try:
        for each in (server, replica):
            await asyncio.to_thread(each.start)
        url = place.format(plain=server.port, tls=tls, replica=replica.port)
        ports = ["--admin-port", "0", *(("--port", "0") if command == "api" else ())]
        places = ["--queue", url, "--model", str(folder_of_model)]
        process = run_command(command, tmp_path / "log", *places, *ports)
        assert await asyncio.to_thread(process.exit_code, seconds=60) == 2
        said = process.log.read_text().strip()
        (line,) = said.splitlines()
        assert line.startswith("quire: queue: ")
        assert word in line
        for unwanted in ("Traceback", "hunter2", "wrong", "127.0.0.1", str(server.port), str(tls)):
            assert unwanted not in said
    finally:
        for each in (server, replica):
            each.close()


async def test_row_25_failover_that_keeps_connections_open(
    own_cluster: Clusters, rng: random.Random
) -> None:
    """The old primary follows the new one and answers READONLY, over connections that stay open.
    Replicas are not ready until the name leads to the new primary; then all answers go on.
    """
    cluster = await asyncio.to_thread(own_cluster, num_engines=0, num_apis=0)
    cluster.ask("CONFIG", "SET", "repl-diskless-sync-delay", "0")
    old = cluster.redis
    new = RedisServer(cluster.folder / "new", options=AOF)
    await asyncio.to_thread(new.start)
    new.ask("REPLICAOF", "127.0.0.1", old.port)
    async with FaultProxy(old.port) as front:
        try:
            url = f"redis://127.0.0.1:{front.port}/0"
            await asyncio.to_thread(cluster.start_replicas, queue=url)
            streams = Streams(cluster.client, bodies(cluster, rng, number=6, tokens=300))
            await streams.wait_started(10)
            link = cluster.key("engines")
            await until(lambda: new.ask("HLEN", link) == ":2", "replicated")
            new.ask("REPLICAOF", "NO", "ONE")
            old.ask("REPLICAOF", "127.0.0.1", new.port)
            cluster.redis = new
            await becomes(cluster, ready=503, reachable=0)
            front.redirect(new.port)
            await becomes(cluster, ready=200, reachable=1)
            await streams.wait_ended()
            assert await check_all(cluster, streams.transcripts) == {"length": 6}
        finally:
            cluster.redis = old
            new.close()


async def becomes(cluster: Cluster, *, ready: int, reachable: int) -> None:
    """Waits for these values of the API replica's probe and metric."""
    async with asyncio.timeout(PATIENCE):
        while True:
            async with call(cluster.client.next_address(), "GET", "/health/ready") as reply:
                status = reply.status
            metrics = await asyncio.to_thread(cluster.apis[0].metrics)
            if (status, metrics["quire_queue_reachable"]) == (ready, reachable):
                return
            await asyncio.sleep(0.05)


async def test_row_30_scripts_and_groups_vanish(cluster: Cluster, rng: random.Random) -> None:
    streams = Streams(cluster.client, bodies(cluster, rng, number=6, tokens=120))
    calls = await streams.wait_started()
    cluster.ask("SCRIPT", "FLUSH")
    assert cluster.ask("XGROUP", "DESTROY", cluster.key("q1"), "engines") == 1
    more = Streams(cluster.client, bodies(cluster, rng, number=4, tokens=30))
    transcripts = await streams.wait_ended() + await more.wait_ended()
    assert all(cluster.state_of_request(each, "ep") == "1" for each in calls)
    assert await check_all(cluster, transcripts) == {"length": 10}


async def test_row_30_everything_vanishes(own_cluster: Clusters, rng: random.Random) -> None:
    """After FLUSHALL open streams end with an error, soon; then all works as before."""
    cluster = await asyncio.to_thread(own_cluster)
    streams = Streams(cluster.client, bodies(cluster, rng, number=4, tokens=2000))
    await streams.wait_started()
    cluster.ask("FLUSHALL")
    flushed = time.monotonic()
    await streams.wait_ended()
    assert time.monotonic() - flushed < GENEROUS * 5
    assert {each.error for each in streams.transcripts} == {"journal_lost"}
    assert are_prefixes(cluster, streams.transcripts)
    assert cluster.apis[0].metric("quire_requests_lost_total") == 4
    await check_rest(cluster)
    after = Streams(cluster.client, bodies(cluster, rng, number=4, tokens=20))
    assert all(each.finish_reason == "length" for each in await after.wait_ended())
    assert are_prefixes(cluster, after.transcripts)
    await check_rest(cluster)


async def test_row_31_pubsub_connections_are_killed(cluster: Cluster, rng: random.Random) -> None:
    streams = Streams(cluster.client, bodies(cluster, rng, number=4, tokens=150))
    await streams.wait_started()
    killed = 0
    while not streams.num_ended:
        killed += cluster.ask("CLIENT", "KILL", "TYPE", "pubsub")
        await asyncio.sleep(0.2)
    assert killed >= 4
    await streams.wait_ended()
    assert await check_all(cluster, streams.transcripts) == {"length": 4}


async def test_row_39_garbage_in_the_queue(cluster: Cluster, rng: random.Random) -> None:
    """Engines drop it, count it and live."""
    streams = Streams(cluster.client, bodies(cluster, rng, number=4, tokens=80))
    await streams.wait_started()
    queue = cluster.key("q1")
    cluster.ask("XADD", queue, "*", "nonsense", "1")
    cluster.ask("XADD", queue, "*", "rid", "s0-nobody.0")
    cluster.ask("SET", cluster.key("r:s0-text.0"), "no hash")
    cluster.ask("XADD", queue, "*", "rid", "s0-text.0")
    cluster.ask("HSET", cluster.key("engines"), "e", "garbage")
    name = 'quire_queue_events_total{event="dropped"}'
    before = len(cluster.engines)
    await until(lambda: sum(e.metric(name) for e in cluster.engines) >= 3, "they are dropped")
    cluster.ask("DEL", cluster.key("r:s0-text.0"))
    await streams.wait_ended()
    assert sum(engine.is_up for engine in cluster.engines) == before
    assert await check_all(cluster, streams.transcripts) == {"length": 4}
