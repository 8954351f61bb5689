"""Laws of reading calls out of text: what is told does not depend on how the text was cut."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field

import pytest

from service.api.tools.formats import TOOL_FORMATS, ToolFormat
from service.api.tools.parser import ParsedText, ToolCallParser, call_id

NAMES = sorted(TOOL_FORMATS)


@dataclass
class Sum:
    """All that a reader told of one text, put together as a client would."""

    text: str = ""
    calls: list[list[str]] = field(default_factory=list)  # id, name, arguments
    called: bool = False

    def add(self, told: ParsedText) -> None:
        self.text += told.text
        for delta in told.calls:
            assert (delta.id is None) == (delta.name is None)
            if delta.id is not None:
                assert delta.index == len(self.calls), "calls begin in order"
                self.calls.append([delta.id, delta.name or "", ""])
            self.calls[delta.index][2] += delta.arguments


def read(notation: ToolFormat, pieces: list[str]) -> Sum:
    reader = ToolCallParser(notation, request_id="s0-1.0")
    total = Sum()
    for piece in pieces:
        total.add(reader.push(piece))
    total.add(reader.finish())
    total.called = reader.called
    return total


def cut(draw: random.Random, text: str) -> list[str]:
    cuts = sorted(draw.randint(0, len(text)) for _ in range(draw.randint(0, 12)))
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def random_calls(draw: random.Random, notation: ToolFormat) -> list[tuple[str, str]]:
    values = [{}, {"a": '}{"\\'}, {"b": [1, {"c": None}], "é": "</tool_call>"}, {"": {"": []}}]
    count = 1 if notation.joint is None else draw.randint(1, 4)
    return [(f"f-{i}_", json.dumps(draw.choice(values))) for i in range(count)]


def near_calls(draw: random.Random, notation: ToolFormat) -> str:
    """Whatever begins like a call, or ends like one, and much that does neither."""
    spelled = notation.render(random_calls(draw, notation))
    fixed = [notation.opening, notation.heads[0], notation.between, notation.tail, notation.end]
    pieces = [*fixed, notation.joint or "", spelled, spelled[: draw.randrange(len(spelled))], "x\n"]
    pieces += [notation.opening[:3], " \n", "{", '"', "é"]
    return "".join(draw.choice(pieces) for _ in range(draw.randint(0, 7)))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_told_does_not_depend_on_the_cuts(name: str) -> None:
    notation = TOOL_FORMATS[name]
    for seed in range(60):
        draw = random.Random(seed)
        text = near_calls(draw, notation)
        whole = read(notation, [text])
        assert read(notation, cut(draw, text)) == whole, (seed, text)
        assert read(notation, list(text)) == whole, (seed, text)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_spelled_is_read_back(name: str) -> None:
    notation = TOOL_FORMATS[name]
    for seed in range(60):
        draw = random.Random(seed)
        calls = random_calls(draw, notation)
        before = "" if notation.only_first else draw.choice(["", "Let me see.", "a < b <tool"])
        blanks = draw.choice(["", "\n", " \n\n"]) if before else ""
        total = read(notation, cut(draw, before + blanks + notation.render(calls)))
        assert total.text == before
        assert [(called, arguments) for _, called, arguments in total.calls] == calls
        assert total.called
        assert [id_ for id_, _, _ in total.calls] == [
            call_id(notation, "s0-1.0", index) for index in range(len(calls))
        ]


@pytest.mark.parametrize("name", NAMES)
def test_a_text_without_an_opening_is_told_as_it_is(name: str) -> None:
    notation = TOOL_FORMATS[name]
    for seed in range(60):
        draw = random.Random(seed)
        alphabet = notation.opening + " \n"
        text = "".join(draw.choice(alphabet) for _ in range(40)).replace(notation.opening, "")
        if notation.opening in text:
            continue
        total = read(notation, cut(draw, text))
        assert (total.text, total.calls, total.called) == (text, [], False)


@pytest.mark.parametrize("name", NAMES)
def test_text_comes_at_once_where_no_call_can_begin(name: str) -> None:
    reader = ToolCallParser(TOOL_FORMATS[name], request_id="a")
    assert reader.push("Hello, world").text == "Hello, world"
    assert reader.push("! <").text in {"!", "! <"}


@pytest.mark.parametrize("name", NAMES)
def test_arguments_come_as_they_are_written(name: str) -> None:
    notation = TOOL_FORMATS[name]
    reader = ToolCallParser(notation, request_id="a")
    spelled = notation.render([("now", '{"zone": "UTC"}')])
    start = spelled.index('{"zone')
    assert reader.push(spelled[:start]).calls == ()
    (first,) = reader.push(spelled[start : start + 8]).calls
    assert (first.name, first.arguments) == ("now", '{"zone":')
    (second,) = reader.push(spelled[start + 8 : start + 10]).calls
    assert (second.id, second.name, second.arguments) == (None, None, ' "')
    assert not reader.called
    reader.push(spelled[start + 10 :])
    assert reader.called


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_is_cut_off_is_told_as_far_as_it_goes(name: str) -> None:
    notation = TOOL_FORMATS[name]
    spelled = notation.render([("now", '{"a": 1}')])
    named, done = spelled.index("{", spelled.index("now")) + 1, spelled.index("}") + 1
    for end in range(len(notation.opening), len(spelled) + 1):
        total = read(notation, [spelled[:end]])
        assert total.text == ""
        assert len(total.calls) == (end >= named)
        assert total.called == (end >= done)


def test_an_opening_that_counts_at_the_start_counts_nowhere_else() -> None:
    notation = TOOL_FORMATS["llama"]
    spelled = notation.render([("now", "{}")])
    total = read(notation, [spelled + spelled])
    assert (total.text, len(total.calls)) == (spelled, 1)
    total = read(notation, ["x", spelled])
    assert (total.text, total.calls) == ("x" + spelled, [])


V11 = TOOL_FORMATS["mistral-v11"]


def with_ids(*ids: str | None) -> str:
    """One call for each, `now` with the index as an argument."""
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
    spelled = "Well.\n" + with_ids(*written)
    expected = [id_ or call_id(V11, "s0-1.0", index) for index, id_ in enumerate(told)]
    for seed in range(20):
        total = read(V11, cut(random.Random(seed), spelled))
        assert total.text == "Well."
        assert [call[0] for call in total.calls] == expected
        assert [call[1:] for call in total.calls] == [
            ["now", f'{{"i": {index}}}'] for index in range(len(written))
        ]
    assert read(V11, list(spelled)) == read(V11, [spelled])


def test_an_id_that_never_ends_is_text() -> None:
    text = "[TOOL_CALLS]now[CALL_ID]" + "x" * 100
    for pieces in ([text], list(text)):
        total = read(V11, pieces)
        assert (total.text, total.calls) == (text, [])


@pytest.mark.parametrize("end", range(len("[TOOL_CALLS]"), len(with_ids("abcdefghi"))))
def test_a_call_with_an_id_may_be_cut_off_anywhere(end: int) -> None:
    spelled = with_ids("abcdefghi")
    total = read(V11, [spelled[:end]])
    assert total.text == ""
    assert len(total.calls) == (end > spelled.index("{"))
    assert not total.called


def test_what_is_no_call_is_text() -> None:
    """Nothing that a grammar made; and the next call is found again."""
    notation = TOOL_FORMATS["plain"]
    good = notation.render([("now", "{}")])
    for text in ("<tool_call>\nnow()", '<tool_call>\n{"name": "now", "arguments": 3}', "x <tool_"):
        total = read(notation, [text])
        assert (total.text, total.calls) == (text, [])
    total = read(notation, ["a\n<tool_call>b\n" + good])
    assert total.text == "a\n<tool_call>b"
    assert [name for _, name, _ in total.calls] == ["now"]
    total = read(notation, [good + "\nand more"])
    assert (total.text, total.called) == ("\nand more", True)
