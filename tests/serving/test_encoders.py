"""`quire serve` with the default model and MiniLM in one process: the example in docs/api.md."""

from __future__ import annotations

import asyncio
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from model.checkpoint.fetch import default_cache, resolve
from tests.conftest import ROOT, serving
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.slow

WRITER, ENCODER = "smollm2-135m-instruct", "all-minilm-l6-v2"
TEXTS = ["A cat sleeps.", "The kitten naps on the sofa.", "Basalt is a dark volcanic rock.", "é 😀"]


@pytest.fixture(scope="module")
def server(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of its API."""
    options = (
        "--model", f"{WRITER}={default_model}",
        "--model", f"{ENCODER}={resolve(ENCODER, cache=default_cache())}",
        "--kv-memory", "48MiB", "--threads", "1",
    )  # fmt: skip
    with serving(*options, log=tmp_path_factory.mktemp("encoders") / "log") as url:
        yield url


async def test_openai_reads_the_same_bits_in_both_encodings_alone_and_together(server: str) -> None:
    """While the other model of the process generates."""
    async with openai.AsyncOpenAI(
        base_url=f"{server}/v1", api_key="none", timeout=PATIENCE, max_retries=0
    ) as client:

        async def embed(given: Any, **options: Any) -> np.ndarray[Any, Any]:
            reply = await client.embeddings.create(model=ENCODER, input=given, **options)
            return np.array([item.embedding for item in reply.data], np.float32)

        writing = asyncio.create_task(
            client.completions.create(model=WRITER, prompt="Once", max_tokens=40, temperature=0)
        )
        together, *alone = await asyncio.gather(
            embed(TEXTS), *(embed(text, encoding_format="float") for text in TEXTS)
        )
        assert together.tobytes() == np.concatenate(alone).tobytes()
        backwards = await embed(TEXTS[::-1])
        assert backwards[::-1].tobytes() == together.tobytes()
        assert np.allclose((together.astype(float) ** 2).sum(axis=1), 1, atol=1e-2)
        similar, other = (together[:2] @ together[[1, 2]].T)[0]
        assert similar > 0.4 > other
        assert (await writing).choices[0].text


INPUT = "I was charged twice for one order. Give me my money back!"
QUESTIONS: list[Any] = [
    {"type": "predicate", "instructions": "The customer wants a refund."},
    {"type": "choice", "instructions": "What is it about?", "choices": [
        {"value": "billing"}, {"value": "delivery", "description": "Parcels"},
        {"value": "billing and delivery"}]},
    {"type": "score", "name": "mood", "instructions": "How angry is the customer?", "levels": [
        {"label": "calm"}, {"label": "annoyed"}, {"label": "furious"}]},
]  # fmt: skip


async def test_a_decision_has_the_same_bits_alone_under_load_and_in_any_order(server: str) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server}/v1", api_key="none", timeout=PATIENCE, max_retries=0
    ) as client:

        async def decide(*order: int) -> dict[int, Any]:
            asked = [QUESTIONS[number] for number in order]
            reply = await client.decisions.create(model=WRITER, input=INPUT, questions=asked)
            return dict(zip(order, reply.answers, strict=True))

        alone = {number: (await decide(number))[number] for number in range(3)}
        load = [
            client.completions.create(model=WRITER, prompt=f"{n} times", max_tokens=40, seed=n)
            for n in range(2)
        ]
        writing = [asyncio.create_task(each) for each in load]
        orders = [(2, 0, 1), (1, 2), (0,)]
        for found in await asyncio.gather(*(decide(*order) for order in orders)):
            for number, answer in found.items():
                assert answer.model_dump_json() == alone[number].model_dump_json()
        assert len(await asyncio.gather(*writing)) == 2
        await _check_by_prompt_logprobs(client, server, alone[0].probability)


async def _check_by_prompt_logprobs(
    client: openai.AsyncOpenAI, server: str, probability: float
) -> None:
    """The same from the log probabilities of prompts that have the answers."""
    asked = f"{INPUT}\n\n{QUESTIONS[0]['instructions']}\n\nIs this true? Answer yes or no."
    async with httpx.AsyncClient(base_url=server, timeout=PATIENCE) as plain:

        async def tokens(**body: Any) -> list[int]:
            reply = await plain.post("/tokenize", json={"model": WRITER, **body})
            return list(reply.json()["tokens"])

        prompt = await tokens(messages=[{"role": "user", "content": asked}])
        likely = []
        for option in ("yes", "no"):
            ids = await tokens(prompt=option, add_special_tokens=False)
            reply = await client.completions.create(
                model=WRITER, prompt=prompt + ids, max_tokens=0, echo=True, logprobs=0
            )
            assert reply.choices[0].logprobs is not None
            values = reply.choices[0].logprobs.token_logprobs or []
            likely.append(math.exp(sum(values[len(prompt) :])))
    assert probability == pytest.approx(likely[0] / sum(likely), rel=1e-4)


def test_the_example_of_the_documentation_answers(server: str) -> None:
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    variables = os.environ | {"QUIRE_URL": f"{server}/v1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, env=variables
    )
    assert run.returncode == 0, run.stderr
    document, answer = run.stdout.split("\n", 1)
    assert document.startswith("The Eiffel Tower")
    assert answer.strip()


async def test_the_models_say_what_they_are_for(server: str) -> None:
    async with httpx.AsyncClient(base_url=server, timeout=PATIENCE) as client:
        models = (await client.get("/v1/models")).json()["data"]
        assert {each["id"]: each["kind"] for each in models} == {
            WRITER: "generate",
            ENCODER: "embed",
        }
        chat = {"model": ENCODER, "messages": [{"role": "user", "content": "hello"}]}
        reply = await client.post("/v1/chat/completions", json=chat)
        assert reply.status_code == 400
        assert "/v1/embeddings" in reply.json()["error"]["message"]
