"""Grammars over a small vocabulary: what may come next is what can still become a match."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from model.batch import unpack_masks
from model.grammar import (
    GrammarError,
    Grammars,
    Matcher,
    choice_grammar,
    gbnf_grammar,
    json_object_grammar,
    json_schema_grammar,
    json_text,
    lark_grammar,
    regex_grammar,
)
from model.grammar_validator import validate

WORDS = (
    b'{"',
    b'":',
    b'", "',
    b'"}',
    b"true",
    b"fal",
    b"false",
    b"\n  ",
    b"ab",
    b"abc",
    "é".encode(),
)
BYTES = tuple(bytes([byte]) for byte in range(256))
TOKENS = (*BYTES, *WORDS, b"", b"", b"")  # the last three: a special token and two ends
ENDS = frozenset({len(TOKENS) - 2, len(TOKENS) - 1})
V = len(TOKENS)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENS, eos_ids=ENDS, vocab_size=V)


def mask_of(matcher: Matcher) -> np.ndarray[Any, Any]:
    words = np.zeros(-(-V // 32), np.uint32)
    matcher.fill(words)
    (mask,) = unpack_masks(words[None], V)
    return np.asarray(mask)


def read(matcher: Matcher, text: str | bytes) -> Matcher:
    for byte in text.encode() if isinstance(text, str) else text:
        matcher.read(byte)
    return matcher


def accepts(grammars: Grammars, notation: str, text: str) -> bool:
    """Whether a text, byte by byte, is a whole answer."""
    matcher = grammars.matcher(notation)
    for byte in text.encode():
        if matcher.ended or not mask_of(matcher)[byte]:
            return False
        matcher.read(byte)
    return matcher.fulfilled


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "on": {"type": "boolean"}},
    "required": ["x"],
    "additionalProperties": False,
}
LANGUAGES: list[tuple[str, list[str], list[str]]] = [
    (
        json_schema_grammar(POINT),
        ['{"x":1}', '{"x": -20, "on": true}', '{\n  "x": 1\n}', '{ "x" : 1 }'],
        ["", "{}", '{"x":1', '{"x":01}', '{"on":true}', '{"x":1,"y":2}', '{"x":1} ', '{  "x":1}',
         '{\n\n"x":1}', "```{"],
    ),
    (json_object_grammar(), ["{}", '{"a": [1, null, "é"]}'], ["[]", "1", '{"a":}', "{}{}"]),
    (json_schema_grammar({"enum": ["a", 1, None]}), ['"a"', "1", "null"], ["a", "2", '"b"']),
    (regex_grammar(r"\d{2}(-/x)?"), ["12", "12-/x"], ["1", "123", "12-", "ab"]),
    (regex_grammar("a.c|é"), ["abc", "é", "aéc"], ["a\nc", "ac", "e"]),
    (choice_grammar(["red", "redder", 'a"b\\\n', "é"]), ["red", "redder", 'a"b\\\n', "é"],
     ["re", "redd", "blue", "redred"]),
    (lark_grammar('start: "a" b+\nb: "b" | "c" start'), ["ab", "abb", "acab"], ["a", "aa", "ac"]),
    (lark_grammar(f"start: \"<\" %json {json_text(POINT)}"), ['<{"x":1}'], ['{"x":1}', "<>"]),
    (gbnf_grammar('root ::= "yes" | "no" [0-9]+'), ["yes", "no12"], ["no", "maybe", "yes1"]),
]  # fmt: skip


@pytest.mark.parametrize(("notation", "inside", "outside"), LANGUAGES, ids=lambda v: str(v)[:20])
def test_a_notation_has_its_language(
    grammars: Grammars, notation: str, inside: list[str], outside: list[str]
) -> None:
    assert [text for text in inside if not accepts(grammars, notation, text)] == []
    assert [text for text in outside if accepts(grammars, notation, text)] == []
    assert validate(grammars, notation) is None


NO_GRAMMARS = [
    "", "json", "json:", "json:[", "json:5", "json:[]", "yaml:{}", "choice:5", "choice:[]",
    "choice:[1]", "regex:", "regex:(", "regex:(?=a)", r"regex:(a)\1", "lark:", "lark:start: (",
    "lark:a: b", "lark:start: start", "lark:start: <nobody>", 'lark:start: %json {"type":"x"}',
    'lark:%llguidance {"no_forcing": false}\nstart: /[ab]/ "xyz"', "gbnf:root ::= (", "gbnf:root",
    "gbnf:root ::= \"\\", json_schema_grammar({"type": "stsring"}),
    json_schema_grammar({"$ref": "#"}), json_schema_grammar({"$ref": "http://127.0.0.1/"}),
    json_schema_grammar({"not": {}}), json_schema_grammar({"enum": []}),
    json_schema_grammar({"type": "string", "enum": [1]}),
    json_schema_grammar({"type": "string", "pattern": "("}), regex_grammar("a" * 30 + "(" * 20_000),
]  # fmt: skip


@pytest.mark.parametrize("notation", NO_GRAMMARS, ids=lambda notation: notation[:30])
def test_what_is_no_grammar_is_an_error(grammars: Grammars, notation: str) -> None:
    for _ in range(2):  # the second is remembered
        with pytest.raises(GrammarError):
            grammars.matcher(notation)
    grammars.prepare(notation)
    assert validate(grammars, notation) is not None


def test_a_grammar_needs_a_token_to_end_with() -> None:
    with pytest.raises(GrammarError, match="end"):
        Grammars(TOKENS, eos_ids=frozenset(), vocab_size=V).matcher("json:{}")


def test_the_vocabulary_is_cut_to_the_networks() -> None:
    """Tokens that have no logits are no way out, and no end."""
    small = Grammars(TOKENS, eos_ids=frozenset({300, *ENDS}), vocab_size=V - 1)
    assert small.eos_ids == {V - 2}
    assert len(small.token_bytes) == V - 1
    words = np.zeros(-(-(V - 1) // 32), np.uint32)
    small.matcher(regex_grammar("a*")).fill(words)
    assert unpack_masks(words[None], V - 1)[0].nonzero()[0].tolist() == [ord("a"), V - 2]


def walk(grammars: Grammars, notation: str, seed: int, *, length: int = 40) -> list[int]:
    """A random answer, token by token; it ends before an end token."""
    draw = random.Random(seed)
    matcher, tokens = grammars.matcher(notation), list[int]()
    while len(tokens) < length and not matcher.ended:
        token = draw.choice(mask_of(matcher).nonzero()[0].tolist())
        if token in ENDS:
            break
        matcher.read(token)
        tokens.append(token)
    return tokens


TOOL_FORMATS = [notation for notation, *_ in LANGUAGES]


@pytest.mark.parametrize("notation", TOOL_FORMATS, ids=lambda notation: notation[:12])
def test_a_mask_says_what_can_be_read(grammars: Grammars, notation: str) -> None:
    """Of every token at every place: it is in the mask where it can be read, and nowhere else. The
    ends are in it where the answer may end; what has no text is in none.
    """
    for seed in range(3):
        matcher = grammars.matcher(notation)
        for token in [*walk(grammars, notation, seed), None]:
            if matcher.ended:
                break
            allowed = mask_of(matcher)
            assert matcher.bits() == sum(1 << int(token) for token in allowed.nonzero()[0])
            able = [matcher.num_allowed([other]) for other in range(V)]
            assert allowed.astype(int).tolist() == able
            assert [allowed[end] for end in ENDS] == [matcher.fulfilled] * 2
            assert not allowed[V - 3]
            if token is not None:
                matcher.read(token)


@pytest.mark.parametrize("notation", TOOL_FORMATS, ids=lambda notation: notation[:12])
def test_where_an_answer_stands_is_a_function_of_its_tokens(
    grammars: Grammars, notation: str
) -> None:
    """Read with masks between or without, read again, and after a copy has read on."""
    for seed in range(4):
        tokens = walk(grammars, notation, seed)
        watched = grammars.matcher(notation)
        for num in range(len(tokens) + 1):
            other = grammars.matcher(notation)
            for token in tokens[:num]:
                other.read(token)
            copy = other.copy()
            for token in tokens[num : num + 3]:
                copy.read(token)
            states = [watched, other, other.copy()]
            assert len({state.ended for state in states}) == 1
            assert len({state.fulfilled for state in states}) == 1
            if not watched.ended:
                masks = {mask_of(state).tobytes() for state in states}
                assert len(masks) == 1
            if num < len(tokens):
                watched.read(tokens[num])


def test_what_does_not_match_cannot_be_read(grammars: Grammars) -> None:
    matcher = read(grammars.matcher(regex_grammar("abc")), "ab")
    copy = matcher.copy()
    with pytest.raises(GrammarError):
        matcher.read(ord("x"))
    with pytest.raises(GrammarError):
        mask_of(matcher)
    assert mask_of(copy).nonzero()[0].tolist() == [ord("c")]


def test_nothing_is_forced_into_one_spelling(grammars: Grammars) -> None:
    """A forced run may be cut into tokens in any way: no mask names a whole run's own tokens."""
    matcher = grammars.matcher(json_schema_grammar({"const": "abcabc"}))
    read(matcher, '"')
    assert {TOKENS[token] for token in mask_of(matcher).nonzero()[0]} == {b"a", b"ab", b"abc"}


