"""All samples of a tools grammar are parsed as calls that match their schemas.

The model here is random: all tokens that the grammar allows are equally likely.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from model.grammar import GrammarError, Grammars
from model.text.tokenizer import Tokenizer
from service.api.structured.json_schema import without_annotations
from service.api.tools.chat import FunctionDefinition, ToolUse
from service.api.tools.formats import TOOL_FORMATS, ToolFormat
from service.api.tools.grammar import tools_grammar
from service.api.tools.parser import ToolCallParser

NAMES = sorted(TOOL_FORMATS)
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 3},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"enum": ["°C", "°F"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TREE: dict[str, Any] = {
    "type": "object",
    "properties": {"items": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/leaf"}}},
    "required": ["items"],
    "additionalProperties": False,
    "$defs": {"leaf": {"anyOf": [{"type": "boolean"}, {"const": "}]}"}]}},
}
FUNCTIONS = (
    FunctionDefinition(name="get_weather", parameters=CITY, strict=True),
    FunctionDefinition(name="tree-2", parameters=TREE),
    FunctionDefinition(name="now"),
)
SCHEMAS = {"get_weather": CITY, "tree-2": TREE, "now": {"type": "object", "maxProperties": 0}}


def use(**fields: Any) -> ToolUse:
    return replace(
        ToolUse(functions=FUNCTIONS, may_call=(0, 1, 2), forced=True, parallel=True), **fields
    )


def markers(tool_format: ToolFormat, tokenizer: Tokenizer) -> dict[str, int]:
    """Two special tokens of the test's vocabulary."""
    ids = [tokenizer.special_id("<|im_start|>"), tokenizer.special_id("<s>")]
    return {
        text: id_ for text, id_ in zip(tool_format.markers, ids, strict=False) if id_ is not None
    }


def sample(
    grammar: str, tokenizer: Tokenizer, draw: random.Random, *, first: str = ""
) -> list[int] | None:
    """Random tokens after `first`; None if they did not reach an end."""
    grammars = Grammars(
        tokenizer.token_bytes, eos_ids=tokenizer.eos_ids, vocab_size=tokenizer.vocab_size
    )
    matcher = grammars.matcher(grammar)
    ids = tokenizer.encode(first, add_bos=False) if first else []
    for token in ids:
        matcher.read(token)
    mask_W = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
    for _ in range(600):
        matcher.fill(mask_W)
        allowed = np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))
        token = int(draw.choice(list(allowed)))
        if token in tokenizer.eos_ids:
            return ids
        matcher.read(token)
        ids.append(token)
    return None


def text_of(ids: list[int], tokenizer: Tokenizer, marker_ids: dict[str, int]) -> str:
    names = {id_: text.encode() for text, id_ in marker_ids.items()}
    return b"".join(names.get(id_) or tokenizer.token_bytes[id_] for id_ in ids).decode()


def check(tool_format: ToolFormat, text: str) -> tuple[str, list[str]]:
    """Returns the text and the called names; every call matches its schema."""
    reader = ToolCallParser(tool_format, request_id="r")
    told = reader.push(text)
    rest = reader.finish().text
    if told.calls:
        assert reader.called, text
        assert rest == ""
    for call in told.calls:
        jsonschema_rs.validate(SCHEMAS[call.name or ""], json.loads(call.arguments))
    return told.text + rest, [call.name or "" for call in told.calls]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_forced_calls_fit(name: str, special: bool, tokenizer: Tokenizer) -> None:
    tool_format = TOOL_FORMATS[name]
    ids = markers(tool_format, tokenizer) if special else {}
    grammar = tools_grammar(use(), tool_format, ids)
    seen: set[str] = set()
    for seed in range(4):
        answer = sample(grammar, tokenizer, random.Random(seed))
        if answer is not None:
            said, names = check(tool_format, text_of(answer, tokenizer, ids))
            assert said == ""
            assert names
            seen |= set(names)
    assert len(seen) > 1, "all functions may be called"


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_text_may_come_before_calls(name: str, special: bool, tokenizer: Tokenizer) -> None:
    """Text, then the opening: from there the answer is constrained."""
    tool_format = TOOL_FORMATS[name]
    ids = markers(tool_format, tokenizer) if special else {}
    grammar = tools_grammar(use(forced=False), tool_format, ids)
    is_special = any(marker in tool_format.opening for marker in ids)
    ended = 0
    before = "" if tool_format.only_first else 'Zürich? <tool {"name": "'
    for seed in range(3):
        if is_special:
            continue  # the continuation is the same as that of text
        answer = sample(grammar, tokenizer, random.Random(seed), first=before + tool_format.opening)
        if answer is not None:
            ended += 1
            said, names = check(tool_format, text_of(answer, tokenizer, ids))
            assert said == before
            assert names
    assert ended or is_special


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_may_be_text_alone(name: str, tokenizer: Tokenizer) -> None:
    tool_format = TOOL_FORMATS[name]
    for marker_ids in ({}, markers(tool_format, tokenizer)):
        grammar = tools_grammar(use(forced=False), tool_format, marker_ids)
        answer = sample(grammar, tokenizer, random.Random(1), first='{"a": 1} <tool')
        assert answer is None or check(tool_format, text_of(answer, tokenizer, marker_ids))


