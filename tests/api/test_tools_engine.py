"""Tools with the real engine and a network of random weights: its calls are still well-formed.

The engine's journal is read as the API reads it, for every tool-call format.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import jsonschema_rs
import pytest

from model.grammar import Grammars
from model.runners import RunnerOptions
from model.runners.torch import TorchRunner
from service.api.generation.deltas import Accumulator, ChoiceReader
from service.api.generation.manifest import Endpoint, Manifest, PromptNote
from service.api.tools.chat import FunctionDefinition, ToolUse
from service.api.tools.formats import TOOL_FORMATS
from service.api.tools.grammar import tools_grammar
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer
from service.engine.plan import EngineConfig
from service.messages import Event, FinishReason, GenerationRequest, SamplingParams
from tests.support.builders import slowly, tiny_model_config, tiny_weights

pytestmark = pytest.mark.slow

EOS = 256
MARKERS = {258: "[TOOL_CALLS]", 259: "<tool_call>", 260: "</tool_call>", 261: "[ARGS]"}
BYTES = (*(bytes([byte]) for byte in range(256)), *(b"" for _ in range(256, 262)))
SCHEMAS: dict[str, dict[str, Any]] = {
    "order": {
        "type": "object",
        "properties": {
            "size": {"enum": ["s", "m", "l"]},
            "count": {"type": "integer", "minimum": 1, "maximum": 99},
            "notes": {"type": "array", "maxItems": 2, "items": {"type": "string", "maxLength": 4}},
        },
        "required": ["size", "count", "notes"],
        "additionalProperties": False,
    },
    "cancel": {
        "type": "object",
        "properties": {"why": {"anyOf": [{"type": "null"}, {"const": "}\n</tool_call>"}]}},
        "required": ["why"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
FUNCTIONS = tuple(
    FunctionDefinition(name=name, parameters=schema) for name, schema in SCHEMAS.items()
)


class Words:
    """The part of a tokenizer that parsing needs: a token per byte, and some markers."""

    token_bytes: Sequence[bytes] = BYTES

    def special_id(self, text: str) -> int | None:
        return next((id_ for id_, marker in MARKERS.items() if marker == text), None)

    def token_text(self, token: int) -> str:
        return MARKERS.get(token, "")

    def is_special(self, token: int) -> bool:
        return token >= EOS


def answers(requests: Sequence[GenerationRequest]) -> dict[str, list[Event]]:
    """The engine's journal of each, all in one batch."""
    config = tiny_model_config(vocab_size=len(BYTES), max_model_len=512)
    options = RunnerOptions(dtype="float32", block_size=8, num_blocks=1024)
    runner = TorchRunner(config, tiny_weights(config, seed=1), options=options, digest="tiny")
    events: dict[str, list[Event]] = {request.id: [] for request in requests}

    def deliver(delivered: Sequence[Event]) -> None:
        for event in delivered:
            events[event.request_id].append(event)

    loop = EngineLoop(
        runner,
        config=EngineConfig(max_batch_tokens=256, max_sequences=64, max_prompt_chunk=256),
        token_bytes=BYTES,
        eos_ids=frozenset({EOS}),
        deliver=deliver,
        observer=Observer(),
        grammars=Grammars(BYTES, eos_ids=frozenset({EOS}), vocab_size=len(BYTES)),
    )
    for request in requests:
        loop.add(Work(request=request))
    while loop.step():
        pass
    return events


def read(events: Sequence[Event], name: str, request_id: str) -> Accumulator:
    manifest = Manifest(
        endpoint=Endpoint.CHAT, model="m", fingerprint="f", created=0,
        prompts=(PromptNote(num_tokens=1),), notation=name,
    )  # fmt: skip
    words: Any = Words()
    reader = ChoiceReader(manifest, 0, words, request_id=request_id)
    collected = Accumulator()
    for event in events:
        for shown in reader.read(event.record):
            collected.add(shown)
    return collected


FEW = ("hermes", "mistral-v11", "qwen3-coder")


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("name", [*FEW, *slowly(*sorted(TOOL_FORMATS.keys() - {*FEW}))])
def test_every_call_fits_its_schema(name: str, forced: bool) -> None:
    tool_format = TOOL_FORMATS[name]
    words: Any = Words()
    draw = random.Random(name)
    grammars = {
        parallel: tools_grammar(
            ToolUse(functions=FUNCTIONS, may_call=(0, 1, 2), forced=forced, parallel=parallel),
            tool_format,
            tool_format.marker_ids(words),
        )
        for parallel in (True, False)
    }
    requests = [
        GenerationRequest(
            id=f"{parallel}-{seed}",
            prompt_ids=tuple(draw.randrange(256) for _ in range(4)),
            sampling=SamplingParams(seed=seed, temperature=1.0),
            max_tokens=240 if forced else 60,
            grammar=grammars[parallel],
        )
        for seed in range(4)
        for parallel in (True, False)
    ]
    ended = 0
    seen: set[str] = set()
    for id_, events in answers(requests).items():
        answer = read(events, name, id_)
        assert answer.end is not None
        whole = answer.calls if answer.end.reason is FinishReason.STOP else answer.calls[:-1]
        for call in whole:
            jsonschema_rs.validate(SCHEMAS[call.name], json.loads(call.text))
            seen.add(call.name)
        if id_.startswith("False"):
            assert len(answer.calls) <= 1
        if answer.end.reason is FinishReason.STOP and forced:
            ended += 1
            assert answer.text == ""
            assert answer.finish_reason == "tool_calls"
    if forced:
        assert ended > 2
        assert len(seen) > 1
