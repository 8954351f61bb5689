"""Fields that ban words, allow tokens, and show special tokens and stop strings."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import BadRequest

PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
}
TOOL = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize("path", PATHS)
async def test_the_engine_gets_what_decides_about_tokens_and_text(service: Any, path: str) -> None:
    body = PATHS[path] | {
        "model": "tiny-model", "max_tokens": 4, "bad_words": ["hello", "the words"],
        "allowed_token_ids": [9, 5, 5], "include_stop_str_in_output": True,
        "skip_special_tokens": False, "stop": ["x"],
    }  # fmt: skip
    reply = await service.post(path, body)
    assert reply.status_code == 200, reply.text
    (request,) = service.engine.seen
    tokenizer = service.tokenizer
    assert request.sampling.allowed == (5, 9)
    texts = sorted(tokenizer.decode(ids) for ids in request.sampling.banned)
    assert texts == [" hello", " the words", "hello", "the words"]
    assert (request.include_stop, request.skip_special_tokens) == (True, False)
    assert set(request.features) == {"bans", "text"}


async def test_special_tokens_are_shown_by_their_names(service: Any, read_events: Any) -> None:
    tokenizer = service.tokenizer
    text = "<s>hi<|im_start|>é<|im_start|>"
    service.engine.script = lambda _: tokenizer.encode(text, add_bos=False, parse_special=True)
    for path, prompt in PATHS.items():
        body = prompt | {"model": "tiny-model", "max_tokens": 9, "logprobs": 1 if "prompt" in prompt
                         else True}  # fmt: skip
        for skip, shown in ((None, "hié"), (True, "hié"), (False, text)):
            whole = await service.post(path, body | {"skip_special_tokens": skip})
            (choice,) = whole.json()["choices"]
            assert (choice.get("text") or choice["message"]["content"]) == shown
            if "prompt" in prompt and not skip and skip is not None:
                found = choice["logprobs"]
                for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
                    assert text.startswith(token, offset) or "\ufffd" in token


async def test_an_echoed_list_of_ids_is_shown_in_the_same_way(service: Any) -> None:
    ids = service.tokenizer.encode("a<s>b", add_bos=False, parse_special=True)
    body = {"model": "tiny-model", "prompt": ids, "max_tokens": 0, "echo": True}
    for skip, text in ((True, "ab"), (False, "a<s>b")):
        reply = await service.post("/v1/completions", body | {"skip_special_tokens": skip})
        assert reply.json()["choices"][0]["text"] == text


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"bad_words": [""]}, "bad_words", "empty_string"),
        ({"bad_words": ["a"] * 65}, "bad_words", "array_above_max_length"),
        ({"bad_words": ["a" * 65]}, "bad_words", "string_above_max_length"),
        ({"bad_words": [5]}, "bad_words", "invalid_type"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "empty_array"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids", "invalid_token_id"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids", "invalid_token_id"),
        ({"allowed_token_ids": list(range(1025))}, "allowed_token_ids", "array_above_max_length"),
        ({"allowed_token_ids": [1], "min_tokens": 1, "stop_token_ids": [1]}, "allowed_token_ids",
         "invalid_value"),
        ({"allowed_token_ids": [66], "bad_words": ["b"]}, None, None),
        ({"bad_words": ["a"], "structured_outputs": {"choice": ["a", "b"]}}, "bad_words",
         "invalid_value"),
        ({"allowed_token_ids": [1], "response_format": {"type": "json_object"}},
         "allowed_token_ids", "invalid_value"),
        ({"skip_special_tokens": False, "tools": [TOOL]}, "skip_special_tokens", "invalid_value"),
        ({"skip_special_tokens": 0}, "skip_special_tokens", "invalid_type"),
        ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens",
         "unsupported_parameter"),
    ],
)  # fmt: skip
async def test_what_contradicts_or_exceeds_is_refused(
    service: Any, fields: dict[str, Any], param: str | None, code: str | None
) -> None:
    chat = {"model": "tiny-model", "max_tokens": 4} | PATHS["/v1/chat/completions"]
    reply = await service.post("/v1/chat/completions", chat | fields)
    if code is None:
        assert reply.status_code == 200, reply.text
        return
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, param, code), error
    assert (
        error["code"] != BadRequest.default_code
        or "contradicts" in error["message"]
        or ("must contain a token" in error["message"])
    )


async def test_allowed_tokens_must_not_all_be_bad_words(service: Any) -> None:
    (token,) = service.tokenizer.encode("b", add_bos=False)
    body = {"model": "tiny-model", "max_tokens": 4} | PATHS["/v1/completions"]
    fields = {"allowed_token_ids": [token], "bad_words": ["b"]}
    reply = await service.post("/v1/completions", body | fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "allowed_token_ids")
