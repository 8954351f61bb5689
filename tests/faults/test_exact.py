"""A real model whose engines are killed: outputs equal those of an undisturbed run exactly.

float32, the reference runner, one thread: one numeric class. Greedy and at temperature 0.8.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.checker import check_all
from tests.cluster.cluster import Cluster, Timings
from tests.cluster.streams import Streams
from tests.support.tiny_model import TinyModel

pytestmark = pytest.mark.faults

KILLS = 3


def make_bodies(cluster: Cluster, rng: random.Random) -> list[dict[str, Any]]:
    """Text prompts, with penalties that make each token depend on all before it."""
    return [
        {
            "model": cluster.model.name,
            "prompt": rng.choice(["the quick brown", "1234 def f(x):", "你好 é"]) * 3 + f" {i}",
            "max_tokens": 90,
            "temperature": temperature,
            "seed": rng.randrange(2**31),
            "presence_penalty": rng.choice([0.0, 0.5]),
            "repetition_penalty": rng.choice([1.0, 1.2]),
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        for i, temperature in enumerate((0.0, 0.8) * 4)
    ]


async def test_rows_1_and_16_with_a_real_model(
    tiny_model: TinyModel, tmp_path: Path, rng: random.Random
) -> None:
    model = tiny_model.write_folder(tmp_path / "tiny")
    flags = {"runner": "torch", "dtype": "float32", "threads": 1}
    flags |= {"kv-memory": "8MiB", "max-batch-tokens": 64}
    cluster = Cluster(
        tmp_path / "cluster",
        model,
        fork_server=None,
        timings=Timings(),
        num_apis=1,
        engine_flags=flags,
    )
    try:
        await asyncio.to_thread(cluster.start)
        bodies = make_bodies(cluster, rng)
        undisturbed = await Streams(cluster.client, bodies).wait_ended()
        reference = {each.body["seed"]: each.tokens for each in undisturbed}
        assert all(len(tokens) == 90 for tokens in reference.values())
        assert len({tuple(tokens) for tokens in reference.values()}) == len(bodies)
        transcripts = list(undisturbed)
        for kill in range(KILLS):
            streams = Streams(cluster.client, bodies)
            calls = await streams.wait_started(2 + 10 * kill)
            victim = max(cluster.engines, key=lambda e: e.metric("quire_sequences_running"))
            victim.kill()
            replacement = cluster.replace(victim)
            transcripts += await streams.wait_ended()
            assert any(cluster.deaths(call) == 1 for call in calls)
            await asyncio.to_thread(replacement.wait_until_ready)
        reasons = await check_all(
            cluster, transcripts, expected=lambda body: reference[body["seed"]]
        )
        assert reasons == {"length": len(bodies) * (KILLS + 1)}
    finally:
        cluster.close()
