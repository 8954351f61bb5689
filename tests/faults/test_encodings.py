"""An engine that encodes is killed in mid-batch: another one finishes the batch, bit for bit."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.checkpoint.fetch import default_cache, resolve
from tests.cluster.cluster import Cluster, Timings
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.faults

TEXT = "a cat sleeps on the warm sofa while basalt cools under old rivers and é 😀 rest"
NUM_INPUTS = 200  # of one request, since they have fewer than 8192 tokens
ATTEMPTS = 10
LIMIT = 3 * PATIENCE  # of one batch


def make_inputs(rng: random.Random) -> list[str]:
    return [" ".join(rng.choices(TEXT.split(), k=rng.randint(1, 60))) for _ in range(NUM_INPUTS)]


class Embedder:
    """Embeds in the background and reads the state of the call."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model

    async def begin(self, inputs: list[str]) -> str:
        body = {
            "model": self._model, "input": inputs, "encoding_format": "base64", "background": True
        }  # fmt: skip
        reply = await self._client.post("/v1/embeddings", json=body)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["id"])

    async def state(self, call_id: str) -> dict[str, Any]:
        reply = await self._client.get(f"/v1/encodings/{call_id}")
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    async def vectors(self, call_id: str) -> list[str]:
        """The result, once it is complete."""
        async with asyncio.timeout(LIMIT):
            while (found := await self.state(call_id))["status"] != "completed":
                assert found["error"] is None, found
                await asyncio.sleep(0.2)
        assert found["completed"] == found["inputs"] == NUM_INPUTS
        return [each["embedding"] for each in found["result"]["data"]]


async def killed_in_the_middle(cluster: Cluster, embedder: Embedder, call_id: str) -> int:
    """Kills the engine of the call once some inputs are done. Returns how many engines of it died:
    0 if it had all results already.
    """
    async with asyncio.timeout(LIMIT):
        while not cluster.journalled(call_id):
            await asyncio.sleep(0.002)
    victim = max(cluster.engines, key=lambda each: each.metric("quire_sequences_running"))
    victim.kill()
    replacement = cluster.replace(victim)
    await embedder.vectors(call_id)
    await asyncio.to_thread(replacement.wait_until_ready)
    return cluster.deaths(call_id)


async def test_a_kill_in_the_middle_of_a_batch_loses_nothing_and_changes_no_bit(
    tmp_path: Path, rng: random.Random
) -> None:
    """The engine may have ended its part before the kill arrives: then the batch is sent again."""
    cluster = Cluster(
        tmp_path / "cluster",
        resolve("all-minilm-l6-v2", cache=default_cache()),
        fork_server=None,
        timings=Timings(),
        num_apis=1,
        engine_flags={"threads": 1, "max-batch-tokens": 256},
    )
    try:
        await asyncio.to_thread(cluster.start)
        ((host, port),) = cluster.addresses()
        url = f"http://{host}:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            embedder = Embedder(client, cluster.model.name)
            inputs = make_inputs(rng)
            undisturbed = await embedder.vectors(await embedder.begin(inputs))
            for _ in range(ATTEMPTS):
                call_id = await embedder.begin(inputs)
                died = await killed_in_the_middle(cluster, embedder, call_id)
                assert await embedder.vectors(call_id) == undisturbed
                if died:
                    break
            assert died
    finally:
        cluster.close()
