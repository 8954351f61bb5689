"""`quire serve` with two real models: the default one and a tiny one, in one process."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT, free_port, wait_until_ready
from tests.support.tiny_model import TinyModel
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.slow

LARGE, TINY, ALIAS = "smollm2-135m-instruct", "tiny", "gpt-4o-mini"
CHAT = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 12, "seed": 1}


@pytest.fixture(scope="module")
def server(
    default_model: Path, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """The URLs of its API and of its admin port."""
    folder = tmp_path_factory.mktemp("two")
    log, ports = folder / "log", (free_port(), free_port())
    command = [
        sys.executable, "-m", "service", "serve",
        "--model", f"{LARGE}={default_model}",
        "--model", f"{TINY}={tiny_model.write_folder(folder / 'model')}",
        "--model-alias", f"{ALIAS}={LARGE}",
        "--model-memory", "3,1", "--kv-memory", "48MiB",
        "--port", str(ports[0]), "--admin-port", str(ports[1]),
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    api, admin = (f"http://127.0.0.1:{port}" for port in ports)
    try:
        wait_until_ready(api, process, log=log)
        yield api, admin
    finally:
        process.terminate()
        assert process.wait(timeout=PATIENCE) == 0, log.read_text()


async def content(client: httpx.AsyncClient, model: str, **fields: Any) -> str:
    reply = await client.post("/v1/chat/completions", json=CHAT | {"model": model} | fields)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


async def test_each_model_answers_the_same_beside_the_other(server: tuple[str, str]) -> None:
    """Steps of the two take turns: what one of them computes does not depend on the other."""
    api, admin = server
    async with httpx.AsyncClient(base_url=api, timeout=PATIENCE) as client:
        asked = [(model, seed) for model in (LARGE, TINY) for seed in range(3)]
        alone = [await content(client, model, seed=seed) for model, seed in asked]
        together = await asyncio.gather(
            *(content(client, model, seed=seed) for model, seed in asked)
        )
        assert together == alone
        assert len(set(alone)) > 3
        assert await content(client, ALIAS, seed=0) == alone[0]
        metrics = (await client.get(f"{admin}/metrics")).text
    for model in (LARGE, TINY):
        finished = rf'quire_requests_finished_total\{{model="{model}",reason="\w+"\}} [1-9]'
        assert re.search(finished, metrics), model
        assert f'quire_engines{{model="{model}"}} 1.0' in metrics


async def test_what_depends_on_the_model_follows_it(server: tuple[str, str]) -> None:
    """Tokens, context length, attention, stored responses and streams."""
    async with httpx.AsyncClient(base_url=server[0], timeout=PATIENCE) as client:
        found = {}
        for model in (LARGE, TINY):
            named = {"model": model}
            tokens = (await client.post("/tokenize", json={"prompt": "colour"} | named)).json()
            text = await client.post("/detokenize", json={"tokens": tokens["tokens"]} | named)
            assert text.json()["prompt"] == "colour"
            body = {"tokens": tokens["tokens"][:2]} | named
            attention = (await client.post("/v1/attention", json=body)).json()
            body = {"input": "a", "seed": 1, "max_output_tokens": 16} | named
            stored = await client.post("/v1/responses", json=body)
            again = await client.get(f"/v1/responses/{stored.json()['id']}")
            assert again.json() == stored.json()
            stream = await client.post(
                "/v1/chat/completions",
                json=CHAT | named | {"stream": True},
                headers={"x-quire-event-ids": "1"},
            )
            resumed = await client.get(f"/v1/streams/{stream.headers['x-request-id']}")
            assert resumed.text == stream.text
            assert f'"model":"{model}"' in resumed.text
            found[model] = (
                tokens["max_model_len"],
                attention["num_layers"],
                stored.json()["model"],
            )
        listed = (await client.get("/v1/models")).json()["data"]
    assert [each["id"] for each in listed] == [LARGE, TINY, ALIAS]
    assert found[LARGE][1:] == (30, LARGE)
    assert found[TINY] == (128, 2, TINY)
