"""Reasoning, text, and calls of functions and custom tools in responses: however the journal is cut
into records, the stream adds up to the collected response, and goes on after any of its events.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.text.tokenizer import Tokenizer
from service.api.generation.deltas import Accumulator, ChoiceReader
from service.api.generation.follow import split
from service.api.generation.manifest import (
    Endpoint,
    Manifest,
    PromptNote,
    ReasoningNote,
    ToolNote,
)
from service.api.generation.reader import Usage
from service.api.responses.items import InputReasoning, unseal
from service.api.responses.object import response_object, status_of
from service.api.responses.stream import ResponseRenderer, numbering
from service.api.tools.formats import TOOL_FORMATS
from service.messages import End, FinishReason, Record, Tokens, rolling_digest

PLAIN = TOOL_FORMATS["plain"]
CALL = PLAIN.render([("now", '{"city": "Orléans"}')])
CUSTOM = PLAIN.render([("run", '{"input": "ls \\"é\\"\\n😀"}')])
THOUGHTS = ("", "<think>", "<think>\nSo the é ...</think>\n\n", "<think>hm</think>", "hm</think>")
CONTENTS = ("", "It is 4. 😀", "Let me see.\n" + CALL, CALL + CUSTOM, "x\n" + CUSTOM, CUSTOM + CALL)


def make_manifest(*, summary: bool, tools: bool, opened: bool, sealed: bool) -> Manifest:
    return Manifest(
        endpoint=Endpoint.RESPONSES,
        model="tiny-model",
        fingerprint="class-1",
        created=0,
        prompts=(PromptNote(num_tokens=7),),
        notation="plain" if tools else None,
        tools=(ToolNote(name="run", custom=True),) if tools else (),
        reasoning=ReasoningNote(format="think", opened=opened),
        sealed_reasoning=sealed,
        given_back={"reasoning": {"effort": None, "summary": "auto" if summary else None}},
    )


class Reading:
    """One answer, read and rendered from its records. `seen` is as of `ResponseRenderer`."""

    def __init__(
        self, manifest: Manifest, tokenizer: Tokenizer, *, seen: int | None = None
    ) -> None:
        self.choice = ChoiceReader(manifest, 0, tokenizer, request_id="r-1")
        self.answer = Accumulator()
        context = SimpleNamespace(tokenizer=tokenizer)
        reader: Any = SimpleNamespace(
            id="r", manifest=manifest, context=context, fingerprint=lambda: manifest.fingerprint
        )
        self._reader = reader
        self._count()
        self._renderer = ResponseRenderer(reader, event_ids=False, seen=seen)

    def _count(self) -> None:
        self._reader.completion_tokens = self.choice.count
        self._reader.position = self.choice.position
        self._reader.usage = Usage(
            prompt_tokens=7,
            completion_tokens=self.choice.count,
            cached_tokens=0,
            reasoning_tokens=self.choice.reasoning_tokens,
        )

    def skip(self, record: Record) -> None:
        for delta in self.choice.read(record):
            self._count()
            self.answer.add(delta)
            self._renderer.skip(delta)

    def stream(self, journal: Sequence[Record]) -> list[dict[str, Any]]:
        """The events of the journal."""
        parts = [self._renderer.begin()]
        for record in journal:
            for delta in self.choice.read(record):
                self._count()
                self.answer.add(delta)
                parts.append(self._renderer.event(0, delta))
        lines = b"".join(parts).split(b"\n")
        return [json.loads(line[6:]) for line in lines if line.startswith(b"data: ")]

    def response(self) -> dict[str, Any]:
        status = status_of(self.answer)
        whole = response_object(self._reader, self.answer, status=status)
        parsed: dict[str, Any] = json.loads(json.dumps(whole))
        return parsed


def tokens_of(text: str, tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """Each token with the text that it completes."""
    ids, shown, found = tokenizer.encode(text, add_bos=False), "", []
    for count, token in enumerate(ids, start=1):
        now = tokenizer.decode(ids[:count])
        if count < len(ids):
            now = now.rstrip("\ufffd")
        found.append((token, now[len(shown) :]))
        shown = now
    return found


def journal_of(
    tokens: Sequence[tuple[int, str]], cuts: Sequence[int], end: FinishReason
) -> list[Record]:
    """The records of tokens between the cuts."""
    bounds, digest, found = sorted({0, *cuts, len(tokens)}), 0, list[Record]()
    for start, stop in itertools.pairwise(bounds):
        ids = tuple(token for token, _ in tokens[start:stop])
        digest = rolling_digest(ids, previous=digest)
        text = "".join(text for _, text in tokens[start:stop])
        found.append(Tokens(start=start, ids=ids, text=text, digest=digest))
    return [*found, End(count=len(tokens), reason=end)]


def assembled(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output that a client puts together; each done event repeats what came before it."""
    output: list[dict[str, Any]] = []
    for event in copy.deepcopy(list(events)):
        kind = event["type"].removeprefix("response.")
        index = event.get("output_index", len(output))
        item: dict[str, Any] = output[index] if index < len(output) else {}
        if kind == "output_item.added":
            assert index == len(output)
            output.append(event["item"])
        elif kind == "content_part.added":
            item["content"].append(event["part"])
        elif kind == "reasoning_summary_part.added":
            item["summary"].append(event["part"])
        elif kind in {"output_text.delta", "reasoning_text.delta"}:
            item["content"][0]["text"] += event["delta"]
        elif kind == "reasoning_summary_text.delta":
            item["summary"][0]["text"] += event["delta"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "custom_tool_call_input.delta":
            item["input"] += event["delta"]
        else:
            output = finished(event, kind, output)
    return output


def finished(
    event: dict[str, Any], kind: str, output: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    if kind in {"output_text.done", "reasoning_text.done"}:
        assert output[event["output_index"]]["content"][0]["text"] == event["text"]
    elif kind == "content_part.done":
        assert output[event["output_index"]]["content"] == [event["part"]]
    elif kind == "reasoning_summary_text.done":
        assert output[event["output_index"]]["summary"][0]["text"] == event["text"]
    elif kind == "reasoning_summary_part.done":
        assert output[event["output_index"]]["summary"] == [event["part"]]
    elif kind == "function_call_arguments.done":
        assert output[event["output_index"]]["arguments"] == event["arguments"]
    elif kind == "custom_tool_call_input.done":
        assert output[event["output_index"]]["input"] == event["input"]
    elif kind == "output_item.done":
        item, before = event["item"], output[event["output_index"]]
        last = {"status": item["status"], **{k: item[k] for k in item if k == "encrypted_content"}}
        assert before | last == item
        output[event["output_index"]] = item
    return output


@pytest.mark.slow
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_stream_and_resumed_stream_are_the_collected_response(
    tiny_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    text = data.draw(st.sampled_from(THOUGHTS)) + data.draw(st.sampled_from(CONTENTS))
    text = text[: data.draw(st.integers(0, len(text) + 20))]
    manifest = make_manifest(
        summary=data.draw(st.booleans()), tools=data.draw(st.booleans()),
        opened=data.draw(st.booleans()), sealed=data.draw(st.booleans()),
    )  # fmt: skip
    end = data.draw(st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]))
    tokens = tokens_of(text, tiny_tokenizer)
    positions = st.lists(st.integers(0, len(tokens)), max_size=12)
    journal = journal_of(tokens, data.draw(positions), end)
    whole = Reading(manifest, tiny_tokenizer)
    events = whole.stream(journal)
    response = whole.response()
    assert events[-1]["response"] == response
    assert assembled(events) == response["output"]
    numbers = [event["sequence_number"] for event in events]
    assert numbers == sorted(set(numbers))

    # Other records of the same tokens give the same response.
    other = Reading(manifest, tiny_tokenizer)
    assert (
        assembled(other.stream(journal_of(tokens, data.draw(positions), end)))
        == (response["output"])
    )
    assert other.response() == response

    for index, number in enumerate(numbers):
        resumed = Reading(manifest, tiny_tokenizer, seen=number)
        rest = list(unread(resumed, journal, count=numbering(manifest).tokens_at(number)))
        assert resumed.stream(rest) == events[index + 1 :], number


def unread(reading: Reading, journal: Sequence[Record], *, count: int) -> Iterator[Record]:
    """Skips records up to so many tokens, as a resumed stream does; yields the others."""
    for record in journal:
        if isinstance(record, End) or record.start >= count:
            yield record
        elif record.end <= count:
            reading.skip(record)
        else:
            known = record.ids[: count - record.start]
            digest = rolling_digest(known, previous=reading.choice.digest)
            first, second = split(record, len(known), num_chars=0, digest=digest)
            reading.skip(first)
            yield second


def test_the_items_of_a_response_that_reasons(tiny_tokenizer: Tokenizer) -> None:
    manifest = make_manifest(summary=True, tools=True, opened=False, sealed=True)
    text = "<think>hm é</think>Let me see.\n" + CUSTOM
    reading = Reading(manifest, tiny_tokenizer)
    journal = journal_of(tokens_of(text, tiny_tokenizer), range(0, 99, 3), FinishReason.STOP)
    kinds = [event["type"].removeprefix("response.") for event in reading.stream(journal)]
    unique = [kind for kind, _ in itertools.groupby(kinds)]
    assert unique[2:5] == [
        "output_item.added", "content_part.added", "reasoning_summary_part.added",
    ]  # fmt: skip
    assert unique[-3:] == ["custom_tool_call_input.done", "output_item.done", "completed"]
    response = reading.response()
    reasoning, message, call = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm é"}]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "hm é"}]
    assert unseal(reasoning["encrypted_content"]) == "hm é"
    assert InputReasoning.model_validate(reasoning).text == "hm é"
    assert message["content"][0]["text"] == "Let me see."
    assert (call["type"], call["name"], call["input"]) == (
        "custom_tool_call", "run", 'ls "é"\n😀',
    )  # fmt: skip
    usage = response["usage"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]


@pytest.mark.parametrize("tools", [False, True])
def test_reasoning_without_options_has_no_summary(
    tiny_tokenizer: Tokenizer, *, tools: bool
) -> None:
    manifest = make_manifest(summary=False, tools=tools, opened=True, sealed=False)
    reading = Reading(manifest, tiny_tokenizer)
    tokens = tokens_of("hm</think>\n\nfour", tiny_tokenizer)
    events = reading.stream(journal_of(tokens, [], FinishReason.STOP))
    assert not any("summary" in event["type"] for event in events)
    reasoning, message = reading.response()["output"]
    assert reasoning["summary"] == []
    assert "encrypted_content" not in reasoning
    assert message["content"][0]["text"] == "four"
