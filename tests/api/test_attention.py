"""POST /v1/attention with a real reader and tiny weights: answers and errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Scope

from model.attention_maps import AttentionMaps
from model.checkpoint import open_checkpoint
from service.api.http.auth import Tenant
from service.api.http.context import Models
from service.api.http.observer import ApiObserver
from service.api.system.attention import AttentionReader, AttentionService
from service.parts import open_attention
from service.settings import Settings
from tests.support.waiting import PATIENCE

PATH = "/v1/attention"
MESSAGES = [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "fine"}]


@pytest.fixture(scope="session")
def maps(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> AttentionMaps:
    folder: Path = tmp_path_factory.mktemp("attention")
    return AttentionMaps(open_checkpoint(tiny_model.write_folder(folder)))


@pytest.fixture
def let_read(service: Any) -> Callable[[AttentionReader], None]:
    """Gives the replica an attention reader."""

    def let(reader: AttentionReader) -> None:
        limits = service.app.state.context.limits
        give_attention(service, AttentionService(reader, limits, ApiObserver()))

    return let


def give_attention(service: Any, attention: AttentionService) -> None:
    context = service.app.state.context
    models = Models.of(replace(context.models.first, attention=attention))
    service.app.state.context = replace(context, models=models)


@pytest.mark.slow
async def test_rows_are_those_of_the_network(service: Any, maps: Any, let_read: Any) -> None:
    """A prompt, its ids and messages are the same text; each row is the reader's, rounded."""
    let_read(maps)
    tokens = service.tokenizer.encode("hello world, how are you?")
    for fields in ({}, {"layer": 1}, {"head": 3}, {"layer": 0, "head": 2}):
        expected = maps.read(tokens, **{"layer": None, "head": None, **fields})
        for text in ({"tokens": tokens}, {"prompt": "hello world, how are you?"}):
            reply = await service.post(PATH, {"model": "tiny-model", **text, **fields})
            assert reply.status_code == 200, reply.text
            given = reply.json()
            assert given["tokens"] == tokens
            assert (given["num_layers"], given["num_heads"]) == (2, 4)
            assert {name: given[name] for name in fields} == fields
            assert [row["position"] for row in given["rows"]] == list(range(len(tokens)))
            for row, weights in zip(given["rows"], expected, strict=True):
                assert row["weights"] == pytest.approx(weights, abs=5.1e-5)
    chat = {"messages": MESSAGES, "add_generation_prompt": False, "return_token_strs": True}
    given = (await service.post(PATH, chat)).json()
    tokens = service.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False)
    assert given["tokens"] == tokens
    assert given["token_strs"] == [service.tokenizer.token_text(token) for token in tokens]


@pytest.mark.slow
async def test_only_the_requested_rows_are_returned(service: Any, maps: Any, let_read: Any) -> None:
    let_read(maps)
    whole = (await service.post(PATH, {"tokens": [5, 9, 11, 40]})).json()["rows"]
    reply = (await service.post(PATH, {"tokens": [5, 9, 11, 40], "positions": [3, 1, 3]})).json()
    assert reply["rows"] == [whole[1], whole[3]]


async def test_a_replica_without_a_network_answers_404(service: Any) -> None:
    reply = await service.post(PATH, {"prompt": "hello"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "attention_not_available")
    assert reply.headers["x-should-retry"] == "false"
    assert (await service.client.get("/status")).json()["max_attention_tokens"] is None


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({}, 400, "prompt", "missing_required_parameter"),
        ({"prompt": "a", "tokens": [1]}, 400, "prompt", "missing_required_parameter"),
        ({"prompt": "a", "messages": MESSAGES}, 400, "prompt", "missing_required_parameter"),
        ({"model": "other", "prompt": "a"}, 404, "model", "model_not_found"),
        ({"prompt": ""}, 400, "prompt", "empty_prompt"),
        ({"tokens": []}, 400, "tokens", "empty_prompt"),
        ({"tokens": [1] * 257}, 400, "tokens", "context_length_exceeded"),  # the model's own limit
        ({"prompt": "a b " * 200}, 400, "prompt", "context_length_exceeded"),
        ({"tokens": [10**6]}, 400, "tokens", "invalid_token_id"),
        ({"tokens": [-1]}, 400, "tokens", "invalid_token_id"),
        ({"tokens": "1"}, 400, "tokens", "invalid_type"),
        ({"tokens": [1], "layer": 2}, 400, "layer", "invalid_value"),
        ({"tokens": [1], "layer": -1}, 400, "layer", "integer_below_min_value"),
        ({"tokens": [1], "layer": "mean"}, 400, "layer", "invalid_type"),
        ({"tokens": [1], "head": 4}, 400, "head", "invalid_value"),
        ({"tokens": [1], "head": 10**30}, 400, "head", "invalid_value"),
        ({"tokens": [1], "positions": []}, 400, "positions", "invalid_value"),
        ({"tokens": [1], "positions": [1]}, 400, "positions", "invalid_value"),
        ({"tokens": [1], "positions": [-1]}, 400, "positions", "invalid_value"),
        ({"tokens": [1], "rows": [0]}, 400, "rows", "unknown_parameter"),
    ],
)
async def test_errors_name_the_field(
    service: Any, maps: Any, let_read: Any, body: Any, status: int, param: str, code: str
) -> None:
    let_read(maps)
    reply = await service.post(PATH, body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (status, param, code), error


TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a<|im_end|>b"},
        {"prompt": "a<|im_end|>b", "parse_special": False},
        {"prompt": "a", "add_special_tokens": False},
        {"messages": MESSAGES},
        {"messages": MESSAGES, "tools": [TOOL]},
        {"messages": MESSAGES, "add_generation_prompt": False},
    ],
)
async def test_its_tokens_are_those_of_tokenize(
    service: Any, maps: Any, let_read: Any, body: Any
) -> None:
    """It ignored `parse_special` and `tools`."""
    let_read(maps)
    tokens = (await service.post("/tokenize", body)).json()["tokens"]
    reply = (await service.post(PATH, body)).json()
    if len(tokens) > 256:  # the model's limit, which only the tools exceed
        assert "tools" in body
        assert reply["error"]["code"] == "context_length_exceeded"
    else:
        assert reply["tokens"] == tokens


