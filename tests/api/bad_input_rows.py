"""Bad inputs as data: each kind by its number, and the rows that show it.

`test_bad_inputs` sends the rows to an application in this process, `test_hostile` to a server in
another one. Where a server is needed in a certain state, or bytes that are no HTTP, `TESTED_IN`
names the test. Rows whose strings could be repeated to the client hold `CANARY`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

MODEL = "tiny-model"
CANARY = "CaNaRy"
B = {"model": MODEL, "prompt": "hi", "max_tokens": 4, "seed": 7}
C: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 4,
    "seed": 7,
}
R = {"model": MODEL, "input": "hi", "max_output_tokens": 4, "seed": 7}
LONG = CANARY.ljust(513)
LABELS = ("user", "safety_identifier", "prompt_cache_key")
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
OLD_ID = "s0-0185c0e3d00070008000000000000000"  # of a call of January 2023
NEW_ID = "s0-ffffffffffff70008000000000000000"  # of a call to come

KINDS: Mapping[int, str] = {
    1: "no key", 2: "a key that is none", 3: "a key that differs in its last character",
    4: "no key, and a Host that looks like a path", 5: "no key, and a path that looks like another",
    6: "a method that the route does not know", 7: "an unknown route", 8: "no body",
    9: "no JSON", 10: "JSON that is no object", 11: "deep nesting", 13: "a key twice",
    14: "another Content-Type", 15: "a compressed body", 16: "a body over the limit, declared",
    17: "a body over the limit, without end", 18: "a body framed in two ways",
    19: "a head over the limits", 20: "bytes that drip", 21: "an unknown field",
    22: "no model", 23: "an unknown model", 24: "a model's name with a purpose",
    25: "no prompt", 26: "an empty prompt", 27: "an empty prompt among others",
    29: "ids that are no tokens", 30: "too many prompts", 31: "a prompt over the context",
    32: "text that is hard to tokenise", 33: "a lone surrogate", 34: "control characters in text",
    35: "prompt and answer over the context", 36: "no tokens asked for", 37: "a bad max_tokens",
    38: "two limits that differ", 39: "a bad n", 40: "a huge n", 41: "too many choices in all",
    42: "best_of", 43: "numbers that JSON has not", 44: "a bad temperature", 45: "a bad top_p",
    47: "a bad min_p", 48: "a bad penalty", 50: "a bad seed", 51: "too many stops",
    52: "a bad stop", 53: "a stop with a lone surrogate", 54: "bad stop ids", 55: "a bad bias",
    56: "every token forbidden", 57: "bad logprobs", 58: "bad top_logprobs",
    60: "a long prompt given back", 61: "what others support", 62: "a grammar with a purpose",
    63: "a chat template with a purpose", 64: "no messages", 65: "a bad message",
    66: "content that would be fetched", 67: "too many messages", 68: "a bad stream",
    69: "bad stream_options", 71: "a priority without the right", 72: "a cache salt",
    73: "a bad deadline", 74: "a request id with a purpose", 75: "a key with another body",
    77: "another tenant's idempotency key", 78: "a stream that is none", 79: "a bad event id",
    80: "a stream after its window", 82: "a rate over the key's", 83: "a full queue",
    84: "no queue, no engine", 85: "a deadline that passes in the queue", 86: "a poisoned request",
    87: "a replica that ends", 88: "what is not on this port", 89: "another origin",
    90: "old, pipelined and other HTTP", 92: "callers that leave at random",
    93: "a text that is stored, and long",
}  # fmt: skip

TESTED_IN: Mapping[int, str] = {
    1: "tests/api/test_keys.py",
    2: "tests/api/test_keys.py",
    3: "tests/api/test_keys.py",
    4: "tests/api/test_keys.py",
    5: "tests/api/test_keys.py",
    16: "tests/api/test_hostile.py::test_bodies_over_the_limit",
    17: "tests/api/test_hostile.py::test_bodies_over_the_limit",
    18: "tests/api/raw_http_rows.py",
    19: "tests/api/test_hostile.py::test_heads_over_the_limits_cost_no_memory",
    20: "tests/api/test_hostile.py::test_bytes_that_drip",
    32: "tests/api/test_hostile.py::test_hard_text",
    62: "tests/api/test_structured.py",
    71: "tests/api/test_keys.py",
    75: "tests/api/test_hostile.py::test_keys_and_streams",
    77: "tests/api/test_keys.py",
    79: "tests/api/test_hostile.py::test_keys_and_streams",
    82: "tests/api/test_keys.py",
    83: "tests/api/test_hostile.py::test_more_than_the_queue_holds",
    84: "tests/faults/test_store.py::test_row_26_redis_is_away_for_long",
    85: "tests/api/test_hostile.py::test_deadlines",
    86: "tests/faults/test_engines.py::test_row_12_poison_and_the_innocent",
    87: "tests/api/test_hostile.py::test_a_server_that_ends",
    90: "tests/api/raw_http_rows.py",
    92: "tests/api/test_hostile.py::test_callers_that_leave_at_random",
}
"""Kinds whose rows are not below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A request that is refused. `body` is JSON unless it is bytes; `code` None: any."""

    number: int
    status: int = 400
    param: str | None = None
    code: str | None = None
    path: str = COMPLETIONS
    method: str = "POST"
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def content(self) -> bytes | None:
        """What is sent."""
        if self.body is None or isinstance(self.body, bytes):
            return self.body
        return json.dumps(self.body).encode()

    @property
    def sent_headers(self) -> dict[bytes, bytes]:
        """With a Content-Type, unless the row has one."""
        named = ({} if self.body is None else {"content-type": "application/json"}) | {
            **self.headers
        }
        return {name.encode(): value.encode() for name, value in named.items()}

    def __str__(self) -> str:
        shown = (self.content or b"")[:60]
        return f"{self.number} {self.method} {self.path} {shown!r} {str(self.headers)[:60]}"


def check_error(reply: httpx.Response, row: Row, *, kind: str = "invalid_request_error") -> None:
    """The reply is an error of this kind, and repeats nothing of the request."""
    assert reply.status_code == row.status, reply.text[:300]
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"].startswith("s0-")
    ((name, error),) = reply.json().items()
    assert name == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == kind
    assert error["param"] == row.param
    if row.code is not None:
        assert error["code"] == row.code
    assert error["message"]
    assert len(reply.content) < 500
    assert CANARY not in reply.text
    assert CANARY not in str(reply.headers)
    assert not {name for name in reply.headers if name.startswith("access-control")}
    if row.status == 405:
        assert reply.headers["allow"]


def without(body: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key != name}


def raw(name: str, value: str) -> bytes:
    """B with a field of raw JSON, such as NaN."""
    return json.dumps(without(B, name))[:-1].encode() + f', "{name}": {value}}}'.encode()


Fault = tuple[int, Any, str | None, str | None]
"""Kind, body, param, code."""

BODIES: list[Fault] = [
    (8, b"", None, "invalid_json"),
    (9, b"{", None, "invalid_json"),
    (9, b'{"model":"tiny-model",}', None, "invalid_json"),
    (9, b'{"a":1}{"b":2}', None, "invalid_json"),
    (9, b'{"seed": 01}', None, "invalid_json"),
    (9, b"{'a': 1}", None, "invalid_json"),
    (9, b'{"a": "\n"}', None, "invalid_json"),
    (9, json.dumps(B).encode("utf-16"), None, "invalid_json"),
    (9, b"\xef\xbb\xbf" + json.dumps(B).encode(), None, "invalid_json"),
    (9, b'{"model":"\xff"}', None, "invalid_json"),
    (9, b'{"model":"\xed\xa0\x80"}', None, "invalid_json"),
    (9, b"\0" * 100, None, "invalid_json"),
    (9, b'{"seed":' + b"9" * 5000 + b"}", None, "invalid_json"),
    (10, b"[]", None, "invalid_type"),
    (10, b'"x"', None, "invalid_type"),
    (10, b"null", None, "invalid_type"),
    (10, b"1", None, "invalid_type"),
    (11, b"[" * 100_000, None, "invalid_json"),
    (11, b'{"a":' * 100_000, None, "invalid_json"),
    (11, b'{"model":' + b"[" * 65 + b"]" * 65 + b"}", None, "invalid_json"),
    (11, b"[" * 2_000_000, None, "array_above_max_length"),
    (13, b'{"max_tokens":1,"max_tokens":1000000000}', None, "duplicate_key"),
    (13, b'{"metadata":{"a":"","a":""}}', None, "duplicate_key"),
    (13, b'{"a":1,"\\u0061":1}', None, "duplicate_key"),
    (21, B | {"foo": 1}, "foo", "unknown_parameter"),
    (21, B | {"\ud800" + CANARY: 1}, None, "invalid_unicode"),
    (21, B | {"x" * 100: 1}, None, "unknown_parameter"),
    (21, B | {f"k{i}": 1 for i in range(10_000)}, None, "object_above_max_length"),
]  # fmt: skip

PROMPTS: list[Fault] = [
    (22, without(B, "model"), "model", "missing_required_parameter"),
    (22, B | {"model": None}, "model", "invalid_type"),
    (22, B | {"model": 5}, "model", "invalid_type"),
    (22, B | {"model": ""}, "model", "empty_string"),
    (22, B | {"model": "\ud800"}, "model", "invalid_unicode"),
    (25, without(B, "prompt"), "prompt", "missing_required_parameter"),
    (25, B | {"prompt": None}, "prompt", "invalid_type"),
    (25, B | {"prompt": {"a": CANARY}}, "prompt", "invalid_type"),
    (26, B | {"prompt": ""}, "prompt", "empty_prompt"),
    (27, B | {"prompt": []}, "prompt", "empty_prompt"),
    (27, B | {"prompt": [[]]}, "prompt", "empty_prompt"),
    (27, B | {"prompt": [""]}, "prompt", "empty_prompt"),
    (27, B | {"prompt": [[], [1]]}, "prompt", "empty_prompt"),
    (27, B | {"prompt": [[1], []]}, "prompt", "empty_prompt"),
    (27, B | {"prompt": [1, "a"]}, "prompt", "invalid_type"),
    (27, B | {"prompt": ["a", 1]}, "prompt", "invalid_type"),
    (27, B | {"prompt": [True]}, "prompt", "invalid_type"),
    (27, B | {"prompt": [1.5]}, "prompt", "invalid_type"),
    *((29, B | {"prompt": ids}, "prompt", "invalid_token_id")
      for ids in ([-1], [2**31], [[1], [2**63]], [10**30])),
    (30, B | {"prompt": ["a"] * 100_000}, "prompt", "array_above_max_length"),
    (30, B | {"prompt": [[1]] * 65}, "prompt", "array_above_max_length"),
    (31, B | {"prompt": [1] * 256}, "prompt", "context_length_exceeded"),
    (31, B | {"prompt": [1] * 500_000}, "prompt", "context_length_exceeded"),
    (31, B | {"prompt": "a b" * 2000}, "prompt", "context_length_exceeded"),
    (31, B | {"prompt": "😀" * 2000}, "prompt", "context_length_exceeded"),
    (33, B | {"prompt": f"{CANARY}\ud800"}, "prompt", "invalid_unicode"),
    (33, B | {"prompt": ["a", "\udfff"]}, "prompt", "invalid_unicode"),
    (35, B | {"max_tokens": 256}, "max_tokens", "context_length_exceeded"),
    (36, B | {"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    (37, B | {"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
    *((37, B | {"truncate_prompt_tokens": value}, "truncate_prompt_tokens",
       "integer_below_min_value") for value in (0, -2)),
    (37, B | {"truncate_prompt_tokens": True}, "truncate_prompt_tokens", "invalid_type"),
    (37, B | {"prompt": [1, 10**9], "truncate_prompt_tokens": 1}, "prompt", "invalid_token_id"),
    (37, B | {"parse_special": 1}, "parse_special", "invalid_type"),
    (37, B | {"max_tokens": 10**9}, "max_tokens", "context_length_exceeded"),
    (37, B | {"max_tokens": 2**63}, "max_tokens", "context_length_exceeded"),
    (37, B | {"max_tokens": 10**400}, "max_tokens", None),
    (37, B | {"max_tokens": 1.5}, "max_tokens", "invalid_type"),
    (37, B | {"max_tokens": "4"}, "max_tokens", "invalid_type"),
    (37, B | {"max_tokens": True}, "max_tokens", "invalid_type"),
    (37, B | {"min_tokens": -1}, "min_tokens", "integer_below_min_value"),
    (37, B | {"min_tokens": 5}, "min_tokens", "invalid_value"),
    (39, B | {"n": 0}, "n", "integer_below_min_value"),
    (39, B | {"n": -1}, "n", "integer_below_min_value"),
    (39, B | {"n": 1.5}, "n", "invalid_type"),
    (39, B | {"n": True}, "n", "invalid_type"),
    (39, B | {"n": "2"}, "n", "invalid_type"),
    (40, B | {"n": 10**6}, "n", "integer_above_max_value"),
    (40, B | {"n": 2**63}, "n", "integer_above_max_value"),
    (41, B | {"n": 8, "prompt": ["a"] * 16}, "n", "integer_above_max_value"),
    (42, B | {"best_of": 10**6}, "best_of", "integer_above_max_value"),
    (42, B | {"n": 3, "best_of": 2}, "best_of", "invalid_value"),
    (42, B | {"best_of": 2, "stream": True}, "best_of", "unsupported_parameter"),
]  # fmt: skip

SAMPLING: list[Fault] = [
    *((43, raw(name, value), name, "invalid_number")
      for name in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty")
      for value in ("NaN", "Infinity", "-Infinity", "1e999")),
    *((43, raw(name, value), name, "invalid_type")
      for name in ("seed", "max_tokens", "n", "top_k") for value in ("NaN", "1e999", "1e-2")),
    (44, B | {"temperature": -0.1}, "temperature", "decimal_below_min_value"),
    (44, B | {"temperature": 2.1}, "temperature", "decimal_above_max_value"),
    (44, B | {"temperature": 1e308}, "temperature", "decimal_above_max_value"),
    (44, B | {"temperature": 10**400}, "temperature", None),
    (44, B | {"temperature": "1"}, "temperature", "invalid_type"),
    (44, B | {"temperature": True}, "temperature", "invalid_type"),
    (45, B | {"top_p": 0}, "top_p", "decimal_below_min_value"),
    (45, B | {"top_p": -1}, "top_p", "decimal_below_min_value"),
    (45, B | {"top_p": 1.1}, "top_p", "decimal_above_max_value"),
    (45, B | {"top_k": -2}, "top_k", "integer_below_min_value"),
    (45, B | {"top_k": 1.5}, "top_k", "invalid_type"),
    (45, B | {"top_k": 2**31}, "top_k", "integer_above_max_value"),
    (45, B | {"top_k": 10**30}, "top_k", "integer_above_max_value"),
    (57, B | {"prompt_logprobs": 10**30}, "prompt_logprobs", "integer_above_max_value"),
    (47, B | {"min_p": -1}, "min_p", "decimal_below_min_value"),
    (47, B | {"min_p": 2}, "min_p", "decimal_above_max_value"),
    (48, B | {"presence_penalty": 2.1}, "presence_penalty", "decimal_above_max_value"),
    (48, B | {"presence_penalty": -2.1}, "presence_penalty", "decimal_below_min_value"),
    (48, B | {"frequency_penalty": 2.1}, "frequency_penalty", "decimal_above_max_value"),
    (48, B | {"frequency_penalty": -2.1}, "frequency_penalty", "decimal_below_min_value"),
    (48, raw("frequency_penalty", "NaN"), "frequency_penalty", "invalid_number"),
    (48, B | {"repetition_penalty": 0}, "repetition_penalty", "decimal_below_min_value"),
    (48, B | {"repetition_penalty": 1e9}, "repetition_penalty", "decimal_above_max_value"),
    (50, B | {"seed": -(2**63) - 1}, "seed", "integer_below_min_value"),
    (50, B | {"seed": 2**64}, "seed", "integer_above_max_value"),
    (50, B | {"seed": 1.5}, "seed", "invalid_type"),
    (50, B | {"seed": CANARY}, "seed", "invalid_type"),
    (51, B | {"stop": ["x"] * 100_000}, "stop", "array_above_max_length"),
    (52, B | {"stop": ""}, "stop", "empty_string"),
    (52, B | {"stop": [""]}, "stop", "empty_string"),
    (52, B | {"stop": [1]}, "stop", "invalid_type"),
    (52, B | {"stop": [None]}, "stop", "invalid_type"),
    (52, B | {"stop": {"a": 1}}, "stop", "invalid_type"),
    (52, B | {"stop": CANARY * 170_000}, "stop", "string_above_max_length"),
    (53, B | {"stop": ["\ud800"]}, "stop", "invalid_unicode"),
    (54, B | {"stop_token_ids": [-1]}, "stop_token_ids", "invalid_token_id"),
    (54, B | {"stop_token_ids": [2**63]}, "stop_token_ids", "invalid_token_id"),
    (54, B | {"stop_token_ids": ["1"]}, "stop_token_ids", "invalid_type"),
    (54, B | {"stop_token_ids": 3}, "stop_token_ids", "invalid_type"),
    (54, B | {"stop_token_ids": [1] * 10**6}, "stop_token_ids", "array_above_max_length"),
    *((55, B | {"logit_bias": {key: 1}}, "logit_bias", "invalid_token_id")
      for key in ("-1", "abc", "1e3", " 5", "٣", "", "007", "9" * 30, "\ud800")),
    (55, B | {"logit_bias": {"1": 101}}, "logit_bias", "invalid_number"),
    (55, raw("logit_bias", '{"1": NaN}'), "logit_bias", "invalid_number"),
    (55, B | {"logit_bias": {"1": None}}, "logit_bias", "invalid_type"),
    (55, B | {"logit_bias": {"1": True}}, "logit_bias", "invalid_type"),
    (55, B | {"logit_bias": [1]}, "logit_bias", "invalid_type"),
    (55, B | {"logit_bias": {str(k): 1 for k in range(100_000)}}, "logit_bias",
     "object_above_max_length"),
]  # fmt: skip

SHAPES: list[Fault] = [
    (57, B | {"logprobs": -1}, "logprobs", "integer_below_min_value"),
    (57, B | {"logprobs": 6}, "logprobs", "integer_above_max_value"),
    (57, B | {"logprobs": 10**6}, "logprobs", "integer_above_max_value"),
    (57, B | {"logprobs": True}, "logprobs", "invalid_type"),
    (57, B | {"echo": 1}, "echo", "invalid_type"),
    (68, B | {"stream": "yes"}, "stream", "invalid_type"),
    (68, B | {"stream": 1}, "stream", "invalid_type"),
    (69, B | {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    (69, B | {"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo",
     "unknown_parameter"),
    (69, B | {"stream": True, "stream_options": 1}, "stream_options", "invalid_type"),
    (61, B | {"on_disconnect": CANARY}, "on_disconnect", "invalid_value"),
    (61, B | {"user": 5}, "user", "invalid_type"),
    (61, B | {"user": "\ud800"}, "user", "invalid_unicode"),
    (61, B | {"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
    *((93, B | {name: LONG}, name, "string_above_max_length") for name in LABELS),
    (93, B | {"metadata": {str(k): "" for k in range(17)}}, "metadata",
     "object_above_max_length"),
    (93, B | {"metadata": {"a" * 65: ""}}, "metadata", "string_above_max_length"),
    (93, B | {"metadata": {"a": LONG}}, "metadata.a", "string_above_max_length"),
    *((61, B | {name: value}, name, "unsupported_parameter") for name, value in [
        ("suffix", CANARY), ("audio", {"voice": "x"}), ("images", ["x"]), ("modalities", ["audio"]),
        ("prediction", {}), ("store", True), ("store", 0), ("use_beam_search", True),
        ("service_tier", "flex"), ("verbosity", "low"),
    ]),
    (63, B | {"chat_template": "{{ ''.__class__ }}"}, "chat_template", "unsupported_parameter"),
    (72, B | {"cache_salt": CANARY}, "cache_salt", "unsupported_parameter"),
]  # fmt: skip

MODELS = (
    "nope" + CANARY, "../../etc/passwd", "m\u0000", "m\r\nX: y", CANARY * 170_000, "${jndi:x}",
)  # fmt: skip

CONTENTS: list[tuple[int, Any, str]] = [
    (65, None, "invalid_type"), (65, 5, "invalid_type"), (65, {}, "invalid_type"),
    (65, [], "empty_array"), (65, ["x"], "invalid_type"), (65, [{}], "invalid_type"),
    (65, [{"type": "text", "text": 5}], "invalid_type"),
    (65, [{"type": "text"}], "unknown_parameter"),
    (65, [{"type": "text", "text": "a", "cache": 1}], "unknown_parameter"),
    (66, [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/" + CANARY}}],
     "unsupported_content"),
    (66, [{"type": "file", "file": "file:///etc/passwd"}], "unsupported_content"),
    (66, [{"type": "input_audio", "input_audio": {"data": CANARY}}], "unsupported_content"),
    (33, "\ud800", "invalid_unicode"),
    (33, [{"type": "text", "text": "\ud800"}], "invalid_unicode"),
]  # fmt: skip


def said(**message: Any) -> dict[str, Any]:
    """C with one message."""
    return C | {"messages": [message]}


CHATS: list[Fault] = [
    (36, C | {"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    (38, C | {"max_completion_tokens": 5}, "max_completion_tokens", "invalid_value"),
    (37, C | {"max_tokens": None, "max_completion_tokens": 10**9}, "max_completion_tokens",
     "context_length_exceeded"),
    *((36, C | {"max_tokens": None, "max_completion_tokens": value}, "max_completion_tokens",
       "integer_below_min_value") for value in (0, -1)),
    (36, C | {"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
    (61, C | {"prediction": {"type": "x", "content": "a"}}, "prediction.type", "invalid_value"),
    (61, C | {"prediction": {"type": "content", "content": [{"type": "image_url"}]}},
     "prediction.content", "unsupported_content"),
    (61, C | {"prediction": {"type": "content"}}, "prediction.content",
     "missing_required_parameter"),
    (31, C | {"prediction": {"type": "content", "content": "a b" * 2000}}, "prediction",
     "context_length_exceeded"),
    (61, C | {"service_tier": CANARY}, "service_tier", "invalid_value"),
    (61, C | {"verbosity": CANARY}, "verbosity", "invalid_value"),
    (61, C | {"store": 1}, "store", "invalid_type"),
    (61, C | {"modalities": ["text", "audio"]}, "modalities", None),
    (61, C | {"modalities": ["audio"]}, "modalities[0]", "invalid_value"),
    (61, C | {"prompt_cache_options": 1}, "prompt_cache_options", "invalid_type"),
    *((61, C | {name: {}}, name, "unsupported_parameter")
      for name in ("web_search_options", "moderation", "audio")),
    (65, said(role="user", content="hi", refusal="no"), "messages[0].refusal", "invalid_value"),
    (65, said(role="assistant", content=[{"type": "refusal", "text": "a"}]),
     "messages[0].content", "unknown_parameter"),
    (65, said(role="assistant", annotations=[1]), "messages[0].annotations[0]", "invalid_type"),
    (58, C | {"top_logprobs": 5}, "top_logprobs", "invalid_value"),
    (58, C | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
    (58, C | {"logprobs": 3}, "logprobs", "invalid_type"),
    (63, C | {"chat_template": "{{ x }}"}, "chat_template", "unsupported_parameter"),
    (63, C | {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs",
     "unsupported_parameter"),
    (63, C | {"chat_template_kwargs": {"enable_thinking": "{{ ''.__class__ }}"}},
     "chat_template_kwargs", "invalid_type"),
    (64, without(C, "messages"), "messages", "missing_required_parameter"),
    (64, C | {"messages": []}, "messages", "array_below_min_length"),
    (64, C | {"messages": "hi"}, "messages", "invalid_type"),
    (64, C | {"messages": ["hi"]}, "messages[0]", "invalid_type"),
    (65, said(role=CANARY, content="x"), "messages[0].role", "invalid_value"),
    (65, said(content="x"), "messages[0].role", "missing_required_parameter"),
    (65, said(role="user"), "messages[0].content", "missing_required_parameter"),
    (65, said(role="user", content="x", foo=1), "messages[0].foo", "unknown_parameter"),
    *((number, said(role="user", content=content), "messages[0].content", code)
      for number, content, code in CONTENTS),
    (67, C | {"messages": C["messages"] * 50_000}, "messages", "array_above_max_length"),
    (31, said(role="user", content="a b" * 2000), "messages", "context_length_exceeded"),
    (21, C | {"continue_final_message": True, "add_generation_prompt": True},
     "continue_final_message", "invalid_value"),
    (21, C | {"prompt": "x"}, "prompt", "unknown_parameter"),
    *((93, C | {name: LONG}, name, "string_above_max_length") for name in LABELS),
    (93, said(role="user", content="x", name=LONG), "messages[0].name", "string_above_max_length"),
    (93, said(role="tool", content="x", tool_call_id=LONG), "messages[0].tool_call_id",
     "string_above_max_length"),
    (42, C | {"best_of": 2}, "best_of", "unknown_parameter"),
]  # fmt: skip

RESPONDED: list[Fault] = [
    (64, without(R, "input"), "input", "missing_required_parameter"),
    (64, R | {"input": []}, "input", "array_below_min_length"),
    (65, R | {"input": [{"role": CANARY, "content": "x"}]}, "input[0].role", "invalid_value"),
    (66, R | {"input": [{"role": "user", "content": [
        {"type": "input_image", "image_url": "http://169.254.169.254/" + CANARY}]}]},
     "input[0].content", "unsupported_content"),
    (37, R | {"max_output_tokens": 10**9}, "max_output_tokens", "context_length_exceeded"),
    *((93, R | {name: LONG}, name, "string_above_max_length") for name in LABELS),
    (93, R | {"input": [{"role": "user", "content": "x", "id": LONG}]}, "input[0].id",
     "string_above_max_length"),
    (93, R | {"metadata": {"a": LONG}}, "metadata.a", "string_above_max_length"),
    (93, R | {"text": {"format": {"type": "text", "name": LONG}}}, "text.format.name",
     "string_above_max_length"),
    (33, R | {"text": {"format": {"type": "text", "schema": {"a": "\ud800"}}}},
     "text.format.schema", "invalid_unicode"),
    (61, R | {"conversation": CANARY}, "conversation", "unsupported_parameter"),
    (61, R | {"background": True, "store": False}, "background", "invalid_value"),
]  # fmt: skip

HEADERS: list[tuple[int, dict[str, str], str]] = [
    *((73, {"x-request-timeout-ms": value}, "x-request-timeout-ms")
      for value in ("-1", "abc", "1000000000000", "0", "1.5", "", "9" * 100, "\u0661")),
    (75, {"idempotency-key": ""}, "idempotency-key"),
    (75, {"idempotency-key": "a b"}, "idempotency-key"),
    (75, {"idempotency-key": "k" * 256}, "idempotency-key"),
    (75, {"idempotency-key": "é"}, "idempotency-key"),
    (79, {"x-quire-event-ids": CANARY}, "x-quire-event-ids"),
]  # fmt: skip

MEDIA: list[tuple[int, dict[str, str]]] = [
    (14, {"content-type": "text/plain"}),
    (14, {"content-type": "application/x-www-form-urlencoded"}),
    (14, {"content-type": "multipart/form-data; boundary=x"}),
    (14, {"content-type": "application/jsonp"}),
    (14, {"content-type": "application/json; charset=utf-16"}),
    (14, {"content-type": ""}),
    (15, {"content-encoding": "gzip"}),
    (15, {"content-encoding": "identity, br"}),
]

NOWHERE = (
    "/nope", "/v1//completions", "/V1/completions", "/v1/completions/", "/v1", "//v1/completions",
    "/x/%2e%2e/v1/completions", "/v1/completions%00", "/v1/completions;a=b",
)  # fmt: skip
NOT_HERE = ("/metrics", "/redoc", "/debug", "/debug/vars", "/.env")


def rows(*, vocab_size: int) -> Iterator[Row]:
    """All of them."""
    for number, body, param, code in (*BODIES, *PROMPTS, *SAMPLING, *SHAPES):
        yield Row(number=number, body=body, param=param, code=code)
    for number, body, param, code in CHATS:
        yield Row(number=number, body=body, param=param, code=code, path=CHAT)
    for number, body, param, code in RESPONDED:
        yield Row(number=number, body=body, param=param, code=code, path=RESPONSES)
    one_over = {"prompt": [vocab_size], "stop_token_ids": [vocab_size]}
    for name, value in one_over.items():
        yield Row(number=29, body=B | {name: value}, param=name, code="invalid_token_id")
    bias = {str(vocab_size): 1}
    yield Row(number=55, body=B | {"logit_bias": bias}, param="logit_bias", code="invalid_token_id")
    for model in MODELS:
        number = 23 if model.startswith("nope") else 24
        for path, body in ((COMPLETIONS, B), (CHAT, C), (RESPONSES, R)):
            yield Row(number=number, body=body | {"model": model}, path=path, status=404,
                      param="model", code="model_not_found")  # fmt: skip
    yield from _header_rows()
    yield from _address_rows()


def _header_rows() -> Iterator[Row]:
    for number, headers, name in HEADERS:
        yield Row(number=number, body=B, headers=headers, param=name, code="invalid_value")
    for number, headers in MEDIA:
        yield Row(number=number, body=B, headers=headers, status=415, code="unsupported_media_type")
    yield Row(number=15, body=gzip.compress(b" " * 1_000_000), status=415,
              headers={"content-encoding": "gzip"}, code="unsupported_media_type")  # fmt: skip


def _address_rows() -> Iterator[Row]:
    for method in ("GET", "PUT", "DELETE", "FOO", "PATCH", "OPTIONS"):
        headers = {"origin": "https://elsewhere.example"}
        yield Row(number=89 if method == "OPTIONS" else 6, method=method, status=405,
                  headers=headers, code="method_not_allowed")  # fmt: skip
    for number, paths in ((7, NOWHERE), (88, NOT_HERE)):
        for path in paths:
            for method in ("GET", "POST"):
                body = B if method == "POST" else None
                yield Row(number=number, method=method, path=path, body=body, status=404,
                          code="unknown_url")  # fmt: skip
    for call_id in (NEW_ID, "nope", "%00", "x" * 1000, "%ff", "s0-", CANARY):
        for method in ("GET", "DELETE"):
            yield Row(number=78, method=method, path=f"/v1/streams/{call_id}", status=404,
                      code="stream_not_found")  # fmt: skip
            yield Row(number=78, method=method, path=f"/v1/responses/{call_id}", status=404,
                      code="response_not_found")  # fmt: skip
    for method in ("GET", "DELETE"):
        yield Row(number=80, method=method, path=f"/v1/streams/{OLD_ID}", status=410,
                  code="stream_expired")  # fmt: skip
    for value in ("-1", "x", str(10**10)):
        path = f"/v1/responses/{NEW_ID}?starting_after={value}"
        yield Row(number=79, method="GET", path=path, param="starting_after")


def asked(*, vocab_size: int) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Kind, path, body: odd requests that are answered."""
    for prompt in ("\0", "\x1b[31m", "\u202e", "<|im_end|>", "<s>", "\u0301" * 50):
        yield 34, COMPLETIONS, B | {"prompt": prompt}
    yield 34, CHAT, said(role="user", content="<|im_end|>\0\u202e")
    yield 37, COMPLETIONS, B | {"max_tokens": None}
    yield 44, COMPLETIONS, B | {"temperature": 1e-320}
    yield 45, COMPLETIONS, B | {"top_p": 1e-12}
    yield 56, COMPLETIONS, B | {"logit_bias": {str(k): -100 for k in range(vocab_size)}}
    yield 60, COMPLETIONS, B | {"prompt": "a b " * 20, "echo": True, "logprobs": 5}


IDS: tuple[bytes, ...] = (b"a" * 10_000, CANARY.encode(), b"\xe9", b"\xc3\xa9", b"a\tb", b"")
"""x-request-id (74): never used, never repeated."""
