"""The law of all dialects: a stream adds up to the body, and goes on anywhere as it was.

The same answer, with reasoning, text and tool calls, in journals whose records are cut in all ways.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.api import DIALECTS
from service.api.generation.deltas import Accumulator
from service.api.generation.manifest import Endpoint, Manifest, PromptNote, ReasoningNote
from service.api.generation.reader import AnswerReader
from service.engine.detokenize import Detokenizer
from service.messages import End, FinishReason, Record, Tokens, rolling_digest

PIECES = (
    b"<think>", b"</think>", b"</", b"think>", b"\n", b" ", b"hi", "é".encode(), b"\xf0\x9f",
    b"\x98\x80", b'<tool_call>\n{"name": "', b'f", "arguments": {', b'"a": "}"',
    b"}}\n</tool_call>", b"<tool", b"_call>", b"", b"stop", b"st",
)  # fmt: skip
OPEN, CLOSE, BLANK, HI, CALL, NAME, ARGUMENT, DONE = 0, 1, 4, 6, 10, 11, 12, 13
GIVEN_BACK = {"background": False, "store": True, "reasoning": {"effort": None, "summary": None}}


class Words:
    """The part of a tokenizer that reading an answer needs."""

    token_bytes: Sequence[bytes] = PIECES

    def special_id(self, _text: str) -> int | None:
        return None

    def is_special(self, token: int) -> bool:
        return not PIECES[token]

    def token_text(self, token: int) -> str:
        return PIECES[token].decode("utf-8", "replace")


noise = st.lists(st.integers(0, len(PIECES) - 1), max_size=6)
calls = st.sampled_from([[], [CALL, NAME, ARGUMENT, DONE], [CALL, NAME, DONE], [CALL, NAME]])
answers = st.tuples(
    st.sampled_from([[], [OPEN], [BLANK, OPEN]]),
    noise,
    st.sampled_from([[], [CLOSE], [CLOSE, BLANK], [2, 3]]),
    noise | st.just([HI]),
    calls,
    calls,
).map(lambda parts: [token for part in parts for token in part] or [HI])


def journal(
    ids: list[int], ends: Sequence[int], stop: tuple[str, ...], reason: FinishReason
) -> list[Record]:
    """The records of an answer, cut after so many tokens each."""
    detokenizer, texts = Detokenizer(PIECES, stop), list[str]()
    for token in ids:
        texts.append(detokenizer.push(token))
        if detokenizer.stopped_by is not None:
            reason = FinishReason.STOP
            break
    texts[-1] += detokenizer.finish()
    num = len(texts)
    places = sorted({min(end, num) for end in ends if end} | {num})
    records: list[Record] = []
    for start, end in zip([0, *places], places, strict=False):
        digest = rolling_digest(ids[:end])
        text = "".join(texts[start:end])
        records.append(Tokens(start=start, ids=tuple(ids[start:end]), text=text, digest=digest))
    stopped_by = detokenizer.stopped_by
    return [*records, End(count=num, reason=reason, stopped_by=stopped_by, ended_at=1_700_000_009)]


def new_reader(manifest: Manifest) -> AnswerReader:
    card = SimpleNamespace(max_model_len=4096)
    served = SimpleNamespace(tokenizer=Words())
    model = SimpleNamespace(tokenizer=served.tokenizer, served=served, card=card)
    context: Any = SimpleNamespace(of_answer=lambda name, key: model)
    return AnswerReader("s0-1", manifest, context, tenant="t", arrived=0.0)


def collected(manifest: Manifest, records: Sequence[Record]) -> Any:
    reader, choice = new_reader(manifest), Accumulator()
    for record in records:
        for delta in reader.read(0, record):
            choice.add(delta)
    return json.loads(DIALECTS[manifest.endpoint].collect(reader, [choice]))


def streamed(manifest: Manifest, records: Sequence[Record], *, have: int = 0) -> list[bytes]:
    """The beginning, the events of each record, and the end; the client has `have` records."""
    reader = new_reader(manifest)
    renderer = DIALECTS[manifest.endpoint].stream(reader, event_ids=True)
    for record in records[:have]:
        for delta in reader.read(0, record):
            renderer.skip(delta)
    begin = renderer.begin()
    parts = [
        b"".join(renderer.event(0, delta) for delta in reader.read(0, record))
        for record in records[have:]
    ]
    return [begin, *parts, renderer.finish()]


def events_of(parts: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    for line in b"".join(parts).split(b"\n"):
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def chat_sum(events: Sequence[dict[str, Any]]) -> Any:
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    ending: Any = None
    for choice in (choice for event in events for choice in event["choices"]):
        delta = choice["delta"]
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                message["tool_calls"].append([call["id"], call["function"]["name"], ""])
            message["tool_calls"][call["index"]][2] += call["function"]["arguments"]
        if choice["finish_reason"] is not None:
            ending = choice["finish_reason"], choice["stop_reason"]
    return message, ending, events[-1]["usage"]


def chat_body(body: Any) -> Any:
    (choice,) = body["choices"]
    message = choice["message"]
    found = {
        "content": message["content"] or "",
        "reasoning_content": message.get("reasoning_content", ""),
        "tool_calls": [
            [call["id"], call["function"]["name"], call["function"]["arguments"]]
            for call in message.get("tool_calls", ())
        ],
    }
    return found, (choice["finish_reason"], choice["stop_reason"]), body["usage"]


def completion_sum(events: Sequence[dict[str, Any]]) -> Any:
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(choice["text"] for choice in choices)
    ending = choices[-1]["finish_reason"], choices[-1]["stop_reason"]
    return text, ending, events[-1]["usage"]


def completion_body(body: Any) -> Any:
    (choice,) = body["choices"]
    return choice["text"], (choice["finish_reason"], choice["stop_reason"]), body["usage"]


def response_sum(events: Sequence[dict[str, Any]]) -> Any:
    """The last event has the response; the deltas must add up to its items."""
    items: list[list[str]] = []
    for event in events:
        if event["type"] == "response.output_item.added":
            items.append([event["item"]["type"], event["item"]["id"], ""])
        elif event["type"] in {
            "response.output_text.delta",
            "response.reasoning_text.delta",
            "response.function_call_arguments.delta",
        }:
            items[event["output_index"]][2] += event["delta"]
    numbers = [event["sequence_number"] for event in events]
    assert numbers == sorted(set(numbers))
    return items, events[-1]["response"]


def response_body(body: Any) -> Any:
    def text(item: Any) -> str:
        if item["type"] == "function_call":
            return str(item["arguments"])
        return "".join(part["text"] for part in item["content"])

    return [[item["type"], item["id"], text(item)] for item in body["output"]], body


def message_sum(events: Sequence[dict[str, Any]]) -> Any:
    blocks: list[dict[str, Any]] = []
    message: dict[str, Any] = {}
    for event in events:
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            blocks.append(event["content_block"] | {"input": ""})
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], blocks[event["index"]]
            for name in ("text", "thinking", "signature"):
                if name in delta:
                    block[name] += delta[name]
            block["input"] += delta.get("partial_json", "")
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] |= event["usage"]
    return message | {"content": [_with_input(block) for block in blocks]}


def _with_input(block: dict[str, Any]) -> dict[str, Any]:
    text = block.pop("input")
    if block["type"] != "tool_use":
        return block
    try:
        return block | {"input": json.loads(text)}
    except ValueError:
        return block | {"input": {}}


SUMS = {
    Endpoint.COMPLETIONS: (completion_sum, completion_body),
    Endpoint.CHAT: (chat_sum, chat_body),
    Endpoint.RESPONSES: (response_sum, response_body),
    Endpoint.MESSAGES: (message_sum, lambda body: body),
}


def manifest_of(
    endpoint: Endpoint, *, opened: bool, tools: bool, stop: tuple[str, ...]
) -> Manifest:
    raw = endpoint is Endpoint.COMPLETIONS
    return Manifest(
        endpoint=endpoint,
        model="m",
        fingerprint="class-1",
        created=1_700_000_000,
        prompts=(PromptNote(num_tokens=3),),
        stream=True,
        include_usage=True,
        stop=stop,
        notation="hermes" if tools and not raw else None,
        reasoning=None if raw else ReasoningNote(format="think", opened=opened),
        given_back=dict(GIVEN_BACK) if endpoint is Endpoint.RESPONSES else {},
    )


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", list(DIALECTS))
@settings(max_examples=60)
@given(
    ids=answers,
    ends=st.lists(st.integers(0, 24), max_size=8),
    have=st.integers(0, 8),
    opened=st.booleans(),
    tools=st.booleans(),
    stop=st.sampled_from([(), ("stop",), ("hi",)]),
    reason=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
)
@example(  # text after a call
    ids=[CALL, NAME, DONE, HI, BLANK, CALL, NAME, DONE, HI],
    ends=[],
    have=0,
    opened=False,
    tools=True,
    stop=(),
    reason=FinishReason.STOP,
)
def test_stream_body_and_replay_agree(
    endpoint: Endpoint,
    *,
    ids: list[int],
    ends: list[int],
    have: int,
    opened: bool,
    tools: bool,
    stop: tuple[str, ...],
    reason: FinishReason,
) -> None:
    manifest = manifest_of(endpoint, opened=opened, tools=tools, stop=stop)
    whole, parts = journal(ids, [], stop, reason), journal(ids, ends, stop, reason)
    body = collected(manifest, whole)
    singles = journal(ids, range(99), stop, reason)
    assert collected(manifest, parts) == collected(manifest, singles) == body
    add, view = SUMS[endpoint]
    stream = streamed(manifest, parts)
    assert add(list(events_of(stream))) == view(body)
    for records in (whole, singles):
        assert add(list(events_of(streamed(manifest, records)))) == view(body)
    assert streamed(manifest, parts) == stream
    have = min(have, len(parts) - 1)
    if have:
        resumed = b"".join(streamed(manifest, parts, have=have))
        assert resumed == b"".join(stream[1 + have :])
