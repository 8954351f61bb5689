"""CostModel: how long a step will take, learnt from the steps before. Floats only, no NumPy.

    seconds = a + b * tokens + c * sum(q * kv) + d * sum(kv) + e * sampled

over the sequences of a step: q tokens computed, kv tokens attended to at its end. Steps are sorted
into *regimes* by powers of two of their tokens, and each forgets only by steps of its own kind: an
hour of decoding does not wash out what a chunk of 512 costs. All regimes are fitted together, each
step by its relative error, without negative coefficients; what a straight line cannot follow (the
tile of a multiplier is full, a fast path ends) stays as a factor of the regime.

Other work on the machine makes steps longer, never shorter. Relative to its own duration, a step
that stalled sixtyfold pulls at the fit with a sixtieth of the strength of an ordinary one, so that
outliers need no rule of their own, not even where they come first.

The line goes through the middle: half of the steps take longer. Who wants to stay *under* a limit
plans with the `reserve`, which follows from how far steps with prompts exceeded what was expected
of them. What is decided with these figures (chunks, drafts) never changes an answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple

_MEMORY = 0.9  # what a regime keeps of its past at each of its steps: about ten of them count
_FIT_EVERY = 8  # steps; each one while a regime is young
# By feature: what no step told apart goes to the constant first, to attention last.
_RIDGE = (1e-6, 1e-5, 1e-3, 1e-3, 1e-5)
_SHRINK = 2.0  # steps that a regime's factor 1 is worth
_UNITS = (1.0, 1 / 64, 1 / 65536, 1 / 8192, 1 / 16)  # bring the features to about 1
_FEATURES = len(_UNITS)

_RECORD = 0.98  # what the record of excesses keeps at each step: about fifty of them count
_FIRST_EXCESS = 0.04  # taken for it before there is one
_REACH = 3.5  # in root mean squares of the excess; where more than the rarest go beyond, it grows
_REACHES = (2.5, 5.0)
_RARE = 0.01  # of the steps may take longer than planned
_HASTE = 0.3  # by which the reach grows with each that does
_MOST_RESERVE = 1.4  # where noise is greater, smaller chunks would cost more than they spare
_STALL = 2.0  # a step that took more times what was expected: no chunk would have avoided it

_Vector = tuple[float, ...]


class StepWork(NamedTuple):
    """What a step computes, as far as its duration depends on it."""

    tokens: int = 0
    products: int = 0  # sum over sequences of q * kv
    contexts: int = 0  # sum over sequences of kv
    sampled: int = 0  # rows that choose a token

    def plus(self, num: int, *, computed: int, sampled: int) -> StepWork:
        """With `num` more tokens of a sequence that has `computed` ones stored."""
        context = computed + num
        return StepWork(
            self.tokens + num,
            self.products + num * context,
            self.contexts + context,
            self.sampled + sampled,
        )

    def drafted(self, num: int, *, context: int) -> StepWork:
        """With `num` drafts after the last token of a sequence, which stands at `context` - 1."""
        return StepWork(
            self.tokens + num,
            self.products + (num + 1) * (num + context) - context,
            self.contexts + num,
            self.sampled + num,
        )


@dataclass(slots=True)
class _Regime:
    """Sums over the steps of one kind, each step divided by its duration."""

    count: int = 0
    factor: float = 1.0
    products: list[_Vector] = field(
        default_factory=lambda: [(0.0,) * _FEATURES for _ in range(_FEATURES)]
    )
    targets: _Vector = (0.0,) * _FEATURES

    def read(self, features: _Vector) -> None:
        """One more step; its duration is 1 in these units."""
        self.count += 1
        self.products = [
            tuple([_MEMORY * old + left * right for old, right in zip(row, features, strict=True)])
            for row, left in zip(self.products, features, strict=True)
        ]
        self.targets = tuple(
            [_MEMORY * old + new for old, new in zip(self.targets, features, strict=True)]
        )


class CostModel:
    """Durations of steps: observed and expected. Used from one thread."""

    def __init__(self) -> None:
        self._regimes: dict[int, _Regime] = {}
        self._weights: _Vector = ()
        self._unfitted = 0
        self._square_excess = _FIRST_EXCESS**2  # mean, of steps that decode and carry a prompt
        self._reach = _REACH

    @property
    def reserve(self) -> float:
        """How many times its expected duration hardly any step with a chunk exceeds; at least 1."""
        return min(_MOST_RESERVE, 1 + self._reach * sqrt(self._square_excess))

    @property
    def ready(self) -> bool:
        """Whether steps of different sizes were seen: without them it does not guess."""
        return len(self._regimes) > 1

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learns from a step. Durations that a coarse clock shows as 0 teach nothing."""
        if seconds <= 0:
            return
        if self.ready and 0 < work.sampled < work.tokens:
            self._compare(seconds / self._expected(work))
        regime = self._regimes.setdefault(_kind(work), _Regime())
        regime.read(tuple([feature / seconds for feature in _features(work)]))
        self._unfitted += 1
        if self._unfitted >= _FIT_EVERY or regime.count < _FIT_EVERY:
            self._fit()

    def seconds(self, work: StepWork) -> float | None:
        """How long a step would take; None before there is an idea of it."""
        return self._expected(work) if self.ready else None

    def chunk(self, work: StepWork, *, computed: int, most: int, limit: float) -> int | None:
        """The most tokens, up to `most`, that a sequence may add to `work` within `limit` seconds.

        None before there is an idea of it.
        """
        if not self.ready:
            return None
        low, high = 0, most  # low fits (0 is taken to), high + 1 does not
        while low < high:
            middle = (low + high + 1) // 2
            if self._expected(work.plus(middle, computed=computed, sampled=0)) <= limit:
                low = middle
            else:
                high = middle - 1
        return low

    def _compare(self, ratio: float) -> None:
        """Records by how much a step exceeded what was expected; one that did not counts as 0."""
        if ratio < _STALL:
            low, high = _REACHES
            self._reach += _HASTE * ((ratio > self.reserve) - _RARE)
            self._reach = min(high, max(low, self._reach))
            square = max(0.0, ratio - 1) ** 2
            self._square_excess = _RECORD * self._square_excess + (1 - _RECORD) * square

    def _expected(self, work: StepWork) -> float:
        regime = self._regimes.get(_kind(work))
        factor = 1.0 if regime is None else regime.factor
        return factor * _line(self._weights, _features(work))

    def _fit(self) -> None:
        """Solves for the coefficients, then for each regime's factor."""
        self._unfitted = 0
        regimes = list(self._regimes.values())
        rows = [
            [sum(cells) for cells in zip(*columns, strict=True)]
            for columns in zip(*(regime.products for regime in regimes), strict=True)
        ]
        targets = [sum(cells) for cells in zip(*(r.targets for r in regimes), strict=True)]
        self._weights = _solve_positive(rows, targets)
        for regime in regimes:
            # Sums of 1 and of (expected / observed), both weighted by 1 / observed.
            ratio = regime.targets[0] / max(_line(self._weights, regime.products[0]), 1e-12)
            regime.factor = (_SHRINK + regime.count * ratio) / (_SHRINK + regime.count)


