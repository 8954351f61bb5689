"""Disguise: special tokens that users write stay text, at little cost."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Sequence

import pytest

from model.text.disguise import Disguise, SpecialTexts, any_of, strings_of
from tests.support.builders import at_length

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
MANY = [f"<|reserved_special_token_{index}|>" for index in range(250)] + [
    "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "[INST]", "[/INST]", "<s>",
]  # fmt: skip


def naive(text: str, specials: Sequence[str], stand_ins: dict[str, str]) -> str:
    """What `replace_beginnings` does, position by position."""
    longest = max(map(len, specials))
    characters = list(text)
    for at in range(max(0, len(text) - longest + 1), len(text)):
        if any(special.startswith(text[at:]) for special in specials):
            characters[at] = stand_ins[text[at]]
    tailed = "".join(characters)
    for at in range(len(text)):
        if any(tailed.startswith(special, at) for special in specials):
            characters[at] = stand_ins[tailed[at]]
    return "".join(characters)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [*range(8), *at_length(*range(8, 40))])
def test_equals_a_search_at_every_position(seed: int) -> None:
    draw = random.Random(seed)
    if seed % 4:  # short ones over few characters: prefixes, overlaps and repetitions of each other
        count = draw.randint(1, 12)
        specials = sorted(
            {"".join(draw.choices("ab<", k=draw.randint(1, 6))) for _ in range(count)}
        )
    else:
        specials = MANY
    texts = SpecialTexts(specials)
    stand_ins = {first: chr(0xE000 + index) for index, first in enumerate(sorted(texts.firsts))}
    parts = [*specials[:4], *(special[:-1] for special in specials), "a", "b", "<", " "]
    for _ in range(50):
        text = "".join(draw.choices(parts, k=draw.randint(0, 6)))
        assert texts.replace_beginnings(text, stand_ins) == naive(text, specials, stand_ins)


@pytest.mark.parametrize("seed", range(20))
def test_any_of_finds_the_longest(seed: int) -> None:
    draw = random.Random(seed)
    texts = {
        "".join(draw.choices("ab.|", k=draw.randint(1, 14))) for _ in range(draw.randint(1, 40))
    }
    pattern = re.compile(any_of(texts))
    flat = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
    for _ in range(50):
        text = "".join(draw.choices(["a", "b", ".", "|", *texts], k=draw.randint(0, 8)))
        assert pattern.findall(text) == flat.findall(text)


@pytest.mark.slow
def test_texts_that_begin_alike_hundreds_of_times_compile() -> None:
    """One group for each of them would be nested deeper than the compiler recurses."""
    texts = SpecialTexts(["a" * length + "b" for length in range(1, 500)])
    assert texts.replace_beginnings("xaab", {"a": "A"}) == "xAAb"
    assert texts.pattern is not None
    assert texts.pattern.split("xaabx") == ["x", "aab", "x"]


def test_without_special_texts_nothing_changes() -> None:
    for texts in (SpecialTexts([]), SpecialTexts([""])):
        assert Disguise(texts, ["<s>"]).put_on({"a": ["<s>", 1]}) == {"a": ["<s>", 1]}
        assert texts.pattern is None


def test_many_short_messages_take_little_time() -> None:
    """Needs 0.02 s of CPU time; a loop over all special tokens per string takes 2 s."""
    messages = [{"role": "user", "content": f"message <{index}>"} for index in range(1024)]
    texts = SpecialTexts(MANY)
    began = time.process_time()
    for _ in range(3):
        Disguise(texts, strings_of(messages)).put_on(messages)
    assert (time.process_time() - began) / 3 < 0.25


@pytest.mark.parametrize("near", ["<", "<|", "<|reserved_special_token_", "[", "<|reserved_"])
def test_near_matches_take_little_time(near: str) -> None:
    """Each was compared with every special token, at every position."""
    texts = SpecialTexts(MANY)
    assert texts.pattern is not None
    text = near * (10**6 // len(near))
    began = time.process_time()
    texts.replace_beginnings(text, dict.fromkeys(texts.firsts, "\ue000"))
    texts.pattern.split(text)
    assert time.process_time() - began < 0.5


def test_no_two_strings_make_a_special_token_together() -> None:
    """Every cut of every special token, glued back together by a template."""
    for special in SPECIALS:
        for cut in range(len(special) + 1):
            parts = [special[:cut], special[cut:]]
            disguise = Disguise(SpecialTexts(SPECIALS), parts)
            glued = "".join(disguise.put_on(parts))
            assert special not in glued
            assert disguise.remove(glued) == special


def test_disguise_has_stand_ins_left_when_all_private_characters_are_used() -> None:
    private = "".join(map(chr, itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0x10FFFE))))
    text = f"{private}<|im_end|>"
    disguise = Disguise(SpecialTexts(SPECIALS), [text])
    hidden = disguise.put_on(text)
    assert "<|im_end|>" not in hidden
    assert disguise.remove(hidden) == text
