"""Thinking blocks: however the journal is cut into records, the stream is the body, and the stream
after any event is the rest of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from model.text.tokenizer import Tokenizer
from service.api.anthropic.answer import MessageRenderer
from service.api.anthropic.dialect import MESSAGES
from service.api.anthropic.schema import MessageBody
from service.api.generation.deltas import Accumulator, ChoiceReader
from service.api.generation.manifest import Endpoint, Manifest, PromptNote, ReasoningNote
from service.api.generation.reader import Usage
from service.api.tools.formats import TOOL_FORMATS
from service.messages import End, FinishReason, Record, Tokens, rolling_digest

MANIFEST = Manifest(
    endpoint=Endpoint.MESSAGES,
    model="tiny-model",
    fingerprint="class-1",
    created=0,
    prompts=(PromptNote(num_tokens=7),),
    notation="plain",
    reasoning=ReasoningNote(format="think", opened=False),
)
CALL = TOOL_FORMATS["plain"].render([("weather", '{"city": "Orl\u00e9ans"}')])
OUTPUTS = [
    "<think>\nSo the \u00e9 ...</think>\n\nIt is 4.",
    "<think>hm</think>" + CALL,
    "<think>hm</think>Let me see.\n" + CALL,
    "<think></think>4",
    "<think>hm",
    "no thoughts",
    "<think>a </thin b</think>c <think>d</think>",
]


class Reading:
    """One answer, read and rendered from its records."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._choice = ChoiceReader(MANIFEST, 0, tokenizer, request_id="r-1")
        self.answer = Accumulator()
        card = SimpleNamespace(max_model_len=4096)
        context = SimpleNamespace(card=card)
        reader: Any = SimpleNamespace(id="r", manifest=MANIFEST, context=context)
        self.reader = reader
        self._count()
        self._renderer = MessageRenderer(self.reader, event_ids=True)

    def _count(self) -> None:
        choice = self._choice
        self.reader.position = choice.position
        self.reader.usage = Usage(
            prompt_tokens=7,
            completion_tokens=choice.count,
            cached_tokens=0,
            reasoning_tokens=choice.reasoning_tokens,
        )

    def skip(self, record: Record) -> None:
        for delta in self._choice.read(record):
            self._count()
            self.answer.add(delta)
            self._renderer.skip(delta)

    def begin(self) -> bytes:
        return self._renderer.begin()

    def read(self, record: Record) -> bytes:
        events = b""
        for delta in self._choice.read(record):
            self._count()
            self.answer.add(delta)
            events += self._renderer.event(0, delta)
        return events

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(MESSAGES.collect(self.reader, [self.answer]))
        return body


def records(
    draw: random.Random, tokenizer: Tokenizer, text: str, end: FinishReason
) -> list[Record]:
    """A journal of the text, cut at random; text of incomplete characters comes later."""
    ids = tokenizer.encode(text)
    found: list[Record] = []
    start, digest, shown = 0, 0, ""
    while start < len(ids):
        stop = min(len(ids), start + draw.choice([1, 1, 2, 5, 50]))
        piece = tuple(ids[start:stop])
        digest = rolling_digest(piece, previous=digest)
        now = tokenizer.decode(ids[:stop])
        if stop < len(ids):
            now = now.rstrip("\ufffd")
        found.append(Tokens(start=start, ids=piece, text=now[len(shown) :], digest=digest))
        start, shown = stop, now
    return [*found, End(count=len(ids), reason=end)]


