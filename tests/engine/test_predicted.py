"""Drafts from a predicted text: where the output follows it, and where it comes back to it."""

from __future__ import annotations

import random

import pytest

from service.engine.predicted import PredictedText

MOST = 6


def accepted_drafts(prediction: list[int], output: list[int]) -> int:
    """How many tokens of the output its drafts spell, decoding as an engine does."""
    predicted, tokens, num = PredictedText(prediction), [1, 2, 3], 0
    end = len(tokens) + len(output)
    while len(tokens) < end:
        drafts = predicted.drafts(tokens, 3, MOST)
        assert len(drafts) <= MOST
        rest = output[len(tokens) - 3 :]
        right = 0
        while right < min(len(drafts), len(rest)) and drafts[right] == rest[right]:
            right += 1
        num += min(right, len(rest) - 1)
        tokens += rest[: right + 1]
    return num


def edited(draw: random.Random, text: list[int]) -> list[int]:
    """A text with some of its tokens removed, replaced or added to, in places far apart."""
    found = list(text)
    for place in sorted(draw.sample(range(5, len(text) - 5, 12), 3), reverse=True):
        found[place : place + draw.randint(0, 3)] = [
            draw.randrange(1000) for _ in range(draw.randint(0, 3))
        ]
    return found


@pytest.mark.parametrize("seed", range(20))
def test_an_edited_text_is_found_again_after_each_edit(seed: int) -> None:
    draw = random.Random(seed)
    prediction = [draw.randrange(1000) for _ in range(100)]
    assert accepted_drafts(prediction, prediction) >= 100 * MOST // (MOST + 1) - 1
    output = edited(draw, prediction)
    # An edit costs the tokens of the edit and the pair that finds the place again.
    assert accepted_drafts(prediction, output) >= 50


@pytest.mark.parametrize("seed", range(20))
def test_tokens_are_read_once_in_any_grouping(seed: int) -> None:
    """The drafts depend on the output, not on how many tokens came at a time."""
    draw = random.Random(seed)
    prediction = [draw.randrange(6) for _ in range(60)]  # every pair occurs often
    output = edited(draw, prediction)
    one, other, at = PredictedText(prediction), PredictedText(prediction), 0
    while at < len(output):
        at += draw.randint(1, 7)
        for end in range(len(output[:at]) + 1):
            single = one.drafts(output[:end], 0, MOST) if end > one._num_read else None
        del single
        assert one.drafts(output[:at], 0, MOST) == other.drafts(output[:at], 0, MOST)


def test_another_output_gets_no_drafts() -> None:
    predicted = PredictedText(range(100, 200))
    assert predicted.drafts([1], 1, 3) == [100, 101, 102]
    assert predicted.drafts([1, 5], 1, 3) == []
    assert predicted.drafts([1, 5, 7, 150], 1, 3) == []
    assert predicted.drafts([1, 5, 7, 150, 151], 1, 3) == [152, 153, 154]
    assert PredictedText([]).drafts([1], 1, 3) == []
