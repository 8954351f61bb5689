"""POST /v1/completions: the shape of the answer, and what each option asks of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from service.messages import FinishReason, GenerationRequest

B = {"model": "tiny-model", "prompt": "hello", "max_tokens": 6, "seed": 3}


async def ask(service: Any, **fields: Any) -> dict[str, Any]:
    reply = await service.post("/v1/completions", B | fields)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def test_the_answer_is_what_the_engine_journalled(service: Any) -> None:
    body = await ask(service, return_token_ids=True)
    (request,) = service.engine.seen
    ids = service.engine.script(request)
    assert set(body) == {
        "id", "object", "created", "model", "system_fingerprint", "choices", "usage",
    }  # fmt: skip
    assert body["object"] == "text_completion"
    assert body["system_fingerprint"] == "class-1"
    assert body["choices"] == [
        {
            "index": 0,
            "text": service.tokenizer.decode(ids),
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": list(ids),
            "prompt_token_ids": list(request.prompt_ids),
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": len(request.prompt_ids),
        "completion_tokens": 6,
        "total_tokens": len(request.prompt_ids) + 6,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


async def test_every_field_reaches_the_engine(service: Any) -> None:
    fields = {
        "min_tokens": 2, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1,
        "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.5,
        "logit_bias": {"9": 2, "3": -5.5}, "seed": -1, "stop": ["a", "b"], "stop_token_ids": [4],
        "ignore_eos": True, "priority": 2, "logprobs": 3, "echo": True,
    }  # fmt: skip
    reply = await service.post("/v1/completions", B | fields, x_request_timeout_ms="5000")
    assert reply.status_code == 200
    (request,) = service.engine.seen
    sampling = request.sampling
    assert request.id == f"{reply.headers['x-request-id']}.0"
    assert (request.max_tokens, request.min_tokens, request.ignore_eos) == (6, 2, True)
    assert (request.stop, request.stop_token_ids) == (("a", "b"), (4,))
    assert (request.priority, request.timeout_ms, request.tenant) == (2, 5000, "public")
    assert (request.prompt_logprobs, sampling.top_logprobs) == (3, 3)
    assert (sampling.seed, sampling.temperature, sampling.top_k) == (2**64 - 1, 0.5, 7)
    assert (sampling.top_p, sampling.min_p, sampling.repetition_penalty) == (0.9, 0.1, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.0)
    assert sampling.logit_bias == ((3, -5.5), (9, 2.0))


async def test_defaults(service: Any) -> None:
    for _ in range(2):
        reply = await service.post("/v1/completions", {"model": "tiny-model", "prompt": [1, 2]})
        assert reply.status_code == 200
    first, second = service.engine.seen
    assert (first.max_tokens, first.sampling.temperature, first.sampling.top_k) == (16, 1.0, None)
    assert first.sampling.top_logprobs is first.prompt_logprobs is None
    assert first.sampling.seed != second.sampling.seed, "a seed is drawn where none is given"
    await ask(service, prompt=[1] * 250, max_tokens=None)
    assert service.engine.seen[-1].max_tokens == 6, "the default shrinks to what is left"


async def test_prompts_times_choices(service: Any) -> None:
    body = await ask(service, prompt=["hello", "world"], n=3)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    seen = sorted(service.engine.seen, key=lambda request: request.id)
    assert [r.sampling.choice for r in seen] == [0, 1, 2, 0, 1, 2]
    assert [choice["text"] for choice in body["choices"]] == [
        service.tokenizer.decode(service.engine.script(request)) for request in seen
    ]
    assert body["usage"]["prompt_tokens"] == len(seen[0].prompt_ids) + len(seen[3].prompt_ids)
    assert body["usage"]["completion_tokens"] == 36


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_best_of_gives_the_likeliest(service: Any, logprobs: int | None) -> None:
    body = await ask(service, n=2, best_of=5, logprobs=logprobs)

    def mean(
        request: GenerationRequest,
    ) -> float:
        # The scripted log probability of a token is -id / 7.
        ids: Sequence[int] = service.engine.script(request)
        return -sum(ids) / len(ids)

    best = sorted(service.engine.seen, key=mean, reverse=True)[:2]
    assert len(service.engine.seen) == 5
    assert [choice["text"] for choice in body["choices"]] == [
        service.tokenizer.decode(service.engine.script(request)) for request in best
    ]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert (body["choices"][0]["logprobs"] is None) == (logprobs is None)
    assert body["usage"]["completion_tokens"] == 30


async def test_echo_with_logprobs(service: Any) -> None:
    body = await ask(service, prompt="hello 😀", echo=True, logprobs=1, max_tokens=3)
    (request,) = service.engine.seen
    ids = [*request.prompt_ids, *service.engine.script(request)]
    (choice,) = body["choices"]
    assert choice["text"].startswith("hello 😀")
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [service.tokenizer.token_text(token) for token in ids]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1] == pytest.approx(-ids[1] / 7)
    assert {len(top) for top in logprobs["top_logprobs"][1:]} <= {1, 2}
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    assert offsets[len(request.prompt_ids)] == len("hello 😀")


async def test_text_offsets_point_at_the_tokens(service: Any) -> None:
    service.engine.script = lambda _request: service.tokenizer.encode("hello wörld 😀!")
    (choice,) = (await ask(service, logprobs=0))["choices"]
    logprobs = choice["logprobs"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if "\ufffd" not in token:
            assert choice["text"][offset:].startswith(token)


async def test_echo_of_token_ids(service: Any) -> None:
    ids = service.tokenizer.encode("hello world", add_bos=False)
    (choice,) = (await ask(service, prompt=ids, echo=True))["choices"]
    assert choice["text"].startswith("hello world")
    assert choice["logprobs"] is None


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_without_output_the_prompt_is_scored(service: Any, logprobs: int | None) -> None:
    service.engine.end = FinishReason.STOP
    service.engine.stopped_by = 4
    body = await ask(service, max_tokens=0, echo=True, logprobs=logprobs, return_token_ids=True)
    (request,) = service.engine.seen
    assert (request.max_tokens, request.prompt_logprobs) == (1, logprobs)
    (choice,) = body["choices"]
    assert (choice["text"], choice["token_ids"]) == ("hello", [])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
    assert body["usage"]["completion_tokens"] == 0
    assert body["usage"]["total_tokens"] == len(request.prompt_ids)
    if logprobs is not None:
        assert len(choice["logprobs"]["token_logprobs"]) == len(request.prompt_ids)


async def test_a_raw_prompt_spells_special_tokens(service: Any) -> None:
    """As in llama.cpp, vLLM and transformers; messages never do."""
    text = "<|im_start|>user\nhi<|im_end|>\n"
    tokenizer = service.tokenizer
    for parse, special in ((None, 2), (True, 2), (False, 0)):
        body = await ask(service, prompt=text, parse_special=parse, echo=True, logprobs=0)
        ids = service.engine.seen[-1].prompt_ids
        assert sum(map(tokenizer.is_special, ids)) == special
        assert list(ids) == tokenizer.encode(text, parse_special=parse is not False)
        (choice,) = body["choices"]
        assert choice["text"].startswith(text)
        logprobs = choice["logprobs"]
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            if offset < len(text):
                assert text.startswith(token, offset)
        reply = await service.post("/tokenize", {"prompt": text, "parse_special": parse})
        assert reply.json()["tokens"] == list(ids)


@pytest.mark.parametrize("prompt", ["hello world, how are you?", [5, 9, 240, 200, 7]])
async def test_a_prompt_is_cut_from_its_beginning(service: Any, prompt: Any) -> None:
    await ask(service, prompt=prompt)
    whole = service.engine.seen[-1].prompt_ids
    assert len(whole) > 4
    body = await ask(service, prompt=prompt, truncate_prompt_tokens=4, echo=True)
    assert service.engine.seen[-1].prompt_ids == whole[-4:]
    assert body["usage"]["prompt_tokens"] == 4
    assert body["choices"][0]["text"].startswith(service.tokenizer.decode(whole[-4:]))
    for keep in (-1, 1000):
        await ask(service, prompt=prompt, truncate_prompt_tokens=keep)
        assert service.engine.seen[-1].prompt_ids == whole


async def test_what_fits_beside_the_output_is_kept(service: Any) -> None:
    for prompt in ("hello " * 4000, [5, 9] * 500):
        await ask(service, prompt=prompt, truncate_prompt_tokens=-1, max_tokens=6)
        assert len(service.engine.seen[-1].prompt_ids) == 256 - 6
    messages = [{"role": "user", "content": "hello " * 4000}]
    chat = {"model": "tiny-model", "messages": messages, "truncate_prompt_tokens": -1}
    assert (await service.post("/v1/chat/completions", chat)).status_code == 200
    assert len(service.engine.seen[-1].prompt_ids) == 255


async def test_tokens_are_named_by_their_ids(service: Any) -> None:
    body = await ask(service, logprobs=2, return_tokens_as_token_ids=True)
    ids = service.engine.script(service.engine.seen[-1])
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{token}" for token in ids]
    assert all(key.startswith("token_id:") for top in logprobs["top_logprobs"] for key in top)
    chat = {
        "model": "tiny-model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3,
        "logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    reply = (await service.post("/v1/chat/completions", chat)).json()
    content = reply["choices"][0]["logprobs"]["content"]
    ids = service.engine.script(service.engine.seen[-1])
    assert [entry["token"] for entry in content] == [f"token_id:{token}" for token in ids]
    assert content[0]["top_logprobs"][0]["token"].startswith("token_id:")


async def test_why_it_stopped(service: Any) -> None:
    service.engine.end = FinishReason.STOP
    service.engine.stopped_by = "x"
    (choice,) = (await ask(service))["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "x")
