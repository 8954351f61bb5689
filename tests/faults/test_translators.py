"""An engine that translates is killed in mid-stream: another one continues the answer."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.cluster import Cluster, Timings
from tests.cluster.processes import Replica
from tests.support.translators import train_translator
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.faults

ATTEMPTS = 10
NUM_TOKENS = 400
LIMIT = 3 * PATIENCE  # of one stream


def running(engine: Replica) -> float:
    return engine.metric("quire_sequences_running")


async def streamed(cluster: Cluster, client: httpx.AsyncClient, *, kills: bool) -> tuple[str, int]:
    """The text of one answer, and how many engines of it died. If `kills`, the one that runs it is
    killed when the first text arrives.
    """
    body: dict[str, Any] = {
        "model": cluster.model.name, "prompt": "the 5th of May, 1990", "max_tokens": NUM_TOKENS,
        "temperature": 0, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    text, replacement = "", None
    async with asyncio.timeout(LIMIT), client.stream("POST", "/v1/completions", json=body) as reply:
        call_id = reply.headers["x-request-id"]
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            text += event["choices"][0]["text"]
            if kills and replacement is None and text:
                victim = max(cluster.engines, key=running)
                victim.kill()
                replacement = cluster.replace(victim)
    if replacement is not None:
        await asyncio.to_thread(replacement.wait_until_ready)
    return text, cluster.deaths(call_id)


async def test_a_kill_in_the_middle_of_a_translation_changes_no_token(tmp_path: Path) -> None:
    """The engine may have made all tokens before the kill arrives: then it is tried again."""
    cluster = Cluster(
        tmp_path / "cluster",
        await asyncio.to_thread(train_translator, tmp_path),
        fork_server=None,
        timings=Timings(),
        num_apis=1,
        engine_flags={"threads": 1, "runner": "torch", "dtype": "float32", "kv-memory": "32MiB"},
    )
    try:
        await asyncio.to_thread(cluster.start)
        ((host, port),) = cluster.addresses()
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=PATIENCE) as client:
            undisturbed, _ = await streamed(cluster, client, kills=False)
            assert len(undisturbed) > NUM_TOKENS / 2
            for _ in range(ATTEMPTS):
                text, deaths = await streamed(cluster, client, kills=True)
                assert text == undisturbed
                if deaths:
                    break
            assert deaths
    finally:
        cluster.close()
