"""Clients that resume a response: many at the same time, and after a failover of Redis."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from service.bench.sse import call
from tests.cluster.client import Transcript
from tests.cluster.cluster import Cluster
from tests.cluster.streams import until
from tests.faults.proxy import replicated_redis
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.faults

Clusters = Callable[..., Cluster]
IDS = {"x-quire-event-ids": "1"}


@pytest.mark.parametrize(("clients", "tokens"), [(40, 2000), (200, 4000)])
async def test_many_clients_resume_one_long_answer_at_once(
    own_cluster: Clusters, rng: random.Random, *, clients: int, tokens: int
) -> None:
    """From the start and from any event; new requests are served meanwhile."""
    cluster = await asyncio.to_thread(own_cluster, num_engines=1, pace=0.0)
    address = cluster.client.next_address()
    body = cluster.body(rng, max_tokens=tokens)
    async with call(address, "POST", "/v1/completions", body=body, headers=IDS) as reply:
        call_id = reply.headers["x-request-id"]
        whole = [event async for event in reply.events()]
    raws = [event.raw for event in whole]
    assert whole[-2].finish_reason == "length"

    async def resume(number: int) -> None:
        index = number * (len(whole) - 3) // clients
        headers = {"last-event-id": whole[index - 1].id or ""} if index else {}
        async with call(address, "GET", f"/v1/streams/{call_id}", headers=headers) as reply:
            assert reply.status == 200, await reply.body()
            got = await reply.body()
        # Keep-alive comments may come between the events.
        assert got.replace(b": ping\n", b"") == b"".join(raws[index:])

    resuming = asyncio.gather(*(resume(number) for number in range(clients)))
    waits: list[float] = []
    while not resuming.done():
        began = time.monotonic()
        small = cluster.body(rng, max_tokens=2) | {"stream": False}
        async with call(address, "POST", "/v1/completions", body=small) as reply:
            assert reply.status == 200
            await reply.body()
        waits.append(time.monotonic() - began)
        await asyncio.sleep(0.05)
    await resuming
    assert len(waits) > 1
    assert max(waits) < 10


async def test_row_25_readers_come_back_after_a_failover_to_a_replica_that_lags(
    own_cluster: Clusters, rng: random.Random
) -> None:
    """The replica lacks a second of tokens that clients have, and the engines died with the old
    primary. Clients wait until other engines have written these tokens again; a client with
    different tokens is rejected.
    """
    cluster = await asyncio.to_thread(own_cluster, num_engines=0, num_apis=0, grace=20.0, lease=3.0)
    async with replicated_redis(cluster) as (front, link, replica):
        bodies = [cluster.body(rng, max_tokens=500) for _ in range(3)]
        readers = [Transcript(body) for body in bodies]
        reading = [asyncio.create_task(read(cluster, each)) for each in readers]
        await until(lambda: all(len(each.tokens) > 20 for each in readers), "they read")
        name = cluster.key(f"t:{readers[0].call_id}.0")
        await until(lambda: replica.ask("EXISTS", name) == ":1", "replicated")
        link.black_hole = True
        began = time.monotonic()
        seen = [len(each.tokens) for each in readers]
        await until(
            lambda: (
                time.monotonic() - began > 1
                and all(
                    len(each.tokens) > count + 20 for each, count in zip(readers, seen, strict=True)
                )
            ),
            "a second of tokens is not replicated",
        )
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        cluster.redis.kill()
        for engine in tuple(cluster.engines):
            engine.kill()
            cluster.start_engine(queue=front.redis_url)
        replica.ask("REPLICAOF", "NO", "ONE")
        cluster.redis = replica
        behind = [cluster.journalled(each.call_id or "") for each in readers]
        front.redirect(replica.port)
        front.cut()
        assert all(count < len(each.tokens) for count, each in zip(behind, readers, strict=True)), (
            "the journal lost tokens that clients have"
        )
        other = Transcript(readers[0].body, call_id=readers[0].call_id)
        other.events = readers[0].events[:30]
        wrong = f"{len(other.tokens)}.{int((other.last_id or '.')[-6:], 16) ^ 1:06x}"
        answers = await asyncio.gather(
            *(resume_to_end(cluster, each) for each in readers),
            resume_to_end(cluster, other, event_id=wrong),
        )

        assert [each[-1] for each in answers] == [200, 200, 200, 409]
        assert all({*each[:-1]} <= {503} for each in answers), "only 503 before"
        for each in readers:
            assert each.tokens == cluster.expected(each.body)
            assert each.finish_reason == "length"


async def read(cluster: Cluster, transcript: Transcript) -> None:
    """Reads one connection to its end."""
    address = cluster.client.next_address()
    async with call(address, "POST", "/v1/completions", body=transcript.body, headers=IDS) as reply:
        assert reply.status == 200
        transcript.call_id = reply.headers["x-request-id"]
        async for event in reply.events():
            transcript.events.append(event)


async def resume_to_end(
    cluster: Cluster, transcript: Transcript, *, event_id: str | None = None
) -> list[int]:
    """Resumes until the end, retrying after 503. Returns the statuses."""
    headers = {"last-event-id": event_id or transcript.last_id or ""}
    statuses: list[int] = []
    async with asyncio.timeout(PATIENCE):
        while not statuses or statuses[-1] == 503:
            path = f"/v1/streams/{transcript.call_id}"
            address: Any = cluster.client.next_address()
            async with call(address, "GET", path, headers=headers) as reply:
                statuses.append(reply.status)
                if reply.status == 503:
                    assert (await reply.json())["error"]["code"] in CODES
                    await asyncio.sleep(float(reply.headers["retry-after"]))
                elif reply.status == 200:
                    async for event in reply.events():
                        transcript.events.append(event)
    return statuses


CODES = {"backend_unavailable", "journal_behind"}
