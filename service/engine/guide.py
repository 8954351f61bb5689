"""Guide: which tokens a grammar allows next in one output, and how much CPU time that may take.

    read            token | token | token
    masks_MW[0]                           the next token
    masks_MW[i]                           the token after i drafts

A sequence is decoded only while its guide is `ready`: the mask of its next token is computed. The
engine computes missing masks before each step, or beside its layers if the runner defers sampling,
in the order and within the time of `MaskTime`; a sequence whose mask has to wait skips the step,
and no other sequence waits for it. Masks after drafts are computed on copies of the matcher when a
step accepts the drafts.

A mask costs many times what it costs to check one token. So an output that takes the argmax of its
logits goes without, if the runner returns them: its row is *open*. The argmax among the allowed
tokens is that among all if this one is allowed; else the next ones are tried, and at last the mask.
The runner goes on with the argmax among all: if that is not allowed, the row that it computed with
it is in vain, and the next tokens get masks. Which masks are computed depends on time and drafts,
so none of them but the one for this choice may fail an open output.

The masks of an output are a function of the request and of its tokens, so another engine that reads
the tokens again gets the same ones. The size of a mask's computation is limited by
`model.grammar`; the time limits here are far above what those limits allow on any usable machine.
They are in CPU time of the engine's thread: a busy machine does not use them up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np

from model.batch import Floats, Words, unpack_masks
from model.grammar import GrammarError, Grammars, Matcher
from service.engine.thinking import FreeMasks, ThinkingMatcher
from service.errors import BadRequest
from service.messages import GenerationRequest, Thinking

# CPU seconds. A usual mask takes 0.0001, one at the limits of `model.grammar` 0.025.
MASK_LIMIT = 0.5  # one mask, or the reading of one token
ANSWER_LIMIT = 4.0  # all masks of an output, plus TOKEN_LIMIT per token
TOKEN_LIMIT = 0.01
STEP_TIME = 0.02  # of a step, for the masks of all sequences; the last one may exceed it
_QUICK = 0.002  # an output whose last mask took longer gets no drafts

_TRIES = 24  # tokens of an open row that are checked before its mask is computed
_NEAR = 10.0  # below the largest logit: others are not worth a try
AHEAD = 32  # tokens whose masks are computed ahead after a slow one, or a row in vain
_PROBES = (b"a", b"e", b"1")  # texts of which a grammar often allows two
_FEW = 32  # words of a mask: if more are set, no token is considered to be forced
_WORD = 32


class MaskTime:
    """Shares the CPU time for masks among the guides of one engine, step by step."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self.clock = clock
        self.left = 0.0  # seconds of this step
        self.costs: dict[str, float] = {}  # tenant -> seconds of its latest mask

    def compute_masks(self, guides: Iterable[Guide]) -> None:
        """Begins a step: computes missing masks, cheap ones first, at least one of them.

        A new output is expected to cost as much as the tenant's latest mask. A guide that has to
        wait moves up in the order with each step.
        """
        self.left = STEP_TIME
        for guide in sorted(guides, key=self._urgency):
            if self.left > 0:
                guide.compute_mask()
            else:
                guide.num_waits += 1

    def _urgency(self, guide: Guide) -> float:
        cost = self.costs.get(guide.tenant, 0.0) if guide.cost is None else guide.cost
        return cost / (1 + guide.num_waits)


