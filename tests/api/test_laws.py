"""Laws over random requests: a stream sums up to its body, and goes on anywhere as it was."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import pytest

from tests.support.builders import at_length

SEEDS = [*range(5), *at_length(*range(5, 25))]


def random_request(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body, of all shapes."""
    body: dict[str, Any] = {
        "model": "tiny-model",
        "seed": draw.randrange(2**64),
        "max_tokens": draw.randint(1, 20),
        "n": draw.choice([1, 1, 2, 3]),
        "return_token_ids": draw.choice([None, False, True]),
        "return_tokens_as_token_ids": draw.choice([None, True]),
        "skip_special_tokens": draw.choice([None, False]),
        "truncate_prompt_tokens": draw.choice([None, None, -1, 1, 3]),
    }
    if draw.random() < 0.5:
        content: Any = "hello 😀 world" * draw.randint(1, 3)
        if draw.random() < 0.3:
            content = [{"type": "text", "text": "hello "}, {"type": "text", "text": "é"}]
        body["messages"] = [{"role": "user", "content": content}]
        if draw.random() < 0.5:
            body |= {"logprobs": True, "top_logprobs": draw.randint(0, 3)}
        return "/v1/chat/completions", body
    texts = ["hello €", "how are<|im_end|> you 😀<s>"]
    body["prompt"] = draw.choice([texts[0], texts, [5, 9, 240], [[5, 9], [240, 200, 7]]])
    body["echo"] = draw.choice([None, True, False])
    body["logprobs"] = draw.choice([None, 0, 2])
    body["parse_special"] = draw.choice([None, False])
    if body["echo"] and draw.random() < 0.4:
        body["max_tokens"] = 0
    return "/v1/completions", body


def summed(events: list[dict[str, Any]], *, chat: bool) -> list[dict[str, Any]]:
    """The choices of a body, put together from a stream's chunks as a client would."""
    choices: dict[int, dict[str, Any]] = defaultdict(lambda: {"logprobs": None})
    for event in events:
        for chunk in event["choices"]:
            choice = choices[chunk["index"]]
            choice["index"] = chunk["index"]
            text = chunk["delta"].get("content", "") if chat else chunk["text"]
            choice["text"] = choice.get("text", "") + text
            for name in ("token_ids", "prompt_token_ids"):
                if name in chunk:
                    choice[name] = choice.get(name, []) + chunk[name]
            if chunk["logprobs"] is not None:
                merged = choice["logprobs"] or {}
                for name, items in chunk["logprobs"].items():
                    merged[name] = None if items is None else merged.get(name, []) + items
                choice["logprobs"] = merged
            if chunk["finish_reason"] is not None:
                assert "finish_reason" not in choice, "a choice ends once"
                choice["finish_reason"] = chunk["finish_reason"]
                choice["stop_reason"] = chunk["stop_reason"]
    return [choices[index] for index in sorted(choices)]


def plain(choice: dict[str, Any]) -> dict[str, Any]:
    """A body's choice in the form of `summed`."""
    choice = dict(choice)
    if choice.get("token_ids") == []:  # of a prompt that is scored: no chunk has any
        del choice["token_ids"]
    if "message" in choice:
        message = choice.pop("message")
        assert message["role"] == "assistant"
        choice["text"] = message["content"]
    return choice


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_stream_sums_up_to_its_body(service: Any, read_events: Any, seed: int) -> None:
    path, body = random_request(random.Random(seed))
    whole = (await service.post(path, body)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = await service.post(path, body | options)
    assert streamed.content.endswith(b"data: [DONE]\n\n")
    events = read_events(streamed.content)
    assert summed(events, chat="messages" in body) == [plain(c) for c in whole["choices"]]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    assert {event["system_fingerprint"] for event in events} == {"class-1"}


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_stream_goes_on_anywhere_with_the_same_bytes(service: Any, seed: int) -> None:
    draw = random.Random(1000 + seed)
    path, body = random_request(draw)
    body |= {"n": 1, "stream": True, "stream_options": {"include_usage": draw.random() < 0.5}}
    for option in ("continuous_usage_stats", "include_obfuscation"):
        if draw.random() < 0.3:
            body["stream_options"][option] = True
    if isinstance(body.get("prompt"), list) and not isinstance(body["prompt"][0], int):
        body["prompt"] = body["prompt"][0]
    reply = await service.post(path, body, x_quire_event_ids="1")
    call_id = reply.headers["x-request-id"]
    resumed = await service.client.get(f"/v1/streams/{call_id}")
    assert resumed.content == reply.content
    assert resumed.headers["x-request-id"] == call_id
    events = reply.content.split(b"\n\n")
    for index, event in enumerate(events):
        if event.startswith(b"id: "):
            event_id = event.split(b"\n")[0][4:].decode()
            rest = b"\n\n".join(events[index + 1 :])
            by_header = await service.client.get(
                f"/v1/streams/{call_id}", headers={"Last-Event-ID": event_id}
            )
            by_query = await service.client.get(f"/v1/streams/{call_id}?after={event_id}")
            assert by_header.content == by_query.content == rest


@pytest.mark.parametrize("seed", range(8))
async def test_each_choice_of_several_goes_on(service: Any, read_events: Any, seed: int) -> None:
    """With several choices the order between them may differ; each one's own chunks may not."""
    path, body = random_request(random.Random(2000 + seed))
    chat = "messages" in body
    body |= {"n": 3, "stream": True}
    reply = await service.post(path, body, x_quire_event_ids="1")
    whole = summed(read_events(reply.content), chat=chat)
    events = reply.content.split(b"\n\n")
    ids = [index for index, event in enumerate(events) if event.startswith(b"id: ")]
    if body["max_tokens"] == 0:
        assert not ids  # there are no tokens to resume after
        return
    cut = ids[len(ids) // 2]
    event_id = events[cut].split(b"\n")[0][4:].decode()
    resumed = await service.client.get(
        f"/v1/streams/{reply.headers['x-request-id']}", headers={"Last-Event-ID": event_id}
    )
    before = read_events(b"\n\n".join(events[: cut + 1]))
    # What ended before the cut is told again, because an end has no event id: take the last word.
    ended = {c["index"] for e in before for c in e["choices"] if c["finish_reason"] is not None}
    after = [
        event
        for event in read_events(resumed.content)
        if not any(choice["index"] in ended for choice in event["choices"])
    ]
    assert summed(before + after, chat=chat) == whole
