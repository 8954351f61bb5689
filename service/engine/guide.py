"""Guide: what a grammar lets an answer go on with, token by token and draft by draft.

The mask of the next token is there when a step's tokens have been read and `look` was called:
whether the answer can go on is found out then, and not when the next step is under way. Masks
behind drafts are computed when a step takes the drafts on. What the grammar forbids is never
drafted, so every row that samples has a mask that allows a token.

    read            token | token | token
    masks_MW[0]                           the next one
    masks_MW[i]                           the one behind i drafts

It is a function of the request and the answer's tokens, so a take-over reads them again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.batch import Words
from model.grammar import GrammarError, Matcher

_FEW = 32  # words of a mask: more of them than these are not looked at for what must come next
_WORD = 32


class Guide:
    """The grammar of one answer, at its present end. `ended` is final, and so is a failure."""

    def __init__(self, matcher: Matcher, *, token_bytes: Sequence[bytes], vocab_size: int) -> None:
        self._failed = False
        self._matcher = matcher
        self._token_bytes = token_bytes
        self._masks_MW: Words = np.zeros((1, -(-vocab_size // _WORD)), np.uint32)

    @property
    def ended(self) -> bool:
        """Whether nothing can follow: the answer is complete."""
        return not self._failed and self._matcher.ended

    def read(self, token: int) -> None:
        """The answer goes on with a token that has text."""
        if self._failed:
            return
        try:
            self._matcher.read(token)
        except GrammarError:
            self._failed = True

    def look(self) -> bool:
        """Computes the mask of the next token; False where the answer cannot go on."""
        if not self._failed:
            try:
                self._matcher.fill(self._masks_MW[0])
            except GrammarError:
                self._failed = True
        return not self._failed

    def masks(self, num: int) -> Words:
        """The masks of the next token and of those behind the drafts that were admitted last."""
        return self._masks_MW[:num]

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """How many of the tokens may come, one after another. Cheap."""
        return self._matcher.num_allowed(tokens)

    def admit(self, drafts: Sequence[int]) -> list[int]:
        """The drafts up to the first that is forbidden or the last of the answer.

        Their masks are there then: `masks(1 + len(drafts))`.
        """
        self._make_room(1 + len(drafts))
        num = read = 0
        try:
            for draft in drafts:
                if not _allows(self._masks_MW[num], draft):
                    break
                self._matcher.read(draft)
                read += 1
                if self._matcher.ended:
                    break
                self._matcher.fill(self._masks_MW[num + 1])
                num += 1
            self._matcher.unread(read)
        except GrammarError:  # too much work there; it may still not come to that
            self._matcher = self._matcher.before(read)
        return list(drafts[:num])

    def forced(self, most: int) -> list[int]:
        """Tokens that spell what must come next, as long ones as there are; at most `most`.

        A guess: the answer may spell it with shorter ones.
        """
        mask_W = self._masks_MW[0].copy()
        found: list[int] = []
        try:
            while len(found) < most:
                token = self._longest(mask_W)
                if token is None:
                    break
                self._matcher.read(token)
                found.append(token)
                if self._matcher.ended:
                    break
                self._matcher.fill(mask_W)
            self._matcher.unread(len(found))
        except GrammarError:
            self._matcher = self._matcher.before(len(found))
        return found

    def _longest(self, mask_W: Words) -> int | None:
        """The longest of the allowed tokens, where all others are beginnings of it."""
        words = np.flatnonzero(mask_W)
        if len(words) > _FEW:
            return None
        bits = np.unpackbits(mask_W[words].view(np.uint8), bitorder="little").reshape(-1, _WORD)
        tokens = [int(words[row]) * _WORD + int(bit) for row, bit in np.argwhere(bits)]
        if len(tokens) == 1:
            return tokens[0]
        texts = [self._token_bytes[token] for token in tokens]
        longest = max(texts, key=len)
        if all(text and longest.startswith(text) for text in texts):  # the end has no text
            return tokens[texts.index(longest)]
        return None

    def _make_room(self, num: int) -> None:
        if num > len(self._masks_MW):
            room = np.zeros((num, self._masks_MW.shape[1]), np.uint32)
            room[0] = self._masks_MW[0]
            self._masks_MW = room


def _allows(mask_W: Words, token: int) -> bool:
    return bool(mask_W[token // _WORD] >> np.uint32(token % _WORD) & np.uint32(1))