def _kind(work: StepWork) -> int:
    """0 for one token, 1 for two, 2 up to four, 3 up to eight and so on."""
    return (work.tokens - 1).bit_length()


def _features(work: StepWork) -> _Vector:
    one, tokens, products, contexts, sampled = _UNITS
    return (
        one,
        work.tokens * tokens,
        work.products * products,
        work.contexts * contexts,
        work.sampled * sampled,
    )


def _line(weights: _Vector, features: _Vector) -> float:
    return sum([weight * feature for weight, feature in zip(weights, features, strict=True)])


def _solve_positive(rows: list[list[float]], targets: list[float]) -> _Vector:
    """Least squares without negative coefficients: drops the most negative one and solves again."""
    kept = list(range(_FEATURES))
    while True:
        solved = _solve(
            [[rows[i][j] + (i == j) * _RIDGE[i] * rows[0][0] for j in kept] for i in kept],
            [targets[i] for i in kept],
        )
        least = min(solved)
        if least >= 0 or len(kept) == 1:
            break
        del kept[solved.index(least)]
    values = dict(zip(kept, solved, strict=True))
    return tuple(max(0.0, values.get(index, 0.0)) for index in range(_FEATURES))


def _solve(rows: list[list[float]], targets: list[float]) -> list[float]:
    """Gauss, for a symmetric positive definite matrix."""
    size = len(rows)
    for pivot in range(size):
        top = rows[pivot]
        for below in range(pivot + 1, size):
            ratio = rows[below][pivot] / top[pivot]
            if ratio:
                rows[below] = [
                    cell - ratio * over for cell, over in zip(rows[below], top, strict=True)
                ]
                targets[below] -= ratio * targets[pivot]
    solved = [0.0] * size
    for index in reversed(range(size)):
        rest = sum(rows[index][column] * solved[column] for column in range(index + 1, size))
        solved[index] = (targets[index] - rest) / rows[index][index]
    return solved