def test_a_long_forced_run_costs_no_time(grammars: Grammars) -> None:
    """Laid out at once a million bytes are seconds and hundreds of megabytes."""
    matcher = grammars.matcher(regex_grammar("x(a{1000}){1000}"))
    read(matcher, "x" + "a" * 200)
    assert {TOKENS[token] for token in mask_of(matcher).nonzero()[0]} == {b"a"}


def test_blanks_in_json_are_bounded(grammars: Grammars) -> None:
    """A model with nothing to say would go on with them for ever."""
    matcher = grammars.matcher(json_object_grammar())
    read(matcher, "{")
    blanks = 0
    while (allowed := {TOKENS[token][:1] for token in mask_of(matcher).nonzero()[0]}) & {
        b" ",
        b"\n",
    }:
        read(matcher, b"\n" if b"\n" in allowed else b" ")
        blanks += 1
        assert blanks < 60
    assert allowed == {b'"', b"}"}


def test_only_the_latest_grammars_are_kept() -> None:
    few = Grammars(TOKENS, eos_ids=ENDS, vocab_size=V, kept=3)
    for index in range(9):
        few.prepare(choice_grammar([f"a{index}"]))
    assert len(few._kept) == 3
    assert json.dumps(["a8"]) in [*few._kept][-1]
