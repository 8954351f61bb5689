"""Every kind of bad input: status, type, param and code; no echo; and the service is as it was.

A row is (what is sent, status, param, code). Rows whose strings could be echoed hold `CANARY`.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from time import process_time
from typing import Any

import pytest

B = {"model": "tiny-model", "prompt": "hi", "max_tokens": 4, "seed": 7}
C: dict[str, Any] = {
    "model": "tiny-model",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 4,
    "seed": 7,
}
CANARY = "CaNaRy"
JSON = {"content-type": "application/json"}
V = 303  # size of the test vocabulary, checked below


def without(body: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key != name}


def raw(field: str, value: str) -> bytes:
    """B with a field of raw JSON, such as NaN."""
    return json.dumps(without(B, field))[:-1].encode() + f', "{field}": {value}}}'.encode()


COMPLETIONS: list[tuple[Any, int, str | None, str | None]] = [
    # --- the body -------------------------------------------------------------------------
    (b"", 400, None, "invalid_json"),
    (b"{", 400, None, "invalid_json"),
    (b'{"model":"tiny-model",}', 400, None, "invalid_json"),
    (b'{"a":1}{"b":2}', 400, None, "invalid_json"),
    (json.dumps(B).encode("utf-16"), 400, None, "invalid_json"),
    (b"\xef\xbb\xbf" + json.dumps(B).encode(), 400, None, "invalid_json"),
    (b'{"model":"\xff"}', 400, None, "invalid_json"),
    (b"[" * 100_000, 400, None, "invalid_json"),
    (b'{"a":' * 100_000, 400, None, "invalid_json"),
    (b'{"model":' + b"[" * 65 + b"]" * 65 + b"}", 400, None, "invalid_json"),
    (b'{"seed":' + b"9" * 5000 + b"}", 400, None, "invalid_json"),
    (b"[]", 400, None, "invalid_type"),
    (b'"x"', 400, None, "invalid_type"),
    (b"null", 400, None, "invalid_type"),
    (b"1", 400, None, "invalid_type"),
    (b'{"max_tokens":1,"max_tokens":1000000000}', 400, None, "duplicate_key"),
    # --- fields as such -------------------------------------------------------------------
    (B | {"foo": 1}, 400, "foo", "unknown_parameter"),
    (B | {"\ud800" + CANARY: 1}, 400, None, "invalid_unicode"),
    (B | {"x" * 100: 1}, 400, None, "unknown_parameter"),
    (without(B, "model"), 400, "model", "missing_required_parameter"),
    (B | {"model": None}, 400, "model", "invalid_type"),
    (B | {"model": 5}, 400, "model", "invalid_type"),
    (B | {"model": ""}, 400, "model", "empty_string"),
    (B | {"model": "\ud800"}, 400, "model", "invalid_unicode"),
    (B | {"model": "nope" + CANARY}, 404, "model", "model_not_found"),
    (B | {"model": "../../etc/passwd"}, 404, "model", "model_not_found"),
    (B | {"model": "m\u0000"}, 404, "model", "model_not_found"),
    (B | {"model": "m\r\nX: y"}, 404, "model", "model_not_found"),
    (B | {"model": CANARY * 170_000}, 404, "model", "model_not_found"),
    (B | {"model": "${jndi:x}"}, 404, "model", "model_not_found"),
    # --- prompts --------------------------------------------------------------------------
    (without(B, "prompt"), 400, "prompt", "missing_required_parameter"),
    (B | {"prompt": None}, 400, "prompt", "invalid_type"),
    (B | {"prompt": {"a": CANARY}}, 400, "prompt", "invalid_type"),
    (B | {"prompt": ""}, 400, "prompt", "empty_prompt"),
    (B | {"prompt": []}, 400, "prompt", "empty_prompt"),
    (B | {"prompt": [[]]}, 400, "prompt", "empty_prompt"),
    (B | {"prompt": [""]}, 400, "prompt", "empty_prompt"),
    (B | {"prompt": [[], [1]]}, 400, "prompt", "empty_prompt"),
    (B | {"prompt": [[1], []]}, 400, "prompt", "empty_prompt"),
    (B | {"prompt": [1, "a"]}, 400, "prompt", "invalid_type"),
    (B | {"prompt": ["a", 1]}, 400, "prompt", "invalid_type"),
    (B | {"prompt": [True]}, 400, "prompt", "invalid_type"),
    (B | {"prompt": [1.5]}, 400, "prompt", "invalid_type"),
    (B | {"prompt": [-1]}, 400, "prompt", "invalid_token_id"),
    (B | {"prompt": [V]}, 400, "prompt", "invalid_token_id"),
    (B | {"prompt": [2**31]}, 400, "prompt", "invalid_token_id"),
    (B | {"prompt": [[1], [2**63]]}, 400, "prompt", "invalid_token_id"),
    (B | {"prompt": [10**30]}, 400, "prompt", "invalid_token_id"),
    (B | {"prompt": ["a"] * 100_000}, 400, "prompt", "array_above_max_length"),
    (B | {"prompt": [[1]] * 65}, 400, "prompt", "array_above_max_length"),
    (B | {"prompt": [1] * 256}, 400, "prompt", "context_length_exceeded"),
    (B | {"prompt": [1] * 500_000}, 400, "prompt", "context_length_exceeded"),
    (B | {"prompt": "a b" * 2000}, 400, "prompt", "context_length_exceeded"),
    (B | {"prompt": "😀" * 2000}, 400, "prompt", "context_length_exceeded"),
    (B | {"prompt": f"{CANARY}\ud800"}, 400, "prompt", "invalid_unicode"),
    (B | {"prompt": ["a", "\udfff"]}, 400, "prompt", "invalid_unicode"),
    # --- lengths --------------------------------------------------------------------------
    (B | {"max_tokens": 256}, 400, "max_tokens", "context_length_exceeded"),
    (B | {"max_tokens": 0}, 400, "max_tokens", "integer_below_min_value"),
    (B | {"max_tokens": -1}, 400, "max_tokens", "integer_below_min_value"),
    (B | {"max_tokens": 10**9}, 400, "max_tokens", "context_length_exceeded"),
    (B | {"max_tokens": 2**63}, 400, "max_tokens", "context_length_exceeded"),
    (B | {"max_tokens": 10**400}, 400, "max_tokens", None),
    (B | {"max_tokens": 1.5}, 400, "max_tokens", "invalid_type"),
    (B | {"max_tokens": "4"}, 400, "max_tokens", "invalid_type"),
    (B | {"max_tokens": True}, 400, "max_tokens", "invalid_type"),
    (B | {"min_tokens": -1}, 400, "min_tokens", "integer_below_min_value"),
    (B | {"min_tokens": 5}, 400, "min_tokens", "invalid_value"),
    (B | {"n": 0}, 400, "n", "integer_below_min_value"),
    (B | {"n": -1}, 400, "n", "integer_below_min_value"),
    (B | {"n": 1.5}, 400, "n", "invalid_type"),
    (B | {"n": True}, 400, "n", "invalid_type"),
    (B | {"n": "2"}, 400, "n", "invalid_type"),
    (B | {"n": 10**6}, 400, "n", "integer_above_max_value"),
    (B | {"n": 2**63}, 400, "n", "integer_above_max_value"),
    (B | {"n": 8, "prompt": ["a"] * 16}, 400, "n", "integer_above_max_value"),
    (B | {"best_of": 10**6}, 400, "best_of", "integer_above_max_value"),
    (B | {"n": 3, "best_of": 2}, 400, "best_of", "invalid_value"),
    (B | {"best_of": 2, "stream": True}, 400, "best_of", "unsupported_parameter"),
    # --- sampling -------------------------------------------------------------------------
    *((raw("temperature", v), 400, "temperature", "invalid_number")
      for v in ("NaN", "Infinity", "-Infinity", "1e999")),
    (B | {"temperature": -0.1}, 400, "temperature", "decimal_below_min_value"),
    (B | {"temperature": 2.1}, 400, "temperature", "decimal_above_max_value"),
    (B | {"temperature": 1e308}, 400, "temperature", "decimal_above_max_value"),
    (B | {"temperature": 10**400}, 400, "temperature", None),
    (B | {"temperature": "1"}, 400, "temperature", "invalid_type"),
    (B | {"temperature": True}, 400, "temperature", "invalid_type"),
    (B | {"top_p": 0}, 400, "top_p", "decimal_below_min_value"),
    (B | {"top_p": -1}, 400, "top_p", "decimal_below_min_value"),
    (B | {"top_p": 1.1}, 400, "top_p", "decimal_above_max_value"),
    (raw("top_p", "NaN"), 400, "top_p", "invalid_number"),
    (B | {"top_k": -2}, 400, "top_k", "integer_below_min_value"),
    (B | {"top_k": 1.5}, 400, "top_k", "invalid_type"),
    (B | {"min_p": -1}, 400, "min_p", "decimal_below_min_value"),
    (B | {"min_p": 2}, 400, "min_p", "decimal_above_max_value"),
    (raw("min_p", "NaN"), 400, "min_p", "invalid_number"),
    (B | {"presence_penalty": 2.1}, 400, "presence_penalty", "decimal_above_max_value"),
    (B | {"frequency_penalty": -2.1}, 400, "frequency_penalty", "decimal_below_min_value"),
    (raw("presence_penalty", "NaN"), 400, "presence_penalty", "invalid_number"),
    (B | {"repetition_penalty": 0}, 400, "repetition_penalty", "decimal_below_min_value"),
    (B | {"repetition_penalty": 1e9}, 400, "repetition_penalty", "decimal_above_max_value"),
    (B | {"seed": -(2**63) - 1}, 400, "seed", "integer_below_min_value"),
    (B | {"seed": 2**64}, 400, "seed", "integer_above_max_value"),
    (B | {"seed": 1.5}, 400, "seed", "invalid_type"),
    (B | {"seed": CANARY}, 400, "seed", "invalid_type"),
    # --- stops and biases -----------------------------------------------------------------
    (B | {"stop": ["x"] * 100_000}, 400, "stop", "array_above_max_length"),
    (B | {"stop": ""}, 400, "stop", "empty_string"),
    (B | {"stop": [""]}, 400, "stop", "empty_string"),
    (B | {"stop": [1]}, 400, "stop", "invalid_type"),
    (B | {"stop": [None]}, 400, "stop", "invalid_type"),
    (B | {"stop": {"a": 1}}, 400, "stop", "invalid_type"),
    (B | {"stop": CANARY * 170_000}, 400, "stop", "string_above_max_length"),
    (B | {"stop": ["\ud800"]}, 400, "stop", "invalid_unicode"),
    (B | {"stop_token_ids": [-1]}, 400, "stop_token_ids", "invalid_token_id"),
    (B | {"stop_token_ids": [V]}, 400, "stop_token_ids", "invalid_token_id"),
    (B | {"stop_token_ids": [2**63]}, 400, "stop_token_ids", "invalid_token_id"),
    (B | {"stop_token_ids": ["1"]}, 400, "stop_token_ids", "invalid_type"),
    (B | {"stop_token_ids": 3}, 400, "stop_token_ids", "invalid_type"),
    (B | {"stop_token_ids": [1] * 10**6}, 400, "stop_token_ids", "array_above_max_length"),
    *((B | {"logit_bias": {key: 1}}, 400, "logit_bias", "invalid_token_id")
      for key in (str(V), "-1", "abc", "1e3", " 5", "٣", "", "007", "9" * 30, "\ud800")),
    (B | {"logit_bias": {"1": 101}}, 400, "logit_bias", "invalid_number"),
    (raw("logit_bias", '{"1": NaN}'), 400, "logit_bias", "invalid_number"),
    (B | {"logit_bias": {"1": None}}, 400, "logit_bias", "invalid_type"),
    (B | {"logit_bias": {"1": True}}, 400, "logit_bias", "invalid_type"),
    (B | {"logit_bias": [1]}, 400, "logit_bias", "invalid_type"),
    (B | {"logit_bias": {str(k): 1 for k in range(100_000)}}, 400, "logit_bias",
     "object_above_max_length"),
    # --- what comes back ------------------------------------------------------------------
    (B | {"logprobs": -1}, 400, "logprobs", "integer_below_min_value"),
    (B | {"logprobs": 6}, 400, "logprobs", "integer_above_max_value"),
    (B | {"logprobs": 10**6}, 400, "logprobs", "integer_above_max_value"),
    (B | {"logprobs": True}, 400, "logprobs", "invalid_type"),
    (B | {"echo": 1}, 400, "echo", "invalid_type"),
    (B | {"stream": "yes"}, 400, "stream", "invalid_type"),
    (B | {"stream": 1}, 400, "stream", "invalid_type"),
    (B | {"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
    (B | {"stream": True, "stream_options": {"foo": 1}}, 400, "stream_options.foo",
     "unknown_parameter"),
    (B | {"stream": True, "stream_options": 1}, 400, "stream_options", "invalid_type"),
    (B | {"priority": 10**9}, 400, "priority", "integer_above_max_value"),
    (B | {"priority": -1}, 400, "priority", "integer_below_min_value"),
    (B | {"on_disconnect": CANARY}, 400, "on_disconnect", "invalid_value"),
    (B | {"user": 5}, 400, "user", "invalid_type"),
    (B | {"user": "\ud800"}, 400, "user", "invalid_unicode"),
    (B | {"metadata": {"a": 1}}, 400, "metadata.a", "invalid_type"),
    *((B | {name: value}, 400, name, "unsupported_parameter") for name, value in [
        ("suffix", CANARY), ("tools", [{"type": "function"}]), ("functions", [{"name": "f"}]),
        ("tool_choice", "auto"), ("parallel_tool_calls", True), ("function_call", "auto"),
        ("response_format", {"type": "json_schema"}), ("response_format", {"type": "json_object"}),
        ("structured_outputs", {"regex": "(a+)+$"}), ("guided_json", {}), ("guided_regex", "["),
        ("guided_choice", ["a"]), ("guided_grammar", "x"), ("audio", {"voice": "x"}),
        ("images", ["x"]), ("modalities", ["audio"]), ("prediction", {}), ("store", True),
        ("reasoning_effort", "low"), ("chat_template", "{{ ''.__class__ }}"),
        ("cache_salt", CANARY), ("use_beam_search", True), ("service_tier", "flex"),
        ("store", 0),
    ]),
]  # fmt: skip

BAD_CONTENTS: list[tuple[Any, str]] = [
    (None, "invalid_type"), (5, "invalid_type"), ({}, "invalid_type"), ([], "empty_array"),
    (["x"], "invalid_type"), ([{}], "invalid_type"),
    ([{"type": "text", "text": 5}], "invalid_type"),
    ([{"type": "text"}], "unknown_parameter"),
    ([{"type": "text", "text": "a", "cache": 1}], "unknown_parameter"),
    ([{"type": "image_url", "image_url": {"url": "http://169.254.169.254/" + CANARY}}],
     "unsupported_content"),
    ([{"type": "file", "file": "file:///etc/passwd"}], "unsupported_content"),
    ("\ud800", "invalid_unicode"), ([{"type": "text", "text": "\ud800"}], "invalid_unicode"),
]  # fmt: skip

CHAT: list[tuple[Any, int, str | None, str | None]] = [
    (without(C, "messages"), 400, "messages", "missing_required_parameter"),
    (C | {"messages": []}, 400, "messages", "array_below_min_length"),
    (C | {"messages": "hi"}, 400, "messages", "invalid_type"),
    (C | {"messages": ["hi"]}, 400, "messages[0]", "invalid_type"),
    (C | {"messages": [{"role": CANARY, "content": "x"}]}, 400, "messages[0].role",
     "invalid_value"),
    (C | {"messages": [{"content": "x"}]}, 400, "messages[0].role", "missing_required_parameter"),
    (C | {"messages": [{"role": "user"}]}, 400, "messages[0].content",
     "missing_required_parameter"),
    *((C | {"messages": [{"role": "user", "content": content}]}, 400, "messages[0].content", code)
      for content, code in BAD_CONTENTS),
    (C | {"messages": [{"role": "user", "content": "x", "foo": 1}]}, 400, "messages[0].foo",
     "unknown_parameter"),
    (C | {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, 400,
     "messages[0].tool_calls", "unknown_parameter"),
    (C | {"messages": [{"role": "tool", "content": CANARY}]}, 400, "messages",
     "chat_template_error"),
    (C | {"messages": C["messages"] * 50_000}, 400, "messages", "array_above_max_length"),
    (C | {"messages": [{"role": "user", "content": "a b" * 2000}]}, 400, "messages",
     "context_length_exceeded"),
    (C | {"max_completion_tokens": 5}, 400, "max_completion_tokens", "invalid_value"),
    (C | {"max_tokens": None, "max_completion_tokens": 10**9}, 400, "max_completion_tokens",
     "context_length_exceeded"),
    (C | {"max_completion_tokens": 0}, 400, "max_completion_tokens", "integer_below_min_value"),
    (C | {"top_logprobs": 5}, 400, "top_logprobs", "invalid_value"),
    (C | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "integer_above_max_value"),
    (C | {"logprobs": 3}, 400, "logprobs", "invalid_type"),
    (C | {"chat_template": "{{ x }}"}, 400, "chat_template", "unsupported_parameter"),
    (C | {"chat_template_kwargs": {"chat_template": "x"}}, 400, "chat_template_kwargs",
     "unsupported_parameter"),
    (C | {"chat_template_kwargs": {"enable_thinking": "{{ ''.__class__ }}"}}, 400,
     "chat_template_kwargs", "invalid_type"),
    (C | {"continue_final_message": True, "add_generation_prompt": True}, 400,
     "continue_final_message", "invalid_value"),
    (C | {"prompt": "x"}, 400, "prompt", "unknown_parameter"),
    (C | {"best_of": 2}, 400, "best_of", "unknown_parameter"),
    (C | {"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
    (C | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
     400, "response_format", "unsupported_parameter"),
]  # fmt: skip

HEADERS: list[tuple[dict[str, str], int, str | None, str | None]] = [
    *(({"x-request-timeout-ms": value}, 400, "x-request-timeout-ms", "invalid_value")
      for value in ("-1", "abc", "1000000000000", "0", "1.5", "", "9" * 100)),
    ({"idempotency-key": ""}, 400, "idempotency-key", "invalid_value"),
    ({"idempotency-key": "a b"}, 400, "idempotency-key", "invalid_value"),
    ({"idempotency-key": "k" * 256}, 400, "idempotency-key", "invalid_value"),
    ({"x-quire-event-ids": CANARY}, 400, "x-quire-event-ids", "invalid_value"),
    ({"content-type": "text/plain"}, 415, None, "unsupported_media_type"),
    ({"content-type": "application/x-www-form-urlencoded"}, 415, None, "unsupported_media_type"),
    ({"content-type": "application/jsonp"}, 415, None, "unsupported_media_type"),
    ({"content-type": "application/json; charset=utf-16"}, 415, None, "unsupported_media_type"),
    ({"content-type": ""}, 415, None, "unsupported_media_type"),
    ({"content-encoding": "gzip"}, 415, None, "unsupported_media_type"),
]  # fmt: skip


def check_error(
    reply: Any, status: int, param: str | None, code: str | None, *, kind: str | None = None
) -> None:
    """The reply is an error of this kind, and repeats nothing of the request."""
    assert reply.status_code == status, reply.text[:300]
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"].startswith("s0-")
    ((name, error),) = reply.json().items()
    assert name == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == (kind or "invalid_request_error")
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    assert error["message"]
    assert len(reply.content) < 500
    assert CANARY not in reply.text


def encoded(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


async def still_answers(service: Any, path: str, body: dict[str, Any], reference: Any) -> None:
    """A request gives the answer it gave before."""
    reply = await service.post(path, body)
    assert reply.status_code == 200
    assert reply.json()["choices"] == reference


@pytest.mark.parametrize(
    ("path", "rows", "good"),
    [("/v1/completions", COMPLETIONS, B), ("/v1/chat/completions", CHAT, C)],
    ids=["completions", "chat"],
)
async def test_every_bad_body_is_refused(
    service: Any, path: str, rows: list[Any], good: dict[str, Any]
) -> None:
    assert service.tokenizer.vocab_size == V
    reference = (await service.post(path, good)).json()["choices"]
    wrong = []
    for body, status, param, code in rows:
        reply = await service.client.post(path, content=encoded(body), headers=JSON)
        try:
            check_error(reply, status, param, code)
        except AssertionError:
            wrong.append((encoded(body)[:120], (status, param, code), reply.text[:200]))
    assert wrong == []
    assert len(service.engine.seen) == 1, "a refused request must not reach the engine"
    await still_answers(service, path, good, reference)


async def test_every_bad_header_is_refused(service: Any) -> None:
    reference = (await service.post("/v1/completions", B)).json()["choices"]
    for headers, status, param, code in HEADERS:
        reply = await service.client.post(
            "/v1/completions", content=encoded(B), headers=JSON | headers
        )
        check_error(reply, status, param, code)
    reply = await service.client.post("/v1/completions", content=encoded(B))
    check_error(reply, 415, None, "unsupported_media_type")
    bomb = gzip.compress(b" " * 1_000_000)
    reply = await service.client.post(
        "/v1/completions", content=bomb, headers=JSON | {"content-encoding": "gzip"}
    )
    check_error(reply, 415, None, "unsupported_media_type")
    await still_answers(service, "/v1/completions", B, reference)


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
            check_error(reply, 413, None, "request_too_large")
            assert reply.headers["connection"] == "close"
        assert pulled <= 12
        longest = json.dumps(B).encode().ljust(1000)
        assert (
            await service.client.post("/v1/completions", content=longest, headers=JSON)
        ).status_code == 200


async def test_routes_and_methods(service: Any) -> None:
    for method in ("GET", "PUT", "DELETE", "FOO", "PATCH", "OPTIONS"):
        reply = await service.client.request(method, "/v1/completions")
        check_error(reply, 405, None, "method_not_allowed")
        assert reply.headers["allow"] == "POST"
    for path in (
        "/nope", "/v1//completions", "/V1/completions", "/v1/completions/", "/metrics", "/docs",
        "/openapi.json", "/debug", "/redoc", "/v1", "/x/%2e%2e/v1/completions",
    ):  # fmt: skip
        reply = await service.client.post(path, json=B)
        check_error(reply, 404, None, "unknown_url")
        assert not {name for name in reply.headers if name.startswith("access-control")}


async def test_strange_text_is_text(service: Any) -> None:
    """NUL, terminal codes, right-to-left marks and the names of special tokens are tokenised as
    text, and an id from a client is never used.
    """
    for prompt in ("\0", "\x1b[31m", "\u202e", "<|im_end|>", "<s>", "\u0301" * 50):
        reply = await service.post("/v1/completions", B | {"prompt": prompt})
        assert reply.status_code == 200
        ids = service.engine.seen[-1].prompt_ids
        assert not any(service.tokenizer.is_special(token) for token in ids)
    for value in ("a" * 10_000, "CaNaRy", "\xe9"):
        reply = await service.client.post(
            "/v1/completions", json=B, headers={"x-request-id": value.encode("latin-1")}
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


LARGE: dict[str, tuple[str, Any, str | None]] = {
    "brackets": ("completions", b"[" * 100_000, None),
    "lists": ("completions", B | {"stop": [[]] * 600_000}, None),
    "keys": ("completions", B | {f"k{i}": 1 for i in range(100_000)}, None),
    "token ids": ("completions", B | {"prompt": [1] * 10**6}, "prompt"),
    "prompts": ("completions", B | {"prompt": ["a"] * 100_000}, "prompt"),
    "stops": ("completions", B | {"stop": ["a"] * 100_000}, "stop"),
    "stop ids": ("completions", B | {"stop_token_ids": [1] * 10**6}, "stop_token_ids"),
    "biases": ("completions", B | {"logit_bias": {str(i): 1 for i in range(10**5)}}, "logit_bias"),
    "metadata": ("completions", B | {"metadata": {str(i): "" for i in range(10**5)}}, "metadata"),
    "messages": ("chat/completions", C | {"messages": C["messages"] * 50_000}, "messages"),
    "bad messages": ("chat/completions", C | {"messages": [{}] * 100_000}, "messages"),
    "parts": (
        "responses",
        {"model": "m", "input": [{"role": "user", "content": [{"type": "text"}] * 100_000}]},
        "input[0].content",
    ),
}  # fmt: skip


QUICK = {"lists", "stops", "stop ids", "messages"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in LARGE]
)
async def test_refusing_a_large_body_holds_up_nobody(service: Any, name: str) -> None:
    """The event loop goes round all the while. In processor time: the machine has other work."""
    endpoint, body, param = LARGE[name]
    content = encoded(body)
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
        reply = await service.client.post(f"/v1/{endpoint}", content=content, headers=JSON)
        await asyncio.sleep(0.002)
        watching.cancel()
        assert reply.status_code == 400
        assert (reply.json()["error"]["param"] or "").startswith(param or "")
        lags.append(worst)
        if worst < 0.05:
            break
    assert min(lags) < 0.05