def assembled(stream: bytes) -> dict[str, Any]:
    """The message that a client puts together."""
    message: dict[str, Any] = {}
    inputs: dict[int, str] = {}
    for data in events(stream):
        kind = data["type"]
        if kind == "message_start":
            message = data["message"]
        elif kind == "content_block_start":
            message["content"].append(data["content_block"])
        elif kind == "content_block_delta":
            index, delta = data["index"], data["delta"]
            assert index == len(message["content"]) - 1
            block = message["content"][index]
            if delta["type"] == "input_json_delta":
                inputs[index] = inputs.get(index, "") + delta["partial_json"]
            elif delta["type"] == "signature_delta":
                assert block["signature"] == ""
                block["signature"] = delta["signature"]
            else:
                part = delta["type"].removesuffix("_delta")
                block[part] += delta[part]
        elif kind == "message_delta":
            message |= data["delta"]
            message["usage"] |= data["usage"]
    for index, text in inputs.items():
        message["content"][index]["input"] = json.loads(text)
    return message


def events(stream: bytes) -> Iterator[dict[str, Any]]:
    for line in stream.split(b"\n"):
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


@pytest.mark.parametrize("output", OUTPUTS, ids=range(len(OUTPUTS)))
@pytest.mark.parametrize("seed", range(8))
def test_a_stream_is_the_body_and_resumes_after_any_record(
    tiny_tokenizer: Tokenizer, output: str, seed: int
) -> None:
    draw = random.Random(seed)
    end = draw.choice([FinishReason.STOP, FinishReason.LENGTH])
    journal = records(draw, tiny_tokenizer, output, end)
    whole = Reading(tiny_tokenizer)
    parts = [whole.begin(), *map(whole.read, journal)]
    body = whole.body()
    assert assembled(b"".join(parts)) == body
    for cut in range(1, len(journal) + 1):
        resumed = Reading(tiny_tokenizer)
        for record in journal[:cut]:
            resumed.skip(record)
        rest = [resumed.begin(), *map(resumed.read, journal[cut:])]
        assert b"".join(rest) == b"".join(parts[cut + 1 :])


def test_the_blocks_of_an_answer_with_thinking(tiny_tokenizer: Tokenizer) -> None:
    reading = Reading(tiny_tokenizer)
    for record in records(random.Random(0), tiny_tokenizer, OUTPUTS[2], FinishReason.STOP):
        reading.read(record)
    body = reading.body()
    thinking, text, call = body["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "hm")
    assert thinking["signature"]
    assert (text["type"], text["text"]) == ("text", "Let me see.")
    assert (call["type"], call["input"]) == ("tool_use", {"city": "Orl\u00e9ans"})
    assert body["stop_reason"] == "tool_use"
    usage = body["usage"]
    assert 0 < usage["output_tokens_details"]["thinking_tokens"] < usage["output_tokens"]


@pytest.mark.parametrize(
    ("thinking", "switch", "budget", "included"),
    [
        (None, None, None, True),
        ({"type": "disabled"}, False, None, False),
        ({"type": "adaptive"}, True, None, True),
        ({"type": "adaptive", "display": "omitted"}, True, None, False),
        ({"type": "enabled", "budget_tokens": 9}, True, 9, True),
        ({"type": "enabled", "budget_tokens": 9, "display": "summarized"}, True, 9, True),
        ({"type": "enabled", "budget_tokens": 9, "display": "omitted"}, True, 9, False),
    ],
)
def test_what_thinking_asks_for(
    thinking: Any, switch: bool | None, budget: int | None, included: bool
) -> None:
    user = {"role": "user", "content": "hello"}
    body = {"model": "m", "max_tokens": 1, "messages": [user], "thinking": thinking}
    generation: Any = MESSAGES.parse(MessageBody.model_validate(body))
    assert generation.prompt.thinking is switch
    assert (generation.thinking_budget, generation.include_reasoning) == (budget, included)


@pytest.mark.parametrize("effort", [None, "low", "medium", "high", "xhigh", "max"])
def test_effort_is_that_of_the_chat(effort: str | None) -> None:
    user = {"role": "user", "content": "hello"}
    body = {"model": "m", "max_tokens": 1, "messages": [user], "output_config": {"effort": effort}}
    generation: Any = MESSAGES.parse(MessageBody.model_validate(body))
    assert generation.prompt.effort == effort
