"""Every kind of bad input: status, type, param and code; no echo; and the service is as it was.

The rows are in `bad_input_rows`. Those of many bytes are slow; `test_hostile` sends all of them to
a server in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import process_time
from typing import Any

import pytest

from model.text.chat_template import ChatTemplate
from tests.api import bad_input_rows as table
from tests.api.bad_input_rows import CANARY, Row, check_error

ROOT = Path(__file__).parents[2]
JSON = {"content-type": "application/json"}
V = 303  # size of the test vocabulary, checked below
B, C = table.B, table.C
MUCH = 20_000  # bytes


@cache
def rows() -> list[Row]:
    return list(table.rows(vocab_size=V))


def test_every_kind_has_its_rows_or_its_test() -> None:
    shown = (
        {row.number for row in rows()} | {number for number, *_ in table.asked(vocab_size=V)} | {74}
    )
    assert shown | table.TESTED_IN.keys() == table.KINDS.keys()
    for place in table.TESTED_IN.values():
        file, _, test = place.partition("::")
        assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8"), place


@pytest.mark.parametrize("much", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_every_bad_request_is_refused(service: Any, *, much: bool) -> None:
    assert service.tokenizer.vocab_size == V
    reference = (await service.post(table.COMPLETIONS, B)).json()["choices"]
    wrong = []
    for row in rows():
        if (len(row.content or b"") > MUCH) != much:
            continue
        reply = await service.client.request(
            row.method,
            f"http://test{row.path}",
            content=row.content,
            headers=row.sent_headers,
        )
        try:
            check_error(reply, row)
        except AssertionError as error:
            wrong.append((str(row), str(error)[:300], reply.text[:200]))
    assert wrong == []
    assert len(service.engine.seen) == 1, "a refused request must not reach the engine"
    assert (await service.post(table.COMPLETIONS, B)).json()["choices"] == reference


async def test_messages_that_the_template_refuses(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = ChatTemplate("{{ raise_exception(messages[0].content) }}")
    monkeypatch.setitem(vars(service.tokenizer), "_template", refusing)
    reply = await service.post(table.CHAT, table.said(role="user", content=CANARY))
    check_error(reply, Row(number=65, param="messages", code="chat_template_error"))


async def test_a_body_over_the_limit_is_refused_before_it_is_read(
    start_service: Any, small_limits: Any
) -> None:
    async with start_service(limits=small_limits(max_body_bytes=1000)) as service:
        pulled = 0

        async def endless() -> Any:
            nonlocal pulled
            while True:
                pulled += 1
                yield b" " * 100

        declared = JSON | {"content-length": "1001"}
        for content, headers in [(b" " * 1001, declared), (endless(), JSON)]:
            reply = await service.client.post("/v1/completions", content=content, headers=headers)
            check_error(reply, Row(number=17, status=413, code="request_too_large"))
            assert reply.headers["connection"] == "close"
        assert pulled <= 12
        longest = json.dumps(B).encode().ljust(1000)
        assert (
            await service.client.post("/v1/completions", content=longest, headers=JSON)
        ).status_code == 200


async def test_odd_requests_are_answered(service: Any) -> None:
    """NUL, terminal codes and right-to-left marks are text, with parse_special: false the names of
    special tokens, too; and an id from a client is never used.
    """
    for _, path, body in table.asked(vocab_size=V):
        raw = {"parse_special": False} if "prompt" in body else {}
        reply = await service.post(path, body | raw)
        assert reply.status_code == 200, reply.text
        if raw:
            ids = service.engine.seen[-1].prompt_ids
            assert not any(service.tokenizer.is_special(token) for token in ids)
    for value in table.IDS:
        reply = await service.client.post(
            table.COMPLETIONS, json=B, headers={"x-request-id": value}
        )
        assert reply.headers["x-request-id"].startswith("s0-")


async def test_null_means_not_given_and_what_asks_for_nothing_passes(service: Any) -> None:
    reference = (await service.post("/v1/completions", B)).json()["choices"]
    nothing: dict[str, Any] = dict.fromkeys([
        "n", "best_of", "echo", "logprobs", "stop", "logit_bias", "temperature", "stream",
        "stream_options", "user", "priority", "tools", "suffix", "metadata",
    ])  # fmt: skip
    harmless = {
        "store": False, "service_tier": "auto", "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "user": "u", "metadata": {"a": "b"}, "suffix": "",
    }  # fmt: skip
    for more in (nothing, harmless, {"temperature": 1e-320}, {"top_p": 1e-12}, {"top_k": -1}):
        assert (await service.post("/v1/completions", B | more)).json()["choices"] == reference


def keys(count: int, *, value: object = 1) -> dict[str, object]:
    return {f"{i}": value for i in range(count)}


def tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


LARGE: dict[str, Callable[[], tuple[str, Any, str | None]]] = {
    "brackets": lambda: ("completions", b"[" * 100_000, None),
    "lists": lambda: ("completions", B | {"stop": [[]] * 600_000}, None),
    "keys": lambda: ("completions", B | keys(100_000), None),
    "token ids": lambda: ("completions", B | {"prompt": [1] * 10**6}, "prompt"),
    "prompts": lambda: ("completions", B | {"prompt": ["a"] * 100_000}, "prompt"),
    "stops": lambda: ("completions", B | {"stop": ["a"] * 100_000}, "stop"),
    "stop ids": lambda: ("completions", B | {"stop_token_ids": [1] * 10**6}, "stop_token_ids"),
    "biases": lambda: ("completions", B | {"logit_bias": keys(10**5)}, "logit_bias"),
    "metadata": lambda: ("completions", B | {"metadata": keys(10**5, value="")}, "metadata"),
    "messages": lambda: ("chat/completions", C | {"messages": C["messages"] * 50_000}, "messages"),
    "bad messages": lambda: ("chat/completions", C | {"messages": [{}] * 100_000}, "messages"),
    "key": lambda: ("completions", B | {"prompt": [1] * 2**18}, "prompt"),
    "members": lambda: ("completions", keys(250_000), None),
    "tool": lambda: ("chat/completions", C | {"n": 0, "tools": [tool(keys(130_000))]}, None),
    "schema": lambda: (
        "chat/completions", C | {"n": 0, "structured_outputs": {"json": keys(130_000)}}, None,
    ),
    "tools": lambda: (
        "chat/completions", C | {"n": 0, "tools": [tool({"enum": [1] * 1_200_000})]}, None,
    ),
    "beside": lambda: ("messages/count_tokens", {"model": "m", "messages": C["messages"],
                                         "cache_control": keys(130_000)}, None),
    "parts": lambda: (
        "responses",
        {"model": "m", "input": [{"role": "user", "content": [{"type": "text"}] * 100_000}]},
        "input[0].content",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
async def test_refusing_a_large_body_holds_up_nobody(service: Any, name: str) -> None:
    """The event loop goes round all the while. In processor time: the machine has other work."""
    endpoint, body, param = LARGE[name]()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = JSON | ({"idempotency-key": "k"} if name == "key" else {})
    worst = 0.0

    async def watch() -> None:
        nonlocal worst
        while True:
            before = process_time()
            await asyncio.sleep(0.001)
            worst = max(worst, process_time() - before)

    lags = []
    for _ in range(3):
        worst = 0.0
        watching = asyncio.create_task(watch())
        reply = await service.client.post(f"/v1/{endpoint}", content=content, headers=headers)
        await asyncio.sleep(0.002)
        watching.cancel()
        assert reply.status_code in {400, 404}
        assert (reply.json()["error"].get("param") or "").startswith(param or "")
        lags.append(worst)
        if worst < 0.05:
            break
    assert min(lags) < 0.05
