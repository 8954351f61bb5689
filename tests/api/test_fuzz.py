"""Random input: the OpenAPI document is kept to, and no body gets more than a refusal."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.bad_input_rows import CANARY, CHAT, COMPLETIONS, RESPONSES, B, C, R

JSON = {"content-type": "application/json"}
MESSAGES = "/v1/messages"
LONGEST = 5_000_000  # bytes of a body; the server takes 4 MiB
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: B | {"stop": ["x"], "logit_bias": {"1": 1}, "n": 2, "temperature": 0.5,
                      "stream_options": None, "structured_outputs": {"regex": "[ab]+"}},
    CHAT: C | {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "auto",
               "response_format": {"type": "json_schema", "json_schema": {"schema": {}}},
               "chat_template_kwargs": {"enable_thinking": True}},
    RESPONSES: R | {"metadata": {"a": "b"}, "include": [], "store": True,
                    "text": {"format": {"type": "text"}}},
    MESSAGES: {"model": C["model"], "max_tokens": 4, "system": "s", "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]}], "tools": []},
    "/v1/decisions": {"model": C["model"], "input": [{"role": "user", "content": [
        {"type": "input_text", "text": "hi"}, {"type": "input_json", "data": {"a": [1]}}]}],
        "questions": [
            {"type": "predicate", "name": "p", "instructions": "a"},
            {"type": "choice", "instructions": "b", "choices": [{"value": "c"}, {"value": True}]},
            {"type": "score", "instructions": "d", "levels": [{"label": "e"}, {"label": "f"}]}]},
    "/tokenize": {"prompt": "hi", "messages": None, "return_token_strs": True},
    "/detokenize": {"tokens": [1, 2]},
    "/v1/attention": {"tokens": [1, 2], "layer": 0, "positions": [0]},
}  # fmt: skip
PARTS = ("a", CANARY, "\0", "\ud800", "\udfff", "<|im_end|>", "{{7*7}}", "\u202e", "😀", "(a+)+$")
TEXTS = st.lists(st.sampled_from(PARTS), max_size=4).map("".join)
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400]),
    st.floats(),
    st.sampled_from([1e-320, 1e308, -0.0]),
)
KEYS = TEXTS.map(lambda text: f"{text}!")  # what looks like a field's name may be repeated
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=8,
)


def containers(body: Any) -> list[Any]:
    """Every object and array in a body that has something in it."""
    inner = list(body.values() if isinstance(body, dict) else body[:10])
    found = [body] if inner else []
    return found + [c for node in inner if isinstance(node, dict | list) for c in containers(node)]


def repeat(items: list[Any], times: int, *, within: dict[str, Any]) -> None:
    """Nothing where the body would be too long by far: lists of lists grow quickly."""
    if times * len(json.dumps(within)) < LONGEST:
        items *= times


@st.composite
def mutants(draw: st.DrawFn) -> tuple[str, bytes]:
    """(path, body): a valid body, changed in a few places, and perhaps in its bytes."""
    path = draw(st.sampled_from(list(BODIES)))
    body = copy.deepcopy(BODIES[path])
    for _ in range(draw(st.integers(1, 3))):
        within = containers(body)
        if not within:
            break
        place = draw(st.sampled_from(within))
        key = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        match draw(st.sampled_from(["set", "set", "set", "drop", "add", "nest", "repeat"])):
            case "set":
                place[key] = draw(VALUES)
            case "drop":
                del place[key]
            case "add" if isinstance(place, dict):
                place[draw(KEYS)] = draw(VALUES)
            case "nest":
                for _ in range(draw(st.sampled_from([2, 63, 64, 70, 150]))):
                    place[key] = [place[key]]
            case "repeat" if isinstance(place, list):
                repeat(place, draw(st.sampled_from([2, 100, 2000])), within=body)
    data = json.dumps(body).encode()
    match draw(st.sampled_from(["", "", "", "twice", "byte", "cut"])):
        case "twice" if body:
            name = next(iter(body))
            data = data[:-1] + f', "{json.dumps(name)[1:-1]}": 1}}'.encode()
        case "byte":
            position = draw(st.integers(0, len(data) - 1))
            data = data[:position] + draw(st.binary(max_size=2)) + data[position + 1 :]
        case "cut":
            data = data[: draw(st.integers(0, len(data) - 1))]
    return path, data


async def check(service: Any, path: str, data: bytes) -> None:
    """It is answered, or refused in our shape without a word of it."""
    reply = await service.client.post(path, content=data, headers=JSON)
    assert reply.status_code < 500, reply.text
    assert reply.headers["x-request-id"].startswith("s0-")
    if reply.status_code == 200:
        return
    error = reply.json()["error"]
    anthropic = path == MESSAGES
    assert set(error) == (
        {"type", "message"} if anthropic else {"message", "type", "param", "code"}
    )
    assert error["message"]
    assert CANARY not in reply.text
    assert len(reply.content) < 500
    assert reply.content.isascii()


FIXTURE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=30, deadline=None, suppress_health_check=FIXTURE, derandomize=True)
@given(mutant=mutants())
async def test_no_body_gets_more_than_a_refusal(service: Any, mutant: tuple[str, bytes]) -> None:
    await check(service, *mutant)


@pytest.mark.longer
@settings(max_examples=500, deadline=None, suppress_health_check=FIXTURE)
@given(mutant=mutants())
async def test_no_body_gets_more_than_a_refusal_at_length(
    service: Any, mutant: tuple[str, bytes]
) -> None:
    await check(service, *mutant)
    if service.engine.seen and len(service.engine.seen) % 50 == 0:
        reply = await service.post(COMPLETIONS, B)
        assert reply.status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_document_is_kept_to(tmp_path: Path) -> None:
    """Schemathesis with all its checks; `make fuzz` goes on for longer."""
    from tests.api.fuzz import run_checks, serving  # seconds that the unit suite need not take

    with serving(tmp_path / "model") as url:
        options = ("--max-examples", "1", "--generation-deterministic")
        run = run_checks(url, options, folder=tmp_path)
    assert run.returncode == 0, run.stdout[-20_000:]
