"""Laws of parsing calls out of text: the result does not depend on the chunks."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field

import pytest

from service.api.tools.formats import TOOL_FORMATS, ToolFormat
from service.api.tools.parser import KnownTools, ParsedText, ToolCallParser, call_id

NAMES = sorted(TOOL_FORMATS)


@dataclass
class Sum:
    """All that the parser returned for one text, accumulated as a client would."""

    text: str = ""
    calls: list[list[str]] = field(default_factory=list)  # id, name, arguments
    called: bool = False

    def add(self, parsed: ParsedText) -> None:
        self.text += parsed.text
        for delta in parsed.calls:
            assert (delta.id is None) == (delta.name is None)
            if delta.id is not None:
                assert delta.index == len(self.calls), "calls begin in order"
                self.calls.append([delta.id, delta.name or "", ""])
            self.calls[delta.index][2] += delta.arguments


def read(tool_format: ToolFormat, pieces: list[str]) -> Sum:
    reader = ToolCallParser(tool_format, request_id="s0-1.0")
    total = Sum()
    for piece in pieces:
        total.add(reader.push(piece))
    total.add(reader.finish())
    total.called = reader.called
    return total


def cut(draw: random.Random, text: str) -> list[str]:
    cuts = sorted(draw.randint(0, len(text)) for _ in range(draw.randint(0, 12)))
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def random_calls(draw: random.Random, tool_format: ToolFormat) -> list[tuple[str, str]]:
    values = [{}, {"a": '}{"\\'}, {"b": [1, {"c": None}], "é": "</tool_call>"}, {"": {"": []}}]
    count = 1 if tool_format.joint is None else draw.randint(1, 4)
    return [(f"f-{i}_", json.dumps(draw.choice(values), ensure_ascii=False)) for i in range(count)]


def near_calls(draw: random.Random, tool_format: ToolFormat) -> str:
    """Random text that begins like a call, ends like one, or neither."""
    rendered = tool_format.render(random_calls(draw, tool_format))
    fixed = [
        tool_format.opening,
        tool_format.heads[0],
        tool_format.between,
        tool_format.tail,
        tool_format.end,
    ]
    pieces = [
        *fixed,
        tool_format.joint or "",
        rendered,
        rendered[: draw.randrange(len(rendered))],
        "x\n",
    ]
    pieces += [tool_format.opening[:3], " \n", "{", '"', "é"]
    return "".join(draw.choice(pieces) for _ in range(draw.randint(0, 7)))


@pytest.mark.parametrize("name", NAMES)
def test_the_result_does_not_depend_on_the_cuts(name: str) -> None:
    tool_format = TOOL_FORMATS[name]
    for seed in range(60):
        draw = random.Random(seed)
        text = near_calls(draw, tool_format)
        whole = read(tool_format, [text])
        assert read(tool_format, cut(draw, text)) == whole, (seed, text)
        assert read(tool_format, list(text)) == whole, (seed, text)


@pytest.mark.parametrize("name", NAMES)
def test_rendered_calls_are_read_back(name: str) -> None:
    tool_format = TOOL_FORMATS[name]
    for seed in range(60):
        draw = random.Random(seed)
        calls = random_calls(draw, tool_format)
        before = "" if tool_format.only_first else draw.choice(["", "Let me see.", "a < b <tool"])
        blanks = draw.choice(["", "\n", " \n\n"]) if before else ""
        total = read(tool_format, cut(draw, before + blanks + tool_format.render(calls)))
        assert total.text == before
        assert [(called, arguments) for _, called, arguments in total.calls] == calls
        assert total.called
        assert [id_ for id_, _, _ in total.calls] == [
            call_id(tool_format, "s0-1.0", index) for index in range(len(calls))
        ]


@pytest.mark.parametrize("name", NAMES)
def test_a_text_without_an_opening_is_unchanged(name: str) -> None:
    tool_format = TOOL_FORMATS[name]
    for seed in range(60):
        draw = random.Random(seed)
        alphabet = tool_format.opening + " \n"
        text = "".join(draw.choice(alphabet) for _ in range(40)).replace(tool_format.opening, "")
        if tool_format.opening in text:
            continue
        total = read(tool_format, cut(draw, text))
        assert (total.text, total.calls, total.called) == (text, [], False)


@pytest.mark.parametrize("name", NAMES)
def test_text_is_returned_at_once_if_no_call_can_begin(name: str) -> None:
    reader = ToolCallParser(TOOL_FORMATS[name], request_id="a")
    assert reader.push("Hello, world").text == "Hello, world"
    assert reader.push("! <").text in {"!", "! <"}


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_returned_as_they_arrive(name: str) -> None:
    tool_format = TOOL_FORMATS[name]
    tools = KnownTools(types={"now": {"zone": ["string"]}})
    reader = ToolCallParser(tool_format, request_id="a", tools=tools)
    rendered = tool_format.render([("now", '{"zone": "UTC"}')])
    start = rendered.index("zone")
    before = reader.push(rendered[: start - 2]).calls
    assert not any(call.arguments for call in before)
    first = [*before, *reader.push(rendered[start - 2 : start + 6]).calls]
    assert first[0].name == "now"
    assert "".join(call.arguments for call in first).startswith('{"zone":')
    (second,) = reader.push(rendered[start + 6 : start + 9]).calls
    assert (second.id, second.name) == (None, None)
    assert second.arguments.strip(' "') in {"U", "UTC"}
    assert not reader.called
    reader.push(rendered[start + 9 :])
    assert reader.called


@pytest.mark.parametrize("name", NAMES)
def test_an_incomplete_call_is_returned_as_far_as_it_goes(name: str) -> None:
    tool_format = TOOL_FORMATS[name]
    rendered = tool_format.render([("now", '{"a": 1}')])
    if tool_format.tags:
        named = rendered.index("now" + tool_format.between) + 3 + len(tool_format.between)
        done = rendered.index("</function>") + len("</function>")
    else:
        named, done = rendered.index("{", rendered.index("now")) + 1, rendered.index("}") + 1
    for end in range(len(tool_format.opening), len(rendered) + 1):
        total = read(tool_format, [rendered[:end]])
        assert total.text == ""
        assert len(total.calls) == (end >= named)
        assert total.called == (end >= done)


def test_an_opening_of_an_only_first_format_counts_only_at_the_start() -> None:
    tool_format = TOOL_FORMATS["llama"]
    rendered = tool_format.render([("now", "{}")])
    total = read(tool_format, [rendered + rendered])
    assert (total.text, len(total.calls)) == (rendered, 1)
    total = read(tool_format, ["x", rendered])
    assert (total.text, total.calls) == ("x" + rendered, [])


V11 = TOOL_FORMATS["mistral-v11"]


def with_ids(*ids: str | None) -> str:
    """A call of `now` per id, with the index as an argument."""
    marked = ["" if id_ is None else f"[CALL_ID]{id_}" for id_ in ids]
    return "".join(
        f'[TOOL_CALLS]now{mark}[ARGS]{{"i": {index}}}' for index, mark in enumerate(marked)
    )


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (["abcdefghi"], ["abcdefghi"]),
        (["a1B2c3D4e", "000000000"], ["a1B2c3D4e", "000000000"]),
        ([None, "abcdefghi", None], [None, "abcdefghi", None]),
        (["abcdefghi", "abcdefghi"], ["abcdefghi", None]),  # ids are unique in an answer
        (["short", "abcdefghij", "ab-defghi", "äbcdefghi", ""], [None] * 5),
    ],
)
def test_ids_that_the_model_writes_are_its_calls_ids(
    written: list[str | None], told: list[str | None]
) -> None:
    rendered = "Well.\n" + with_ids(*written)
    expected = [id_ or call_id(V11, "s0-1.0", index) for index, id_ in enumerate(told)]
    for seed in range(20):
        total = read(V11, cut(random.Random(seed), rendered))
        assert total.text == "Well."
        assert [call[0] for call in total.calls] == expected
        assert [call[1:] for call in total.calls] == [
            ["now", f'{{"i": {index}}}'] for index in range(len(written))
        ]
    assert read(V11, list(rendered)) == read(V11, [rendered])


def test_an_id_that_never_ends_is_text() -> None:
    text = "[TOOL_CALLS]now[CALL_ID]" + "x" * 200
    for pieces in ([text], list(text)):
        total = read(V11, pieces)
        assert (total.text, total.calls) == (text, [])


@pytest.mark.parametrize("end", range(len("[TOOL_CALLS]"), len(with_ids("abcdefghi"))))
def test_a_call_with_an_id_may_be_cut_off_anywhere(end: int) -> None:
    rendered = with_ids("abcdefghi")
    total = read(V11, [rendered[:end]])
    assert total.text == ""
    assert len(total.calls) == (end > rendered.index("{"))
    assert not total.called


def test_malformed_calls_are_text() -> None:
    """No grammar allows these; the next call is found again."""
    tool_format = TOOL_FORMATS["plain"]
    good = tool_format.render([("now", "{}")])
    for text in ("<tool_call>\nnow()", '<tool_call>\n{"name": "now", "arguments": 3}', "x <tool_"):
        total = read(tool_format, [text])
        assert (total.text, total.calls) == (text, [])
    total = read(tool_format, ["a\n<tool_call>b\n" + good])
    assert total.text == "a\n<tool_call>b"
    assert [name for _, name, _ in total.calls] == ["now"]
    total = read(tool_format, [good + "\nand more"])
    assert (total.text, total.called) == ("\nand more", True)
