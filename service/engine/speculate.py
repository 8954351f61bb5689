"""Speculation by prompt look-up: what comes next, guessed from what the sequence already said.

A text that repeats its prompt or itself (a quotation, an edit of a file, a summary's names) goes on
as it did before: the tokens that once followed its last few ones are *drafts*. A step computes them
behind the last token, and each of its rows samples what ordinary decoding would have sampled there.

    computed     last token | draft 1 | draft 2 | draft 3
    sampled         draft 1 | draft 2 |    x    |  (of a text that is not)
    accepted        draft 1   draft 2      x           two drafts, and a token as in any step

Rows with exact arithmetic do not depend on the number of rows, so the answer is bit by bit that of
decoding token by token. `may_speculate` is the rule for who may.

With a grammar, what it forbids is not guessed; and where it says what must come next (a key of an
object, the rest of a constant), the longest tokens that spell it are the drafts.

Whether it pays is a matter of time: rows are nearly free while a step waits for memory, and cost
their full price once it waits for multipliers. `Speculator` weighs the tokens it may expect, by how
often drafts of a match that long came true in this sequence, against the cost model's durations.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from math import log

from service.engine.cost import CostModel, StepWork
from service.engine.plan import EngineConfig, Plan
from service.engine.sequence import Sequence

_LONGEST = 8  # tokens compared backwards
_CANDIDATES = 4  # earlier places looked at, the latest first
_GRADE_OF = (0, 0, 0, 1, 2, 2, 2, 2, 3)  # length of a match -> grade
_SPELLED = 4  # the grade of what a grammar leaves no choice but how to spell
_PRIOR = (0.25, 0.4, 0.6, 0.8, 0.8)  # by grade: the chance that a draft comes true
_MOST_SPELLED = 8  # drafts of that grade in a step: each costs a mask before it is known to pay
_PRIOR_TRIALS = 2.0
_MEMORY = 0.75  # what the record of a grade keeps at each try
_MERCY = 0.985  # and at each time that it was not tried: it gets another chance
_SURE = 0.98  # no chance is taken to be greater
_FLOORS = (0.03, 0.1, 0.3, 0.6, 0.85)  # a draft must be this likely to be computed; one is chosen
_MARGIN = 1.03  # what it must promise to be tried


def may_speculate(config: EngineConfig, *, exact: bool, overlapped: bool) -> bool:
    """Whether drafts cannot change an answer of a runner.

    They change the shape of steps, so one that rounds by shape must not see them. One whose steps
    overlap samples once a sequence, from state that it keeps by seat.
    """
    return config.speculate and exact and not overlapped


def accepted(drafts: Tokens[int], sampled: Tokens[int]) -> int:
    """How many of the sampled tokens hold: up to and with the first that is not its draft."""
    for index, draft in enumerate(drafts):
        if sampled[index] != draft:
            return index + 1
    return len(drafts) + 1


class Lookup:
    """Where the tokens of one sequence stood before. Reads each token once.

    Pairs of tokens are found by a dictionary; each place knows the one before it with the same pair
    (itself, where there is none), and matches are compared backwards from there.
    """

    def __init__(self) -> None:
        self._latest: dict[int, int] = {}  # pair -> position of its second token
        self._before: list[int] = [0]  # by position

    def find(self, tokens: Tokens[int]) -> tuple[int, int]:
        """(position, length): where the longest end of `tokens` that came before ended then.

        Of equally long ones the latest; length 0 where not even the last two came before.
        """
        self._read(tokens)
        best, longest = 0, 0
        last = place = len(tokens) - 1
        for _ in range(_CANDIDATES):
            if self._before[place] == place:
                break
            place = self._before[place]
            length = _match(tokens, place, last)
            if length > longest:
                best, longest = place, length
                if length == _LONGEST:
                    break
        return best, longest

    def _read(self, tokens: Tokens[int]) -> None:
        latest, before = self._latest, self._before
        for position in range(len(before), len(tokens)):
            pair = tokens[position - 1] << 32 | tokens[position]
            before.append(latest.get(pair, position))
            latest[pair] = position


def _match(tokens: Tokens[int], place: int, last: int) -> int:
    """How many tokens up to and with `place` equal those up to `last`, at most `_LONGEST`."""
    length = 0
    most = min(_LONGEST, place + 1)
    while length < most and tokens[place - length] == tokens[last - length]:
        length += 1
    return length


def _continuation(tokens: list[int], place: int, num: int) -> list[int]:
    """The `num` tokens after `place`; a repetition that reaches the end goes on in its period."""
    after = tokens[place + 1 : place + 1 + num]
    return (after * -(-num // len(after)))[:num]


@dataclass(slots=True)
class _Track:
    """What is known of one sequence: its look-up, and per grade how its drafts did."""

    lookup: Lookup = field(default_factory=Lookup)
    hits: list[float] = field(default_factory=lambda: [0.0] * len(_PRIOR))
    trials: list[float] = field(default_factory=lambda: [0.0] * len(_PRIOR))
    grade: int = 0  # of the drafts under way

    def chance(self, grade: int) -> float:
        hits = self.hits[grade] + _PRIOR_TRIALS * _PRIOR[grade]
        return min(_SURE, hits / (self.trials[grade] + _PRIOR_TRIALS))

    def learn(self, num: int, hits: int) -> None:
        """Of `num` drafts the first `hits` came true; what follows a false one tells nothing."""
        grade = self.grade
        self.hits[grade] = _MEMORY * self.hits[grade] + hits
        self.trials[grade] = _MEMORY * self.trials[grade] + min(num, hits + 1)

    def pass_over(self, grade: int) -> None:
        self.hits[grade] *= _MERCY
        self.trials[grade] *= _MERCY


@dataclass(slots=True)
class _Candidate:
    """A sequence that has something to copy."""

    sequence: Sequence
    track: _Track
    drafts: list[int]
    grade: int
    chance: float

    def num_drafts(self, floor: float) -> int:
        """How many come true with a chance of at least `floor`, one after another."""
        return min(len(self.drafts), int(log(floor) / log(self.chance)))

    def gain(self, num: int) -> float:
        """Tokens to expect of that many drafts: chance + chance ** 2 + ..."""
        return self.chance * (1 - self.chance**num) / (1 - self.chance)


class Speculator:
    """Proposes drafts for the steps of one engine."""

    def __init__(self, config: EngineConfig, cost: CostModel) -> None:
        self._config = config
        self._cost = cost
        self._tracks: dict[Sequence, _Track] = {}

    def propose(self, plan: Plan) -> dict[Sequence, list[int]]:
        """Drafts for sequences of a plan that computes one token of each."""
        base = self._cost.seconds(plan.work)
        if base is None:
            return {}
        candidates = [
            candidate for sequence in plan.tokens if (candidate := self._candidate(sequence))
        ]
        nums = self._weigh(plan.work, candidates, base)
        drafts: dict[Sequence, list[int]] = {}
        for candidate, num in zip(candidates, nums, strict=True):
            if num:
                sequence = candidate.sequence
                candidate.track.grade = candidate.grade
                drafts[sequence] = candidate.drafts[:num]
            else:
                candidate.track.pass_over(candidate.grade)
        return drafts

    def learn(self, sequence: Sequence, *, num: int, hits: int) -> None:
        """Says that of `num` drafts the first `hits` came true."""
        self._tracks[sequence].learn(num, hits)

    def forget(self, sequence: Sequence) -> None:
        """The sequence is over."""
        self._tracks.pop(sequence, None)

    def _candidate(self, sequence: Sequence) -> _Candidate | None:
        most = min(self._config.max_drafts, sequence.num_remaining - 1)
        if most < 1:
            return None
        track = self._tracks.get(sequence)
        if track is None:
            track = self._tracks[sequence] = _Track()
        guide = sequence.guide
        if guide is not None and (spelled := guide.forced(min(most, _MOST_SPELLED))):
            return _Candidate(sequence, track, spelled, _SPELLED, track.chance(_SPELLED))
        place, length = track.lookup.find(sequence.tokens)
        if not length:
            return None
        drafts = _continuation(sequence.tokens, place, most)
        if guide is not None:
            drafts = drafts[: guide.num_allowed(drafts)]
        if not drafts:
            return None
        grade = _GRADE_OF[length]
        return _Candidate(sequence, track, drafts, grade, track.chance(grade))

    def _weigh(self, work: StepWork, candidates: list[_Candidate], seconds: float) -> list[int]:
        """How many drafts of each promise the most tokens a second; 0 where none promise more."""
        best = [0] * len(candidates)
        best_rate = _MARGIN * work.sampled / seconds
        for floor in _FLOORS if candidates else ():
            nums = [candidate.num_drafts(floor) for candidate in candidates]
            gain, more = float(work.sampled), work
            for candidate, num in zip(candidates, nums, strict=True):
                if num:
                    gain += candidate.gain(num)
                    more = more.drafted(num, context=candidate.sequence.num_tokens)
            if more.tokens > self._config.max_batch_tokens:
                continue
            duration = self._cost.seconds(more)
            if duration is not None and gain > best_rate * duration:
                best, best_rate = nums, gain / duration
        return best
