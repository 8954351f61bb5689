"""Laws of arguments: any cut of what a model writes gives the same arguments as the whole."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.generation.deltas import Accumulator, Delta
from service.api.tools.arguments import JSON_TYPES, InputText, TaggedObject, with_tags
from service.api.tools.formats import TOOL_FORMATS
from service.api.tools.parser import KnownTools, ToolCallParser
from service.api.tools.tagged import parameter_types

TEXTS = st.text('aé😀\n"\\</>{}u03 \x00\u2028', max_size=12) | st.sampled_from(
    ["\n</parameter", "</parameter>\n", "3", "null", '"x"', "{}", "\\u00e9", "\n", "</tool_call>"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from([0.5, -1e30]) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
NAMES = st.text("abc_-é >", min_size=1, max_size=4)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=3)
CUTS = st.lists(st.integers(0, 400), max_size=8)


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[i:j] for i, j in pairwise(places)]


def read(reader: Any, parts: list[str]) -> str:
    held, result = "", ""
    for part in parts:
        held += part
        size, new = reader.read(held)
        held, result = held[size:], result + new
    return result


def types_of(given: dict[str, Any]) -> dict[str, list[str]]:
    return {
        name: list(JSON_TYPES.get(type(value), ("string",)))[:1] for name, value in given.items()
    }


@pytest.mark.slow
@given(OBJECTS, CUTS)
def test_elements_become_the_object_that_they_were(arguments: dict[str, Any], cuts: Any) -> None:
    if any("\n</parameter>\n" in value for value in arguments.values() if type(value) is str):
        return
    text = with_tags(json.dumps(arguments)) + "</function>"
    reader = TaggedObject(types_of(arguments))
    result = read(reader, pieces(text, cuts))
    assert reader.complete
    assert json.loads(result) == arguments
    assert result == json.dumps(arguments, ensure_ascii=False)


@pytest.mark.slow
@given(OBJECTS, CUTS, st.sampled_from([["string", "null"], [], ["integer", "string"], ["array"]]))
def test_a_value_of_several_types_is_the_same_in_any_cut(
    arguments: dict[str, Any], cuts: Any, types: list[str]
) -> None:
    text = with_tags(json.dumps(arguments)) + "</function>"
    known = dict.fromkeys(arguments, types)
    whole = read(TaggedObject(known), [text])
    assert read(TaggedObject(known), pieces(text, cuts)) == whole
    for name, value in json.loads(whole).items() if types != ["array"] else ():
        if "string" in types and isinstance(arguments[name], str):
            assert value == arguments[name] or value is None or type(value) is int


@given(TEXTS, CUTS, st.booleans())
def test_the_input_of_a_custom_tool_is_decoded(text: str, cuts: Any, escapes: bool) -> None:
    reader = InputText()
    written = json.dumps({"input": text}, ensure_ascii=escapes)
    assert read(reader, pieces(written, cuts)) == text
    assert reader.complete


@pytest.mark.parametrize("escape", [r"\ud83d", r"\ude00", r"\ud83dx", r"\ud83d\n", r"\ude00\ud83d"])
def test_half_characters_are_replaced(escape: str) -> None:
    written = f'{{"input": "{escape}"}}'
    assert "\ufffd" in read(InputText(), [written])
    assert read(InputText(), list(written)) == read(InputText(), [written])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
@given(st.data())
def test_calls_are_the_same_in_any_cut(name: str, data: st.DataObject) -> None:
    """Of functions and custom tools, also if the answer ends within a call."""
    tool_format = TOOL_FORMATS[name]
    most = 1 if tool_format.joint is None else 3
    calls = data.draw(
        st.lists(
            st.tuples(st.just("f"), OBJECTS.map(json.dumps))
            | st.tuples(st.just("c"), TEXTS.map(lambda text: json.dumps({"input": text}))),
            min_size=1,
            max_size=most,
        )
    )
    written = tool_format.render(calls)
    written = written[: data.draw(st.integers(0, len(written)))]

    def answer(parts: list[str]) -> Accumulator:
        tools = KnownTools(custom=frozenset({"c"}))
        parser = ToolCallParser(tool_format, request_id="r", tools=tools)
        collected = Accumulator()
        for part in parts:
            parsed = parser.push(part)
            collected.add(Delta(parsed.text, (), calls=parsed.calls))
        rest = parser.finish()
        collected.add(Delta(rest.text, (), calls=rest.calls))
        assert parser.called == (
            bool(collected.calls) and all(call.complete for call in collected.calls)
        )
        return collected

    whole = answer([written])
    cut = answer(pieces(written, data.draw(CUTS)))
    assert cut.text == whole.text

    def told(collected: Accumulator) -> list[Any]:
        return [(c.id, c.name, c.text, c.custom, c.complete) for c in collected.calls]

    assert told(cut) == told(whole)
    assert all(call.custom == (call.name == "c") for call in cut.calls)
    for call, (_, arguments) in zip(whole.calls, calls, strict=False):
        expected = json.loads(arguments)
        if call.complete and call.custom and "\n</parameter>\n" not in expected["input"]:
            assert call.text == expected["input"]
        if call.complete and not call.custom and not tool_format.tags:
            assert json.loads(call.text) == expected


def test_types_of_parameters() -> None:
    schema = {
        "properties": {
            "a": {"type": "string"},
            "b": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "c": {"$ref": "#/$defs/c"},
            "d": {"enum": ["x", 1, None]},
            "e": {},
            "f": {"allOf": [{"title": "x"}, {"type": "array"}]},
            "g": {"anyOf": [{"type": "integer"}, {}]},
            "h": {"$ref": "#/$defs/h"},
            "i": True,
        },
        "$defs": {"c": {"const": True}, "h": {"$ref": "#/$defs/h"}},
    }
    assert {name: list(types) for name, types in parameter_types(schema).items()} == {
        "a": ["string"], "b": ["integer", "null"], "c": ["boolean"],
        "d": ["integer", "null", "number", "string"], "e": [], "f": ["array"], "g": [], "h": [],
        "i": [],
    }  # fmt: skip