class Guide:
    """The grammar of one output. `ended` and `failed` are final.

    `tokens` are the output tokens generated so far; `compute_mask` reads them.
    """

    def __init__(
        self,
        matcher: Matcher | ThinkingMatcher,
        *,
        token_bytes: Sequence[bytes],
        vocab_size: int,
        mask_time: MaskTime,
        tenant: str = "",
        tokens: Iterable[int] = (),
        takes_argmax: bool = False,
        probes: Sequence[int] = (),
    ) -> None:
        """`takes_argmax`: its rows may be open. `probes`: tokens of which none begins another."""
        self.ready = False  # whether the next token can be sampled
        self.failed = False
        self.tenant = tenant
        self.cost: float | None = None  # CPU seconds of the latest mask
        self.num_waits = 0  # steps since the mask was first needed
        self._matcher = matcher
        self.takes_argmax = takes_argmax
        self._probes = probes
        self._has_mask = False  # of the next token
        self.num_ahead = 0  # next tokens whose masks are computed although rows may be open
        self._token_bytes = token_bytes
        self._time = mask_time
        self._unread = deque(tokens)
        self._limit = ANSWER_LIMIT  # CPU seconds left to the output
        self._masks_MW: Words = np.zeros((1, -(-vocab_size // _WORD)), np.uint32)

    @property
    def ended(self) -> bool:
        """Whether the output is complete: no token may follow."""
        return not self.failed and not self._unread and self._matcher.ended

    def binds(self, num: int) -> bool:
        """Whether a mask of the next `num` tokens may exclude any."""
        return not isinstance(self._matcher, ThinkingMatcher) or self._matcher.may_bind(num)

    @property
    def is_open(self) -> bool:
        """Whether the next token is sampled without a mask, and then passed to `choose`."""
        return self.takes_argmax and not self._has_mask

    @property
    def is_behind(self) -> bool:
        """Whether tokens of the output are still to be read."""
        return bool(self._unread) and not self.failed

    def read(self, token: int) -> None:
        """Appends a token that has text."""
        self.ready = self._has_mask = False
        if not self.failed:
            self._unread.append(token)
            self._read_next()
            self.num_ahead = max(0, self.num_ahead - 1)
            if self.takes_argmax and not self.num_ahead:
                self.ready = not (self.failed or self._matcher.ended)

    def compute_mask(self) -> None:
        """Computes the mask of the next token, unless the output has ended or failed, or its row
        is open. After a slow mask the next ones are computed ahead, and no other sequence waits.

        Reading many tokens is continued in the next step if this step's time is used up.
        """
        while self._unread and not self.failed:
            if self._time.left <= 0:
                return
            self._read_next()
        if self.failed or self._matcher.ended:
            return
        if not self.takes_argmax:
            self._fill(self._matcher, fails=True)
        elif self.num_ahead:
            self._fill(self._matcher.copy())
        self.ready = not self.failed
        self.num_waits = 0

    def choose(self, token: int, logits_V: Floats) -> int | None:
        """The argmax of an open row among the tokens that are allowed, the lowest id among equals;
        None if the output fails. `token` is that among all.
        """
        with self._timed():
            if logits_V[token] > -np.inf:  # else there is no number
                if _may_follow(self._matcher, token):
                    return token
                if self._has_choice(self._matcher):
                    for other in _nearest(logits_V, token):
                        if _may_follow(self._matcher, other):
                            return other
        if not self.failed:
            self._fill(self._matcher, fails=True)
        if self.failed:
            self.ready = False
            return None
        allowed_V = unpack_masks(self._masks_MW[:1], len(logits_V))[0]
        values_V = np.where(allowed_V & (logits_V > -np.inf), logits_V, -np.inf)  # without any NaN
        best = int(values_V.argmax())
        return best if values_V[best] > -np.inf else 0  # as samplers do

    def _fill(self, matcher: Matcher | ThinkingMatcher, *, fails: bool = False) -> None:
        """Computes the mask of the next token. If that `fails`, so does the output."""
        before = self._time.left
        try:
            with self._timed():
                matcher.fill(self._masks_MW[0])
            self._has_mask = True
        except GrammarError:
            self.failed |= fails
        self.cost = self._time.costs[self.tenant] = before - self._time.left

    def masks(self, num: int) -> Words:
        """Masks of the next token and of the tokens after the drafts that were admitted last."""
        return self._masks_MW[:num]

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """Length of the longest prefix of `tokens` that the grammar allows."""
        if not self._may_draft:
            return 0
        with self._timed():
            return self._matcher.copy().num_allowed(tokens)  # too much work there fails the copy

    def admit(self, drafts: Sequence[int]) -> list[int]:
        """The drafts up to the first that is forbidden or that completes the output.

        Computes their masks: `masks(1 + len(drafts))`. Stops if the step's time is used up.
        """
        if self.is_open:
            self._fill(self._matcher.copy())
        if not self._has_mask:
            return []
        self._make_room(1 + len(drafts))
        matcher, num = self._matcher.copy(), 0
        with suppress(GrammarError):  # the drafts may be rejected
            for draft in drafts:
                if not (self._may_draft and _allows(self._masks_MW[num], draft)):
                    break
                if not self._follow(matcher, draft, self._masks_MW[num + 1]):
                    break
                num += 1
        return list(drafts[:num])

    def forced(self, most: int) -> list[int]:
        """Tokens, as long as possible, that spell the text forced by the grammar; at most `most`.

        A guess: the model may spell it with shorter tokens.
        """
        if self.is_open and self._may_draft:
            with self._timed():
                if self._has_choice(self._matcher.copy()):
                    return []
            self._fill(self._matcher.copy())
        if not self._has_mask:
            return []
        matcher, mask_W = self._matcher.copy(), self._masks_MW[0].copy()
        found: list[int] = []
        with suppress(GrammarError):
            while len(found) < most and self._may_draft:
                token = self._longest(mask_W)
                if token is None:
                    break
                found.append(token)
                if not self._follow(matcher, token, mask_W):
                    break
        return found

    @property
    def _may_draft(self) -> bool:
        quick = self.takes_argmax if self.cost is None else self.cost <= _QUICK
        return quick and self._time.left > 0 and not self.failed

    def _has_choice(self, matcher: Matcher | ThinkingMatcher) -> bool:
        """Whether two of the probes are allowed: no text is forced, and a mask may be costly."""
        return sum(_may_follow(matcher, probe) for probe in self._probes) > 1

    def _follow(self, matcher: Matcher | ThinkingMatcher, draft: int, mask_W: Words) -> bool:
        """Computes the mask after a draft; False if the draft completes the output."""
        with self._timed():
            matcher.read(draft)
            if matcher.ended:
                return False
            matcher.fill(mask_W)
        return True

    def _longest(self, mask_W: Words) -> int | None:
        """The longest of the allowed tokens, if all others are prefixes of it."""
        if np.count_nonzero(mask_W) > _FEW:
            return None
        allowed_V = unpack_masks(mask_W[None], len(mask_W) * _WORD)[0]
        tokens: list[int] = np.flatnonzero(allowed_V).tolist()
        if len(tokens) == 1:
            return tokens[0]
        texts = [self._token_bytes[token] for token in tokens]
        longest = max(texts, key=len)
        if all(text and longest.startswith(text) for text in texts):  # a stop token has no text
            return tokens[texts.index(longest)]
        return None

    def _read_next(self) -> None:
        self._limit += TOKEN_LIMIT
        try:
            with self._timed():
                self._matcher.read(self._unread.popleft())
        except GrammarError:
            self.failed = True

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Counts the time of one mask or token. The output fails if that exceeds a limit."""
        began = self._time.clock()
        try:
            yield
        finally:
            seconds = self._time.clock() - began
            self._time.left -= seconds
            self._limit -= seconds
            self.failed |= seconds > MASK_LIMIT or self._limit < 0
            if seconds > _QUICK:
                self.num_ahead = AHEAD

    def _make_room(self, num: int) -> None:
        if num > len(self._masks_MW):
            room = np.zeros((num, self._masks_MW.shape[1]), np.uint32)
            room[0] = self._masks_MW[0]
            self._masks_MW = room


class Guides:
    """Makes the guides of one engine. Without `grammars` requests with a grammar are rejected."""

    def __init__(
        self,
        grammars: Grammars | None,
        *,
        token_bytes: Sequence[bytes],
        vocab_size: int,
        eos_ids: frozenset[int],
        may_be_open: bool = False,
    ) -> None:
        """`may_be_open`: the runner returns the logits of open rows."""
        self.mask_time = MaskTime()
        self._may_be_open = may_be_open
        self._probes = [id_ for id_, text in enumerate(token_bytes) if text in _PROBES]
        self._grammars = grammars
        self._token_bytes = token_bytes
        self._vocab_size = vocab_size
        self._free = FreeMasks(token_bytes, vocab_size=vocab_size, eos_ids=eos_ids)

    def prepare(self, request: GenerationRequest) -> None:
        """Compiles the grammar of a request. Any thread; it may take seconds."""
        if self._grammars is not None and request.grammar is not None:
            self._grammars.prepare(request.grammar)

    def make(self, request: GenerationRequest, *, tokens: Iterable[int]) -> Guide | None:
        """The guide of an output that has `tokens`; None if any token may come at any time. Raises
        BadRequest.
        """
        grammar = self._matcher(request.grammar)
        if request.thinking is not None:
            matcher: Matcher | ThinkingMatcher = self._thinking(request.thinking, grammar)
        elif grammar is not None:
            matcher = grammar
        else:
            return None
        return Guide(
            matcher,
            token_bytes=self._token_bytes,
            vocab_size=self._vocab_size,
            mask_time=self.mask_time,
            tenant=request.tenant,
            tokens=tokens,
            takes_argmax=self._may_be_open and _takes_argmax(request),
            probes=self._probes,
        )

    def _thinking(self, thinking: Thinking, grammar: Matcher | None) -> ThinkingMatcher:
        try:
            return ThinkingMatcher(thinking, grammar, self._free)
        except ValueError:
            message = "this engine does not know the model's format of thinking"
            raise BadRequest(message, code="version_mismatch") from None

    def _matcher(self, grammar: str | None) -> Matcher | None:
        if grammar is None:
            return None
        if self._grammars is None:
            raise BadRequest("this engine has no grammars", code="grammar_failed")
        try:
            return self._grammars.matcher(grammar)
        except ValueError:  # the API lets no such grammar through
            raise BadRequest("the grammar cannot be compiled", code="grammar_failed") from None


def _takes_argmax(request: GenerationRequest) -> bool:
    """Whether an output takes the argmax of its unmodified logits, and those are not reported."""
    params = request.sampling
    adjusted = params.penalises or params.logit_bias or params.banned or request.min_tokens
    scored = params.top_logprobs is not None or request.thinking is not None
    return params.temperature == 0 and not (adjusted or scored)


def _may_follow(matcher: Matcher | ThinkingMatcher, token: int) -> bool:
    return matcher.num_allowed((token,)) == 1


def _nearest(logits_V: Floats, token: int) -> list[int]:
    """The tokens after the argmax by falling logits, the lower id first among equals: some of those
    near it.
    """
    near = np.flatnonzero(logits_V > logits_V[token] - _NEAR)
    if len(near) > 2 * _TRIES:  # few are sorted, without equals of the first that is dropped
        logits = logits_V[near]
        near = near[logits > -np.partition(-logits, _TRIES + 1)[_TRIES + 1]]
    order = np.argsort(-logits_V[near], kind="stable")
    ranked: list[int] = near[order[1 : 1 + _TRIES]].tolist()
    return ranked


def _allows(mask_W: Words, token: int) -> bool:
    return bool(mask_W[token // _WORD] >> np.uint32(token % _WORD) & np.uint32(1))
