"""API replicas whose drain timeout expires: clients continue at another replica."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from service.bench.sse import DONE, Address, call
from tests.cluster.checker import check_rest
from tests.cluster.cluster import Cluster
from tests.cluster.streams import until

pytestmark = pytest.mark.faults

Body = dict[str, Any]


async def test_row_15_a_replica_that_is_out_of_time_names_what_to_read_on_by(
    own_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    """Clients without event ids, streamed or not, lose no token."""
    cluster = await asyncio.to_thread(own_cluster, num_apis=2, pace=0.02, drain=0.5, grace=10.0)
    leaving, other = cluster.apis
    bodies = [cluster.body(rng, max_tokens=300) for _ in range(6)]
    streamed, collected = bodies[:3], [body | {"stream": False} for body in bodies[3:]]
    address, elsewhere = leaving.address("API"), other.address("API")
    asking = [asyncio.create_task(stream(address, body)) for body in streamed]
    asking += [asyncio.create_task(collect(address, body)) for body in collected]
    name = "quire_sequences_running"
    await until(lambda: sum(e.metric(name) for e in cluster.engines) == len(bodies), "all run")
    leaving.terminate()
    for asked, body in zip(asking, bodies, strict=True):
        tokens, error = await asked
        path = f"/v1/streams/{error['request_id']}"
        assert f"GET {path}" in error["message"]
        if "last_event_id" in error:
            assert error["last_event_id"].startswith(f"{len(tokens)}.")
            path += f"?after={error['last_event_id']}"
        async with call(elsewhere, "GET", path) as reply:
            assert reply.status == 200
            rest = [event async for event in reply.events()]
        assert rest[-1].data == DONE
        tokens += [token for event in rest for token in event.tokens]
        assert tokens == cluster.expected(body)
    assert await asyncio.to_thread(leaving.exit_code) == 0
    cluster.apis.remove(leaving)
    await check_rest(cluster)


async def stream(address: Address, body: Body) -> tuple[list[int], dict[str, str]]:
    """The tokens and the error that ends them."""
    async with call(address, "POST", "/v1/completions", body=body) as reply:
        assert reply.status == 200
        *before, last = [event async for event in reply.events()]
        error: dict[str, str] = last.json()["error"]
        assert error["code"] == "shutting_down"
        assert error["request_id"] == reply.headers["x-request-id"]
        return [token for event in before for token in event.tokens], error


async def collect(address: Address, body: Body) -> tuple[list[int], dict[str, str]]:
    """No tokens, and the error that is returned instead."""
    async with call(address, "POST", "/v1/completions", body=body) as reply:
        assert reply.status == 503
        assert int(reply.headers["retry-after"]) >= 1
        error: dict[str, str] = (await reply.json())["error"]
        assert error["code"] == "shutting_down"
        assert "last_event_id" not in error
        return [], error