async def test_the_length_has_a_limit_of_its_own(
    start_service: Any, maps: Any, small_limits: Any
) -> None:
    async with start_service(limits=small_limits(max_attention_tokens=3)) as service:
        limits = service.app.state.context.limits
        give_attention(service, AttentionService(maps, limits, ApiObserver()))
        assert (await service.client.get("/status")).json()["max_attention_tokens"] == 3
        assert (await service.post(PATH, {"tokens": [1, 2, 3]})).status_code == 200
        refused = (await service.post(PATH, {"tokens": [1, 2, 3, 4]})).json()["error"]
        assert refused["message"] == "attention is shown for 1 to 3 tokens"


def test_it_can_be_turned_off(tiny_model: Any, tmp_path: Path) -> None:
    path = tiny_model.write_folder(tmp_path)
    reader = open_attention(Settings(), path, ApiObserver())
    assert reader is not None
    assert (reader.num_layers, reader.num_heads) == (2, 4)
    assert open_attention(Settings(attention=False), path, ApiObserver()) is None


class HeldReader:
    """Reads when `let` permits; records its calls."""

    num_layers = num_heads = 1

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.let = threading.Semaphore(0)

    def read(
        self, tokens: Sequence[int], *, layer: int | None, head: int | None
    ) -> Sequence[Sequence[float]]:
        self.calls.append([*tokens])
        assert self.let.acquire(timeout=PATIENCE)
        return [[1.0] * (position + 1) for position in range(len(tokens))]


def by_header(scope: Scope) -> Tenant:
    """A tenant per value of `x-tenant`."""
    return Tenant(name=dict(scope["headers"]).get(b"x-tenant", b"public").decode())


async def test_one_map_is_read_at_a_time_and_tenants_take_turns(start_service: Any) -> None:
    """A second call was refused; now it waits, and the flood of one tenant delays another by no
    more than what is being read.
    """
    reader = HeldReader()
    async with start_service(authenticate=by_header) as service:
        context = service.app.state.context
        limits = replace(context.limits, max_tenant_waiting_maps=4)
        reading = AttentionService(reader, limits, service.observer)
        give_attention(service, reading)

        def show(tenant: str, token: int) -> asyncio.Task[Any]:
            return asyncio.create_task(service.post(PATH, {"tokens": [token]}, x_tenant=tenant))

        flood = [show("flood", 1) for _ in range(5)]
        async with asyncio.timeout(PATIENCE):
            while len(reader.calls) < 1 or reading._pool.waiting < 4:
                await asyncio.sleep(0.001)
        refused = await show("flood", 1)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["message"].endswith("calls are waiting for attention")
        assert service.observer.refusals == ["busy"]
        quiet = show("quiet", 2)
        async with asyncio.timeout(PATIENCE):
            while reading._pool.waiting < 5:
                await asyncio.sleep(0.001)
        assert (await service.client.get("/health/live")).status_code == 200, "others are served"
        reader.let.release(2)
        reply = await quiet
        assert reply.json()["rows"] == [{"position": 0, "weights": [1.0]}]
        assert reader.calls[:2] == [[1], [2]]
        reader.let.release(20)
        assert {reply.status_code for reply in await asyncio.gather(*flood)} == {200}
        reading.close()