@pytest.mark.parametrize("name", NAMES)
def test_a_named_function_is_called_once(name: str, tokenizer: Tokenizer) -> None:
    tool_format = TOOL_FORMATS[name]
    grammar = tools_grammar(use(may_call=(1,), parallel=False), tool_format, {})
    for seed in range(3):
        answer = sample(grammar, tokenizer, random.Random(seed))
        if answer is not None:
            assert check(tool_format, text_of(answer, tokenizer, {})) == ("", ["tree-2"])


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("id_", ["", "[CALL_ID]a1B2c3D4e"])
def test_a_call_may_have_an_id(id_: str, special: bool, tokenizer: Tokenizer) -> None:
    """With an id or without, and after either, another call of either kind."""
    tool_format = TOOL_FORMATS["mistral-v11"]
    ids = markers(tool_format, tokenizer) if special else {}
    grammar = tools_grammar(use(), tool_format, ids)
    call = f"[TOOL_CALLS]now{id_}[ARGS]{{}}"
    follow(grammar, pieces(f"{call}[TOOL_CALLS]now[ARGS]{{}}", tokenizer, ids), tokenizer)
    for wrong in ("[CALL_ID]a1B2c3D4[ARGS]", "[CALL_ID][ARGS]", "[CALL_ID]a1B2c3D-e", '{"'):
        with pytest.raises(GrammarError):
            follow(grammar, pieces(f"[TOOL_CALLS]now{wrong}", tokenizer, ids), tokenizer)


def follow(grammar: str, ids: list[int], tokenizer: Tokenizer) -> None:
    """Raises GrammarError if the grammar forbids one of the tokens."""
    matcher = Grammars(
        tokenizer.token_bytes, eos_ids=tokenizer.eos_ids, vocab_size=tokenizer.vocab_size
    ).matcher(grammar)
    for token in ids:
        matcher.read(token)


def pieces(text: str, tokenizer: Tokenizer, marker_ids: dict[str, int]) -> list[int]:
    """The ids of a text, markers by their own."""
    if not marker_ids:
        return tokenizer.encode(text, add_bos=False)
    pattern = "|".join(map(re.escape, marker_ids))
    return [
        id_
        for part in re.split(f"({pattern})", text)
        for id_ in (
            [marker_ids[part]] if part in marker_ids else tokenizer.encode(part, add_bos=False)
        )
    ]


def test_a_call_may_have_a_prefix(tokenizer: Tokenizer) -> None:
    """Llama's, if it is a special token; without it the opening is text."""
    tool_format = TOOL_FORMATS["llama"]
    ids = markers(tool_format, tokenizer)
    call = '{"name": "now", "parameters": {}}'
    for forced in (True, False):
        grammar = tools_grammar(use(forced=forced), tool_format, ids)
        for text in (call, "<|python_tag|>" + call):
            follow(grammar, pieces(text, tokenizer, ids), tokenizer)
        with pytest.raises(GrammarError):
            follow(grammar, pieces("<|python_tag|>x", tokenizer, ids), tokenizer)


