"""A call of as many questions as OpenAI takes: an engine is killed in its middle."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.cluster import Cluster, Timings
from tests.support.tiny_model import TinyModel
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.faults

NUM_QUESTIONS = 400
NUM_ALONE = 6
ATTEMPTS = 10
LIMIT = 3 * PATIENCE  # of one call


def make_questions(rng: random.Random) -> list[dict[str, Any]]:
    """Each of another prompt, a third of them with options of several tokens."""
    found: list[dict[str, Any]] = []
    for number in range(NUM_QUESTIONS):
        asked = f"{number} {rng.randrange(10**6)}"
        if number % 3:
            found.append({"type": "predicate", "instructions": asked})
        else:
            values = [f"{letter}{rng.randrange(1000)}" for letter in "abc"]
            levels = [{"label": value} for value in values]
            found.append({"type": "score", "instructions": asked, "levels": levels})
    return found


class Decider:
    """Decides in the background and reads the state of the call."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model

    async def begin(self, questions: list[dict[str, Any]]) -> str:
        body = {"model": self._model, "input": "x", "questions": questions, "background": True}
        reply = await self._client.post("/v1/decisions", json=body)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["id"])

    async def state(self, call_id: str) -> dict[str, Any]:
        reply = await self._client.get(f"/v1/decisions/{call_id}")
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    async def answers(self, call_id: str) -> list[str]:
        """The answers, once they are complete, to the last digit."""
        async with asyncio.timeout(LIMIT):
            while (found := await self.state(call_id))["status"] != "completed":
                assert found["error"] is None, found
                await asyncio.sleep(0.1)
        assert found["completed"] == found["inputs"]
        return [json.dumps(each) for each in found["result"]["answers"]]


async def killed_in_the_middle(cluster: Cluster, decider: Decider, call_id: str) -> int:
    """Kills the engine of the call once some answers are there. Returns how many requests lost
    their engine: 0 if it had answered all before the kill.
    """
    async with asyncio.timeout(LIMIT):
        while not (await decider.state(call_id))["completed"]:
            await asyncio.sleep(0.002)
    (victim,) = cluster.engines
    victim.kill()
    replacement = cluster.replace(victim)
    await decider.answers(call_id)
    await asyncio.to_thread(replacement.wait_until_ready)
    names = [cluster.key(f"r:{call_id}.{number}") for number in range(NUM_QUESTIONS)]
    return sum(int(cluster.ask("HGET", name, "deaths") or 0) for name in names)


async def test_a_kill_in_the_middle_of_a_decision_loses_nothing_and_changes_no_bit(
    tmp_path: Path, tiny_model: TinyModel, rng: random.Random
) -> None:
    """And each question has the bits that it has alone. The engine may have ended its part before
    the kill arrives: then other questions are asked.
    """
    folder = tiny_model.write_folder(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    cluster = Cluster(
        tmp_path / "cluster",
        folder,
        fork_server=None,
        timings=Timings(),
        num_engines=1,
        num_apis=1,
        engine_flags={"threads": 1, "max-batch-tokens": 32},
    )
    try:
        await asyncio.to_thread(cluster.start)
        ((host, port),) = cluster.addresses()
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=LIMIT) as client:
            decider = Decider(client, cluster.model.name)
            for _ in range(ATTEMPTS):
                questions = make_questions(rng)
                call_id = await decider.begin(questions)
                died = await killed_in_the_middle(cluster, decider, call_id)
                found = await decider.answers(call_id)
                assert await decider.answers(await decider.begin(questions)) == found
                for number in rng.sample(range(NUM_QUESTIONS), NUM_ALONE):
                    alone = await decider.answers(await decider.begin([questions[number]]))
                    assert alone == [found[number]]
                if died:
                    break
            assert died
    finally:
        cluster.close()
