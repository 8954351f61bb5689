"""Guides: which drafts a grammar lets stand, what it leaves no choice of, how it fails."""

from __future__ import annotations

import random

import pytest

from model.batch import unpack_masks
from model.grammar import (
    GrammarError,
    Grammars,
    Matcher,
    choice_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from service.engine.guide import Guide, MaskTime
from service.engine.output import OutputBuilder
from service.engine.thinking import ThinkingMatcher
from service.messages import FinishReason
from tests.engine.harness import make_request
from tests.laws.noise import EOS_IDS, TOKEN_BYTES, VOCAB_SIZE

END = min(EOS_IDS)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKEN_BYTES, eos_ids=EOS_IDS, vocab_size=VOCAB_SIZE)


def guide_of(grammars: Grammars, notation: str, text: bytes = b"") -> Guide:
    return look(make_guide(grammars.matcher(notation), tokens=text))


def make_guide(
    matcher: Matcher | ThinkingMatcher, *, tokens: bytes = b"", mask_time: MaskTime | None = None
) -> Guide:
    return Guide(
        matcher,
        token_bytes=TOKEN_BYTES,
        vocab_size=VOCAB_SIZE,
        mask_time=mask_time or MaskTime(lambda: 0.0),
        tokens=tokens,
    )


def look(guide: Guide) -> Guide:
    guide._time.compute_masks([guide])
    return guide


def allowed(guide: Guide, index: int = 0) -> list[int]:
    masks = unpack_masks(guide.masks(index + 1), VOCAB_SIZE)
    return [int(token) for token in masks[index].nonzero()[0]]


def ids(*texts: bytes) -> list[int]:
    return [TOKEN_BYTES.index(text) for text in texts]


def test_drafts_stand_up_to_the_first_that_is_forbidden(grammars: Grammars) -> None:
    guide = guide_of(grammars, regex_grammar("[a-c]{9}"))
    assert guide.admit(list(b"abcabX")) == list(b"abcab")
    assert guide.admit(list(b"Xab")) == []
    assert guide.admit([]) == []
    assert guide.admit([*b"ab", END, *b"c"]) == list(b"ab")
    assert guide.num_allowed(list(b"abX")) == 2


def test_the_last_token_of_an_answer_is_no_draft(grammars: Grammars) -> None:
    """Its row is not needed: what it would sample is behind the end."""
    guide = guide_of(grammars, choice_grammar(["free"]))
    assert guide.admit(list(b"free")) == list(b"fre")
    assert allowed(guide_of(grammars, regex_grammar("a+"), b"a"))[-1] == END
    assert guide_of(grammars, regex_grammar("a+"), b"a").admit([END, 97]) == []


def test_masks_behind_drafts_are_those_of_reading_them(grammars: Grammars) -> None:
    """Also after drafts were admitted, cut and given up many times."""
    notation = json_schema_grammar(
        {"type": "array", "items": {"enum": ["fixed", "the ", 12]}, "minItems": 3}
    )
    for seed in range(4):
        draw = random.Random(seed)
        guide = guide_of(grammars, notation)
        for _ in range(12):
            drafts: list[int] = []
            reading = make_guide(guide._matcher.copy())
            assert look(reading).ready
            expected = [allowed(reading)]
            for _ in range(draw.randint(0, 6)):
                token = draw.choice(expected[-1])
                reading.read(token)
                if token == END or reading.ended:
                    break
                assert look(reading).ready
                drafts.append(token)
                expected.append(allowed(reading))
            assert guide.admit([*drafts, *ids(b"\xff")]) == drafts
            assert [allowed(guide, index) for index in range(len(drafts) + 1)] == expected
            token = draw.choice(expected[0])
            if token == END:
                break
            guide.read(token)
            if guide.ended:
                break
            assert look(guide).ready


def test_what_must_come_is_spelled_in_long_tokens(grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {"tags": {"const": "fixed"}}, "required": ["tags"],
              "additionalProperties": False}  # fmt: skip
    guide = guide_of(grammars, json_schema_grammar(schema), b'{"')
    spelled = ids(
        b"tags", b'": ', b'"', b"fixed", b'"}'
    )  # of the blanks, as far as tokens have them
    assert guide.forced(8) == spelled
    assert guide.forced(2) == spelled[:2]
    assert guide.admit(guide.forced(8)) == spelled[:-1]
    guide = guide_of(grammars, json_schema_grammar(schema), b'{"tags"')
    assert guide.forced(8) == [], "a line may end before the colon"


@pytest.mark.parametrize("text", [b"", b"x"])
def test_where_there_is_a_choice_nothing_is_spelled(grammars: Grammars, text: bytes) -> None:
    guide = guide_of(grammars, regex_grammar("x(ab|c).*"), text)
    assert guide.forced(8) == (ids(b"x") if not text else [])
    assert guide_of(grammars, regex_grammar("xa?"), b"x").forced(8) == []


def test_a_failure_behind_a_draft_costs_the_draft_alone(grammars: Grammars) -> None:
    """The dead end is in what might come; the answer itself may never go there."""
    guide = guide_of(grammars, lark_grammar('start: "a" "b" x | "a" "c"\nx: x "d"'))
    assert guide.admit(list(b"ab")) == list(b"a")
    guide.read(ord("a"))
    assert look(guide).ready
    assert sorted(allowed(guide)) == list(b"bc")
    assert guide.forced(8) == []
    guide.read(ord("c"))
    assert guide.ended


def test_an_answer_in_a_dead_end_fails(grammars: Grammars) -> None:
    guide = guide_of(grammars, lark_grammar('start: "a" "b" x | "a" "c"\nx: x "d"'), b"a")
    request = make_request(max_tokens=9)
    answer = OutputBuilder(request, token_bytes=TOKEN_BYTES, eos_ids=EOS_IDS, guide=guide)
    record = answer.take(list(b"b"))
    look(guide)
    assert (record.text, answer.verdict) == ("b", FinishReason.ERROR)
    assert answer.end(FinishReason.ERROR).error == "grammar_failed"


def test_one_that_fails_at_its_beginning_fails_its_answer(grammars: Grammars) -> None:
    matcher = grammars.matcher(choice_grammar(["a"]))
    with pytest.raises(GrammarError):
        matcher.read(ord("x"))
    guide = look(make_guide(matcher))
    assert not guide.ready
    answer = OutputBuilder(make_request(), token_bytes=TOKEN_BYTES, eos_ids=EOS_IDS, guide=guide)
    assert answer.verdict is FinishReason.ERROR
