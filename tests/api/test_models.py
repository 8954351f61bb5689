"""Several models behind one API: which one a request is for, and what is not served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from model.text.tokenizer import Tokenizer
from service.api.http.context import ApiLimits, Models, ServedModel
from service.api.http.observer import ApiObserver
from service.app import build_app, served_model
from service.messages import FEATURES, ModelCard, model_feature
from service.queues.contract import QueueLimits
from service.queues.memory.queue import MemoryQueue
from tests.api.conftest import ScriptedEngine
from tests.support.fakes import ALL_WELL
from tests.support.waiting import PATIENCE

TEXT = {"prompt": "hello", "max_tokens": 3, "seed": 1}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
CALLS: dict[str, dict[str, Any]] = {
    "/v1/completions": TEXT,
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "hello", "max_output_tokens": 16},
    "/v1/messages": CHAT,
}
ASKING: dict[str, dict[str, Any]] = {
    **CALLS,
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [5]},
    "/v1/messages/count_tokens": {"messages": CHAT["messages"]},
}


@dataclass
class Several:
    """`small` and `large`, each with a scripted engine; `gone` are those without one."""

    queue: MemoryQueue
    cards: dict[str, ModelCard]
    app: Any
    client: httpx.AsyncClient
    gone: set[str] = field(default_factory=set)

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.client.post(path, json=body)


def token_of(name: str) -> int:
    """What the scripted engine of a model generates."""
    return {"small": 40, "large": 41}[name]


def engine_of(card: ModelCard, queue: MemoryQueue, tokenizer: Tokenizer) -> ScriptedEngine:
    engine = ScriptedEngine(
        queue, tokenizer, lambda request: [token_of(card.id)] * request.max_tokens
    )
    features = (*FEATURES, model_feature(card.key))
    engine.info = replace(engine.info, id=card.id, features=features)
    return engine


@pytest.fixture
async def several(tokenizer: Tokenizer) -> AsyncIterator[Several]:
    queue = MemoryQueue(QueueLimits(lease=10 * PATIENCE))
    cards = {
        name: ModelCard(
            id=name,
            max_model_len=length,
            vocab_size=tokenizer.vocab_size,
            numeric_class=f"class of {name}",
            created=1,
            vocabulary=tokenizer.digest,
        )
        for name, length in (("small", 200), ("large", 256))
    }
    gone: set[str] = set()

    def model(card: ModelCard) -> ServedModel:
        return served_model(tokenizer, lambda: card, served=lambda: card.id not in gone)

    app = build_app(
        queue,
        Models.of(*map(model, cards.values()), aliases={"gpt-4o-mini": "large"}),
        probes=ALL_WELL,
        limits=ApiLimits(),
        observer=ApiObserver(),
        version="0",
    )
    engines = [
        asyncio.create_task(engine_of(card, queue, tokenizer).run()) for card in cards.values()
    ]
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        client.timeout = httpx.Timeout(PATIENCE)
        yield Several(queue, cards, app, client, gone)
    for engine_task in engines:
        engine_task.cancel()
    await asyncio.gather(*engines, return_exceptions=True)


@pytest.mark.parametrize(
    ("asked", "model"),
    [("small", "small"), ("large", "large"), ("gpt-4o-mini", "large")],
)
async def test_the_model_that_a_request_names_answers(
    several: Several, tokenizer: Tokenizer, asked: str, model: str
) -> None:
    """An alias stands for a model, under whose own name the answer comes."""
    named = {"model": asked}
    reply = (await several.post("/v1/completions", TEXT | named)).json()
    assert reply["model"] == model
    assert reply["choices"][0]["text"] == tokenizer.decode([token_of(model)] * 3)
    for path, body in CALLS.items():
        reply = (await several.post(path, body | named)).json()
        assert reply["model"] == model, path
    counted = (await several.post("/tokenize", {"prompt": "hello"} | named)).json()
    assert counted["max_model_len"] == several.cards[model].max_model_len


async def test_the_first_model_answers_where_none_need_be_named(several: Several) -> None:
    response = (await several.post("/v1/responses", CALLS["/v1/responses"])).json()
    assert response["model"] == "small"
    counted = (await several.post("/tokenize", ASKING["/tokenize"])).json()
    assert counted["max_model_len"] == several.cards["small"].max_model_len


@pytest.mark.parametrize("path", ASKING)
async def test_an_unknown_model_is_404_in_the_shape_of_the_dialect(
    several: Several, path: str
) -> None:
    reply = await several.post(path, ASKING[path] | {"model": "huge"})
    error = reply.json()["error"]
    assert reply.status_code == 404
    if path.startswith("/v1/messages"):
        assert (reply.json()["type"], error["type"]) == ("error", "not_found_error")
    else:
        assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize("path", CALLS)
async def test_a_model_without_an_engine_is_503_and_the_others_answer(
    several: Several, path: str
) -> None:
    several.gone.add("large")
    for name in ("large", "gpt-4o-mini"):
        reply = await several.post(path, CALLS[path] | {"model": name})
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) >= 1
    assert (await several.post(path, CALLS[path] | {"model": "small"})).status_code == 200


async def test_the_list_has_what_engines_serve_now(several: Several) -> None:
    listed = (await several.client.get("/v1/models")).json()["data"]
    assert [(each["id"], each["root"]) for each in listed] == [
        ("small", "small"), ("large", "large"), ("gpt-4o-mini", "large"),
    ]  # fmt: skip
    several.gone.add("large")
    listed = (await several.client.get("/v1/models")).json()["data"]
    assert [each["id"] for each in listed] == ["small"]
    statuses = [
        (await several.client.get(f"/v1/models/{name}")).status_code
        for name in ("small", "large", "gpt-4o-mini", "huge")
    ]
    assert statuses == [200, 503, 503, 404]
    ready = await several.client.get("/health/ready")
    assert (ready.status_code, ready.json()["models"]) == (
        200, {"small": "ready", "large": "no engine"},
    )  # fmt: skip


async def test_what_needs_no_engine_needs_none(several: Several) -> None:
    several.gone.add("large")
    for path in ("/tokenize", "/detokenize", "/v1/messages/count_tokens"):
        reply = await several.post(path, ASKING[path] | {"model": "large"})
        assert reply.status_code == 200, path


async def test_stored_responses_and_streams_belong_to_their_model(several: Several) -> None:
    """A chain may change its model; an answer stays readable while its model has no engine."""
    first = (
        await several.post("/v1/responses", CALLS["/v1/responses"] | {"model": "large"})
    ).json()
    body = CALLS["/v1/responses"] | {"previous_response_id": first["id"]}
    second = (await several.post("/v1/responses", body)).json()
    assert (first["model"], second["model"]) == ("large", "small")
    several.gone.add("large")
    again = await several.client.get(f"/v1/responses/{first['id']}")
    assert again.json()["output"] == first["output"]
    streamed = await several.client.get(f"/v1/responses/{first['id']}?stream=true")
    assert streamed.status_code == 200
    assert '"model":"large"' in streamed.text.replace(" ", "")


async def test_an_answer_by_a_model_that_is_not_served_here_is_for_another_replica(
    several: Several,
) -> None:
    """As in a rolling change of the model. It can be deleted."""
    body = CALLS["/v1/responses"]
    stored = (
        await several.post("/v1/responses", CALLS["/v1/responses"] | {"model": "large"})
    ).json()
    context = several.app.state.context
    small = Models.of(context.models.table["small"])
    several.app.state.context = replace(context, models=small)
    path = f"/v1/responses/{stored['id']}"
    reply = await several.client.get(path)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_not_loaded")
    assert int(reply.headers["retry-after"]) >= 1
    assert (await several.client.delete(path)).status_code == 200
    # The same name with another tokenizer is another model.
    other = served_model(
        context.models.first.tokenizer, lambda: replace(several.cards["small"], vocabulary="other")
    )
    kept = (await several.post("/v1/responses", body)).json()
    several.app.state.context = replace(context, models=Models.of(other))
    reply = await several.client.get(f"/v1/responses/{kept['id']}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_not_loaded")
