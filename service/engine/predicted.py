"""PredictedText: drafts from the text that a client expects the output to contain.

    prediction   a b c d e f g h
    output       a b c x e f | drafts: g h

While the output follows the prediction, its next tokens are the drafts. Once it differs, the place
is found again by the last tokens of the output: of the places that match most of them, the nearest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

_LONGEST = 8  # tokens compared backwards
_PLACES = 8  # places of a pair that are compared, the nearest


class PredictedText:
    """The position of one output in its prediction. Reads each output token once."""

    def __init__(self, prediction: Sequence[int]) -> None:
        self._prediction = prediction
        self._next = 0  # index of the token that is expected
        self._follows = True  # whether the output is at that place
        self._num_read = 0  # output tokens
        self._places: dict[tuple[int, int], list[int]] = {}  # pair -> indices after it, rising
        for index in range(1, len(prediction)):
            pair = (prediction[index - 1], prediction[index])
            self._places.setdefault(pair, []).append(index + 1)

    def drafts(self, tokens: Sequence[int], num_prompt: int, most: int) -> list[int]:
        """At most `most` tokens that may follow; none if the output has left the prediction."""
        for index in range(num_prompt + self._num_read, len(tokens)):
            self._read(tokens, num_prompt, index)
        self._num_read = len(tokens) - num_prompt
        return list(self._prediction[self._next : self._next + most]) if self._follows else []

    def _read(self, tokens: Sequence[int], num_prompt: int, index: int) -> None:
        place = self._next
        expected = self._prediction[place : place + 1] if self._follows else ()
        if tokens[index] in expected:
            self._next += 1
            return
        self._follows = False
        if index == num_prompt:
            return
        found = self._places.get((tokens[index - 1], tokens[index]), [])
        near = bisect_left(found, place)
        first = max(0, near - _PLACES // 2)
        places = found[first : first + _PLACES]
        if places:
            output = tokens[max(num_prompt, index + 1 - _LONGEST) : index + 1]
            self._next = max(places, key=lambda p: (self._match(output, p), -abs(p - place)))
            self._follows = True

    def _match(self, output: Sequence[int], place: int) -> int:
        """Number of equal tokens before `place` and at the end of the output."""
        length, most = 0, min(_LONGEST, place, len(output))
        while length < most and self._prediction[place - 1 - length] == output[-1 - length]:
            length += 1
        return length