def test_texts_and_calls_may_have_frames(tokenizer: Tokenizer) -> None:
    """Those of gpt-oss: a text before a call is closed, the last one is not."""
    tool_format = TOOL_FORMATS["gpt-oss"]
    channel, end = markers(tool_format, tokenizer).values()
    ids = {"<|channel|>": channel, "<|end|>": end}
    final, note = tool_format.frames
    call = tool_format.render([("now", "{}")])
    joint = tool_format.closing
    grammar = tools_grammar(use(forced=False), tool_format, ids)
    for text in (final + "Hi", "Hi", call, f"{note}Hm.{joint}{call}", f"Hm.{joint}{final}Hi"):
        follow(grammar, pieces(text, tokenizer, ids), tokenizer)
    forced = tools_grammar(use(), tool_format, ids)
    follow(forced, pieces(call, tokenizer, ids), tokenizer)
    for text in ("Hi", final):
        with pytest.raises(GrammarError):
            follow(forced, pieces(text, tokenizer, ids), tokenizer)
    parser = ToolCallParser(tool_format, request_id="r")
    parsed = parser.push(f"{note}Hm. {joint}{call}")
    assert (parsed.text, [c.name for c in parsed.calls], parser.called) == ("Hm. ", ["now"], True)
    assert ToolCallParser(tool_format, request_id="r").push(final + "Hi").text == "Hi"


def test_texts_of_a_schema_are_not_grammar(tokenizer: Tokenizer) -> None:
    odd = ["//", "# x", "%json {}", '"', "/a/", "\n", "}\n</tool_call>", "é😀", "<[1]>"]
    schema = {"type": "object", "properties": {"a": {"enum": odd}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    function = FunctionDefinition(name="now", parameters=schema)
    grammar = tools_grammar(use(functions=(function,), may_call=(0,)), TOOL_FORMATS["plain"], {})
    for text in odd:
        arguments = json.dumps({"a": text}, ensure_ascii=False)
        rendered = TOOL_FORMATS["plain"].render([("now", arguments)])
        sample(
            grammar, tokenizer, random.Random(0), first=rendered
        )  # raises if the grammar forbids it
        (call,) = ToolCallParser(TOOL_FORMATS["plain"], request_id="r").push(rendered).calls
        assert call.arguments == arguments


def test_schemas_that_cannot_be_enforced(tokenizer: Tokenizer) -> None:
    """What a grammar cannot express is left to the model, or rejected if the schema is strict."""
    beyond = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    wrong = {"type": "object", "properties": {"a": {"type": "nothing"}}}
    grammars = Grammars(
        tokenizer.token_bytes, eos_ids=tokenizer.eos_ids, vocab_size=tokenizer.vocab_size
    )

    def compile_with(schema: dict[str, Any], *, strict: bool) -> None:
        function = FunctionDefinition(name="f", parameters=schema, strict=strict)
        asked = use(functions=(function,), may_call=(0,))
        grammars.matcher(tools_grammar(asked, TOOL_FORMATS["plain"], {}))

    compile_with(beyond, strict=False)
    for schema, strict in ((beyond, True), (wrong, True), (wrong, False)):
        with pytest.raises(GrammarError):
            compile_with(schema, strict=strict)


def test_only_annotations_are_removed_from_a_schema() -> None:
    schema = {
        "title": "Order",
        "description": "x",
        "type": "object",
        "properties": {
            "description": {"type": "string", "description": "y", "default": "z"},
            "title": {"enum": [{"title": 1}, {"default": 2}]},
            "items": {"type": "array", "items": [{"title": "a"}, {"const": {"title": "b"}}]},
        },
        "required": ["title"],
        "$defs": {"default": {"anyOf": [{"examples": [1], "minimum": 3}]}},
        "additionalProperties": False,
    }
    assert without_annotations(schema) == {
        "type": "object",
        "properties": {
            "description": {"type": "string"},
            "title": {"enum": [{"title": 1}, {"default": 2}]},
            "items": {"type": "array", "items": [{}, {"const": {"title": "b"}}]},
        },
        "required": ["title"],
        "$defs": {"default": {"anyOf": [{"minimum": 3}]}},
        "additionalProperties": False,
    }
