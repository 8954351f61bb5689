"""CostModel: predicts how long a step takes, learnt from earlier steps.

    seconds = a + b * tokens + c * sum(q * kv) + d * sum(kv) + e * sampled

over the sequences of a step: q tokens computed, kv tokens attended to at its end. Steps are grouped
into *regimes* by powers of two of their tokens. Each regime decays only with steps of its own, so
an hour of decoding does not erase what a chunk of 512 costs. One least-squares fit over all
regimes, by relative error and without negative coefficients, gives the line; a factor per regime
covers what a line cannot follow (a full tile of a multiplier, the end of a fast path).

Other work on the machine makes steps longer, never shorter. Because errors are relative to a step's
own duration, a step that stalled sixtyfold has a sixtieth of the weight of an ordinary one, so
outliers need no rule of their own, not even among the first steps.

The line is a median: half of the steps take longer. To stay *under* a limit, divide it by
`reserve`, which follows the durations of steps with prompts relative to their prediction. Decisions
based on these figures (chunk sizes, drafts) never change an output.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_DECAY = 0.9  # of a regime's sums per step of its own: about its last ten steps count
_FIT_EVERY = 8  # steps between fits; a regime with fewer steps causes one with each
# Scales of the features. If the steps seen do not separate two features, the time is attributed
# to the one with the larger values: to the constant first, to attention last.
_SCALES = (3.0, 1 / 64, 1 / 655360, 1 / 81920, 1 / 16)
_RIDGE = 1e-6  # of the least-squares fit, relative to the constant's weight
_PRIOR_STEPS = 2.0  # steps that count for a regime's factor being 1

_FIRST_MARGIN = 0.14  # of the reserve, before a step with a prompt was seen
_LEAST_MARGIN = 0.02  # without noise
_MOST_MARGIN = 0.4  # with more noise, smaller chunks would cost more than they save
_RARE = 0.01  # fraction of the steps that may take longer than planned
_GROWTH = 1.3  # of the margin, with each step that does
_STALL = 2.0  # times the prediction: a stall, which no smaller chunk would have avoided

_Features = tuple[float, float, float, float, float]
_Floats = npt.NDArray[np.float64]


class StepWork(NamedTuple):
    """What a step computes, as far as its duration depends on it."""

    tokens: int = 0
    products: int = 0  # sum over sequences of q * kv
    contexts: int = 0  # sum over sequences of kv
    sampled: int = 0  # rows that sample a token

    def plus(self, num: int, *, computed: int, sampled: int) -> StepWork:
        """With `num` more tokens of a sequence that has `computed` tokens stored."""
        context = computed + num
        return StepWork(
            self.tokens + num,
            self.products + num * context,
            self.contexts + context,
            self.sampled + sampled,
        )

    def drafted(self, num: int, *, context: int) -> StepWork:
        """With `num` drafts after the last token, at position `context` - 1, of a sequence."""
        return StepWork(
            self.tokens + num,
            self.products + (num + 1) * (num + context) - context,
            self.contexts + num,
            self.sampled + num,
        )


@dataclass(slots=True)
class _Regime:
    """Second moments of the steps of one kind: features and duration, divided by the duration."""

    count: int = 0
    factor: float = 1.0
    moments: _Floats = field(default_factory=lambda: np.zeros((6, 6)))  # the duration is last

    def add(self, features: _Features, seconds: float) -> None:
        self.count += 1
        row = np.array((*features, seconds)) / seconds
        self.moments *= _DECAY
        self.moments += row[:, None] * row


class CostModel:
    """Observed and predicted durations of steps. Used from one thread."""

    def __init__(self) -> None:
        self._regimes: dict[int, _Regime] = {}
        self._weights: _Features = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._unfitted = 0  # steps since the last fit
        self._margin = _FIRST_MARGIN

    @property
    def reserve(self) -> float:
        """Factor by which at most about 1 % of the steps with a prompt exceed their prediction."""
        return 1 + min(_MOST_MARGIN, self._margin)

    @property
    def ready(self) -> bool:
        """Whether steps of different sizes were seen; without them there are no predictions."""
        return len(self._regimes) > 1

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learns from a step. Ignores durations that a coarse clock reports as 0."""
        if seconds <= 0:
            return
        if self.ready and 0 < work.sampled < work.tokens:
            self._adapt_margin(seconds / self._predict(work))
        regime = self._regimes.setdefault(_kind(work), _Regime())
        regime.add(_features(work), seconds)
        self._unfitted += 1
        if self._unfitted >= _FIT_EVERY or regime.count < _FIT_EVERY:
            self._fit()

    def seconds(self, work: StepWork) -> float | None:
        """Predicted duration of a step; None before the model is `ready`."""
        return self._predict(work) if self.ready else None

    def has_seen(self, work: StepWork) -> bool:
        """Whether steps of about as many tokens were observed, so that the prediction is good."""
        return _kind(work) in self._regimes

    def chunk(self, work: StepWork, *, computed: int, most: int, limit: float) -> int | None:
        """The most tokens, up to `most`, that a sequence may add to `work` within `limit` seconds.

        None before the model is `ready`.
        """
        if not self.ready:
            return None
        low, high = 0, most  # low fits (0 is assumed to), high + 1 does not
        while low < high:
            middle = (low + high + 1) // 2
            if self._predict(work.plus(middle, computed=computed, sampled=0)) <= limit:
                low = middle
            else:
                high = middle - 1
        return low

    def _adapt_margin(self, ratio: float) -> None:
        """Follows the quantile of `ratio` (duration to prediction) that `_RARE` steps exceed."""
        if ratio < _STALL:
            grown = _GROWTH if ratio > self.reserve else _GROWTH**-_RARE
            self._margin = min(_GROWTH * _MOST_MARGIN, max(_LEAST_MARGIN, self._margin * grown))

    def _predict(self, work: StepWork) -> float:
        regime = self._regimes.get(_kind(work))
        a, b, c, d, e = self._weights
        one, tokens, products, contexts, sampled = _features(work)
        line = a * one + b * tokens + c * products + d * contexts + e * sampled
        return line if regime is None else regime.factor * line

    def _fit(self) -> None:
        """Solves for the coefficients, then for each regime's factor."""
        self._unfitted = 0
        regimes = self._regimes.values()
        moments = np.sum([regime.moments for regime in regimes], axis=0)
        weights = _solve_positive(moments[:5, :5], moments[:5, 5])
        for regime in regimes:
            # Sums of 1 and of predicted / observed, both weighted by 1 / observed.
            predicted = max(float(regime.moments[0, :5] @ weights), 1e-12)
            ratio = float(regime.moments[0, 5]) / predicted
            regime.factor = (_PRIOR_STEPS + regime.count * ratio) / (_PRIOR_STEPS + regime.count)
        a, b, c, d, e = weights.tolist()
        self._weights = a, b, c, d, e


def _kind(work: StepWork) -> int:
    """0 for one token, 1 for two, 2 up to four, 3 up to eight and so on."""
    return (work.tokens - 1).bit_length()


def _features(work: StepWork) -> _Features:
    one, tokens, products, contexts, sampled = _SCALES
    return (
        one,
        work.tokens * tokens,
        work.products * products,
        work.contexts * contexts,
        work.sampled * sampled,
    )


def _solve_positive(matrix: _Floats, targets: _Floats) -> _Floats:
    """Least squares without negative coefficients: drops the most negative one and solves again."""
    matrix = matrix + _RIDGE * matrix[0, 0] * np.eye(len(targets))
    solution = np.linalg.solve(matrix, targets)
    kept = np.arange(len(targets))
    while solution.min() < 0 and len(kept) > 1:
        kept = np.delete(kept, solution.argmin())
        solution = np.linalg.solve(matrix[np.ix_(kept, kept)], targets[kept])
    weights = np.zeros(len(targets))
    weights[kept] = np.maximum(solution, 0.0)
    return weights
