"""Log probabilities, token ids and counts beside the answer, in OpenAI's and vLLM's shapes.

The scripted engine gives a token the log probability -id / 7; the likeliest are the token itself
and those after it.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from service.api.generation.logprobs import LOWEST, prompt_logprobs
from service.messages import TokenLogprob

B = {"model": "tiny-model", "max_tokens": 5, "seed": 3}
PROMPT = {"prompt": "hello world"}
CHAT = {"messages": [{"role": "user", "content": "hello 😀"}]}
PATHS = {"prompt": "/v1/completions", "messages": "/v1/chat/completions"}


def path_of(body: dict[str, Any]) -> str:
    return PATHS["prompt" if "prompt" in body else "messages"]


async def ask(service: Any, body: dict[str, Any], **headers: str) -> Any:
    reply = await service.post(path_of(body), B | body, **headers)
    assert reply.status_code == 200, reply.text
    return reply


def expected(service: Any, ids: tuple[int, ...], num_top: int) -> list[dict[str, Any] | None]:
    size, text = service.tokenizer.vocab_size, service.tokenizer.token_text
    entries: list[dict[str, Any] | None] = [None]
    for token in ids[1:]:
        top = [((token + k) % size, -k / 3) for k in range(num_top)]
        scores = {token: (-token / 7, None)} | {
            other: (value, rank) for rank, (other, value) in enumerate(top, start=1)
        }
        entries.append(
            {
                str(other): {"logprob": value, "rank": rank, "decoded_token": text(other)}
                for other, (value, rank) in scores.items()
            }
        )
    return entries


def told(event: dict[str, Any]) -> list[tuple[int, str, Any]]:
    """What one chunk, or a whole body, says of prompts: (choice, field, value); -1: of all."""
    names = ("prompt_logprobs", "prompt_token_ids")
    found = [(-1, name, event[name]) for name in names if name in event]
    for choice in event["choices"]:
        found += [(choice["index"], name, choice[name]) for name in names if name in choice]
    return sorted(found, key=str)


@pytest.mark.parametrize("num_top", [0, 1, 3])
async def test_each_prompt_token_has_its_entry(service: Any, num_top: int) -> None:
    body = (await ask(service, PROMPT | {"prompt_logprobs": num_top})).json()
    (request,) = service.engine.seen
    assert request.prompt_logprobs == num_top
    assert request.sampling.top_logprobs is None
    (choice,) = body["choices"]
    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"] == expected(service, request.prompt_ids, num_top)
    assert "prompt_token_ids" not in choice
    assert choice["text"] == service.tokenizer.decode(service.engine.script(request))


async def test_a_chat_tells_of_its_one_prompt_once(service: Any) -> None:
    asked = CHAT | {"prompt_logprobs": 1, "return_token_ids": True, "n": 2}
    body = (await ask(service, asked)).json()
    request = service.engine.seen[0]
    ids = request.prompt_ids
    assert told(body) == [
        (-1, "prompt_logprobs", expected(service, ids, 1)),
        (-1, "prompt_token_ids", list(ids)),
    ]
    assert all("token_ids" in choice for choice in body["choices"])


@pytest.mark.parametrize(("echoed", "beside"), [(0, 3), (3, 0), (2, 2), (2, None)])
async def test_an_echo_and_what_is_beside_it_keep_their_own_numbers(
    service: Any, echoed: int, beside: int | None
) -> None:
    asked = PROMPT | {"echo": True, "logprobs": echoed, "prompt_logprobs": beside}
    (choice,) = (await ask(service, asked)).json()["choices"]
    (request,) = service.engine.seen
    assert request.prompt_logprobs == max(echoed, beside or 0)
    assert request.sampling.top_logprobs == echoed
    by_text = choice["logprobs"]["top_logprobs"][1 : len(request.prompt_ids)]
    assert {len(top) for top in by_text} == {max(1, echoed)}
    if beside is None:
        assert "prompt_logprobs" not in choice
    else:
        assert choice["prompt_logprobs"] == expected(service, request.prompt_ids, beside)


@pytest.mark.parametrize("seed", range(6))
async def test_streamed_and_resumed_they_are_the_same(
    service: Any, read_events: Any, seed: int
) -> None:
    draw = random.Random(seed)
    prompt: dict[str, Any] = draw.choice([PROMPT, CHAT, {"prompt": [[7, 2], [5, 9, 240]]}])
    asked = prompt | {
        "prompt_logprobs": draw.choice([0, 2]),
        "return_token_ids": draw.choice([None, True]),
        "n": draw.choice([1, 2]),
    }
    if "prompt" in asked:
        asked["echo"] = draw.choice([None, True])
    whole = (await ask(service, asked)).json()
    reply = await ask(service, asked | {"stream": True}, x_quire_event_ids="1")
    events = read_events(reply.content)
    streamed = sorted((item for event in events for item in told(event)), key=str)
    assert streamed == told(whole)
    call_id = reply.headers["x-request-id"]
    resumed = await service.client.get(f"/v1/streams/{call_id}")
    again = read_events(resumed.content)
    assert sorted((item for event in again for item in told(event)), key=str) == streamed


async def test_an_answer_that_never_began_has_none(service: Any, read_events: Any) -> None:
    service.engine.script = lambda _request: []
    for asked in (PROMPT, CHAT):
        whole = (await ask(service, asked | {"prompt_logprobs": 1})).json()
        assert [value for _, _, value in told(whole)] == [None]
        stream = await ask(service, asked | {"prompt_logprobs": 1, "stream": True})
        told_in_stream = [item for e in read_events(stream.content) for item in told(e)]
        assert told_in_stream == told(whole)


@pytest.mark.parametrize(
    ("path", "number", "code"),
    [
        ("prompt", 21, "integer_above_max_value"),
        ("messages", 21, "integer_above_max_value"),
        ("prompt", -1, "integer_below_min_value"),
        ("prompt", True, "invalid_type"),
    ],
)
async def test_its_limits(service: Any, path: str, number: Any, code: str) -> None:
    body = B | (PROMPT if path == "prompt" else CHAT) | {"prompt_logprobs": number}
    reply = await service.post(PATHS[path], body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["code"]) == ("prompt_logprobs", code)


async def test_a_long_prompt_is_not_told_of(start_service: Any, small_limits: Any) -> None:
    async with start_service(limits=small_limits(max_echo_tokens=3)) as service:
        body = B | {"prompt": [5, 6, 7, 8], "prompt_logprobs": 0}
        reply = await service.post("/v1/completions", body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_a_token_that_is_not_among_the_likeliest_has_no_rank(service: Any) -> None:
    token = TokenLogprob(-9.5, ((7, -0.5), (8, float("-inf"))))
    entries = prompt_logprobs([5, 6], [None, token], service.tokenizer)
    assert entries is not None
    first, second = entries
    assert first is None
    assert second is not None
    assert [(key, e["logprob"], e["rank"]) for key, e in second.items()] == [
        ("6", -9.5, None),
        ("7", -0.5, 1),
        ("8", LOWEST, 2),
    ]


@pytest.mark.slow
async def test_the_openai_client_reads_them(service: Any, listen: Any) -> None:
    """What OpenAI's types do not know, its client keeps in `model_extra`."""
    import openai

    extra = {"prompt_logprobs": 1, "return_token_ids": True}
    options: Any = {"model": "tiny-model", "max_tokens": 4, "seed": 1, "extra_body": extra}
    usage_too: Any = {
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    async with (
        listen(service.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        chat: Any = options | {"messages": CHAT["messages"], "logprobs": True, "top_logprobs": 1}
        whole = await client.chat.completions.create(**chat)
        assert whole.model_extra is not None
        (request,) = service.engine.seen
        assert whole.model_extra["prompt_token_ids"] == list(request.prompt_ids)
        prompt = whole.model_extra["prompt_logprobs"]
        assert prompt == expected(service, request.prompt_ids, 1)
        chunks: Any = [
            chunk async for chunk in await client.chat.completions.create(**chat | usage_too)
        ]
        assert chunks[0].model_extra["prompt_logprobs"] == prompt
        scored = [t for c in chunks for choice in c.choices for t in _content(choice.logprobs)]
        assert scored == _content(whole.choices[0].logprobs)
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert counts == sorted(counts)
        assert (counts[0], counts[-1]) == (0, 4)
        assert chunks[-1].usage == whole.usage
        assert whole.usage is not None
        assert whole.usage.prompt_tokens_details is not None
        assert whole.usage.prompt_tokens_details.cached_tokens == 2

        text: Any = options | PROMPT | {"logprobs": 2}
        completion = await client.completions.create(**text)
        (choice,) = completion.choices
        assert choice.model_extra is not None
        ids = choice.model_extra["prompt_token_ids"]
        assert choice.model_extra["prompt_logprobs"] == expected(service, tuple(ids), 1)
        pieces: Any = [chunk async for chunk in await client.completions.create(**text | usage_too)]
        first = pieces[0].choices[0].model_extra
        assert first["prompt_logprobs"] == choice.model_extra["prompt_logprobs"]
        assert pieces[-1].usage == completion.usage
        tokens = [t for p in pieces for c in p.choices if c.logprobs for t in c.logprobs.tokens]
        assert choice.logprobs is not None
        assert tokens == choice.logprobs.tokens


@pytest.mark.slow
def test_the_model_scores_a_prompt_as_it_scored_the_answer(server_url: str) -> None:
    """What it wrote, given back as a prompt: the same probabilities, whoever chose the tokens."""
    import openai

    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        written = client.completions.create(
            model=model, prompt="The capital of France is", max_tokens=24, temperature=0,
            logprobs=0, extra_body={"return_token_ids": True},
        ).choices[0]  # fmt: skip
        assert written.model_extra is not None
        assert written.logprobs is not None
        ids = written.model_extra["prompt_token_ids"] + written.model_extra["token_ids"]
        read = client.completions.create(
            model=model, prompt=ids, max_tokens=1, extra_body={"prompt_logprobs": 2}
        ).choices[0]
        assert read.model_extra is not None
        scores = read.model_extra["prompt_logprobs"]
    assert scores[0] is None
    answer = list(zip(ids, scores, strict=True))[-24:]
    assert [entry[str(token)]["rank"] for token, entry in answer] == [1] * 24
    scored = [entry[str(token)]["logprob"] for token, entry in answer]
    assert scored == pytest.approx(written.logprobs.token_logprobs)


def _content(logprobs: Any) -> list[Any]:
    return [] if logprobs is None else logprobs.content
