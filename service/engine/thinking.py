"""ThinkingMatcher: what may come next in an output that thinks before its content.

    START      a tag, or the content without any thinking
    THINKING   any token, up to the budget; then the tokens that end it are forced
    BETWEEN    the tags that follow
    CONTENT    what the grammar allows

Like the grammar's `Matcher`, which it wraps, it is a function of the tokens read: so budgets and
grammars hold over preemption, failover, drafts and any batch. No token may both end the thinking
and begin a content that has a grammar: the grammar reads whole tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np

from model.batch import Words, mask_of
from model.grammar import GrammarError, Matcher
from service.messages import Thinking
from service.thinking import BLANKS, THINKING_FORMATS, Phase, Splitter, TokenScan, symbol

_WORD = 32


class FreeMasks:
    """Masks of any token, and of those that do not end an output or cross into its content.

    One engine has one; the arrays are shared and read-only.
    """

    def __init__(
        self, token_bytes: Sequence[bytes], *, vocab_size: int, eos_ids: frozenset[int]
    ) -> None:
        self.token_bytes = token_bytes
        self.eos_ids = eos_ids
        self.any_W = mask_of(range(vocab_size), vocab_size=vocab_size)
        self._vocab_size = vocab_size
        self._within: dict[tuple[str, str], Words] = {}

    def within(self, closing: str, *, held: str) -> Words:
        """Tokens that may follow `held` in thinking that a grammar's content follows: all but end
        tokens, and those with more text after the end of the `closing`.
        """
        held = held.lstrip(BLANKS)
        found = self._within.get((closing, held))
        if found is None:
            end = closing[-1].encode(errors="replace")  # a symbol is in no token
            texts = enumerate(self.token_bytes[: self._vocab_size])
            suspects = [(id_, held + text.decode("latin-1")) for id_, text in texts if end in text]
            crossing = {id_ for id_, text in suspects if text.partition(closing)[2]}
            ending = {id_ for id_ in self.eos_ids if id_ < self._vocab_size}
            excluded = mask_of(crossing | ending, vocab_size=self._vocab_size)
            found = self._within[closing, held] = self.any_W & ~excluded
        return found


class ThinkingMatcher:
    """The state of one output. After a GrammarError it is of no further use."""

    def __init__(self, thinking: Thinking, grammar: Matcher | None, masks: FreeMasks) -> None:
        """Raises ValueError for a format of another version."""
        if thinking.format not in THINKING_FORMATS or not thinking.closing:
            raise ValueError("unknown format of thinking")
        symbols = {text: symbol(index) for index, (text, _) in enumerate(thinking.symbols)}
        self._tags = THINKING_FORMATS[thinking.format].spelled(symbols)
        self._scan = TokenScan(
            Splitter(self._tags, opened=thinking.opened, verbatim=thinking.verbatim),
            token_bytes=masks.token_bytes,
            symbols={id_: symbols[text] for text, id_ in thinking.symbols},
        )
        self._thinking = thinking
        self._masks = masks
        self._fresh = grammar  # the beginning of the content
        self._grammar = None if grammar is None else grammar.copy()
        self._off = False  # the tokens since START are no content
        self._since: tuple[int, ...] = ()  # tokens read in the phases START or BETWEEN
        self._num_forced = 0  # tokens of the closing that were forced in a row

    def copy(self) -> ThinkingMatcher:
        """An independent matcher in the same state."""
        twin = copy(self)
        twin._scan = self._scan.copy()  # noqa: SLF001
        twin._grammar = self._grammar and self._grammar.copy()  # noqa: SLF001
        return twin

    @property
    def ended(self) -> bool:
        """Whether nothing can follow."""
        begun = self._scan.phase in {Phase.START, Phase.CONTENT} and not self._off
        return begun and self._grammar is not None and self._grammar.ended

    def may_bind(self, num: int) -> bool:
        """Whether any of the next `num` tokens may have to be chosen among fewer than all."""
        if self._grammar is not None or self._num_forced:
            return True
        budget = self._thinking.budget
        if budget is None or self._is_over:
            return False
        return self._scan.num_thinking + num >= budget

    @property
    def _is_over(self) -> bool:
        """Whether there will be no more thinking."""
        return self._scan.phase is Phase.CONTENT and self._tags.end is None

    def read(self, token: int) -> None:
        """Appends a token to the output. Raises GrammarError if it may not or cannot follow."""
        closing, before = self._thinking.closing, self._scan.phase
        if self._forced() is not None:
            self._num_forced = (self._num_forced + 1) % len(closing)
        self._scan.read(token)
        phase = self._scan.phase
        self._since = (*self._since, token) if before in {Phase.START, Phase.BETWEEN} else ()
        in_tags = before in {Phase.THINKING, Phase.BETWEEN}
        if (in_tags and phase is not before) or (before is Phase.START and self._is_tag):
            self._begin()
        elif self._grammar is not None and not in_tags and not self._off:
            self._read_content(token)

    @property
    def _is_tag(self) -> bool:
        """Whether the tokens since START are a whole tag."""
        return self._scan.phase is Phase.THINKING or self._since in self._thinking.openings

    def _begin(self) -> None:
        """The content may begin with the next token."""
        self._since, self._off = (), False
        if self._fresh is not None:
            self._grammar = self._fresh.copy()

    def _read_content(self, token: int) -> None:
        try:
            if self._grammar is not None:
                self._grammar.read(token)
        except GrammarError:
            if not self._paths(self._since):
                raise
            self._off = True  # it is a tag

    def _paths(self, begun: tuple[int, ...]) -> set[int]:
        """Tokens that continue a tag of which these were read."""
        if self._scan.phase is Phase.BETWEEN:
            return _next(self._thinking.joint, begun)
        if self._scan.phase is not Phase.START:
            return set()
        return {id_ for tag in self._thinking.openings for id_ in _next(tag, begun)}

    def _forced(self) -> int | None:
        closing, budget = self._thinking.closing, self._thinking.budget
        if self._num_forced:
            return closing[self._num_forced]
        spent = budget is not None and self._scan.num_thinking >= budget
        return closing[0] if spent and self._scan.phase is Phase.THINKING else None

    def fill(self, mask_W: Words) -> None:
        """Writes which tokens may come next, bit by bit; at least one. Raises GrammarError."""
        forced, grammar = self._forced(), self._grammar
        if forced is not None:
            mask_W[:] = 0
            _allow(mask_W, {forced})
        elif grammar is None:
            mask_W[:] = self._masks.any_W
        elif self._scan.phase is Phase.THINKING:
            mask_W[:] = self._masks.within(self._tags.closing, held=self._scan.splitter.held)
        else:
            self._fill_content(grammar, mask_W)

    def _fill_content(self, grammar: Matcher, mask_W: Words) -> None:
        paths = self._paths(self._since)
        if self._off or self._scan.phase is Phase.BETWEEN:
            mask_W[:] = 0
        else:
            grammar.fill(mask_W)
        _allow(mask_W, paths)
        if not mask_W.any():
            raise GrammarError("no token can come next")

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """How many of the tokens may follow, at most: before the content, masks decide."""
        if self._grammar is None or self._scan.phase is not Phase.CONTENT:
            return len(tokens)
        return self._grammar.num_allowed(tokens)


def _next(tag: tuple[int, ...], begun: tuple[int, ...]) -> set[int]:
    """The token of a tag after those that were read, if they are its beginning."""
    num = len(begun)
    return {tag[num]} if num < len(tag) and tag[:num] == begun else set()


def _allow(mask_W: Words, tokens: set[int]) -> None:
    for token in tokens:
        mask_W[token // _WORD] |= np.uint32(1 << token % _WORD)
