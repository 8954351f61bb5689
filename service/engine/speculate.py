"""Speculative decoding by lookup: drafts are copied from earlier tokens of the sequence, or from
the text that the client predicts (see `predicted`).

A text that repeats its prompt or itself (a quotation, an edit of a file, a summary's names) often
continues as before: the tokens that followed an earlier occurrence of its last few tokens are the
*drafts*. A step computes them after the last token, and each of its rows samples what ordinary
decoding would have sampled there.

    computed     last token | draft 1 | draft 2 | draft 3
    sampled         draft 1 | draft 2 |    x    |  (discarded: follows a rejected draft)
    accepted        draft 1   draft 2      x           two drafts, and one token as in any step

With exact arithmetic a row does not depend on the number of rows, so the output is bit by bit that
of decoding token by token. `may_speculate` decides which runners qualify.

With a grammar, forbidden tokens are not proposed; if the grammar forces the next text (a key of an
object, the rest of a constant), the longest tokens that spell it are the drafts.

Rows are nearly free while a step is bound by memory, and cost their full price once it is bound by
compute. `Speculator` weighs the expected number of accepted drafts, by the acceptance rate of
matches of that length in this sequence, against the durations predicted by the cost model.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from math import log

from service.engine.cost import CostModel, StepWork
from service.engine.plan import EngineConfig, Plan
from service.engine.predicted import PredictedText
from service.engine.sequence import Sequence

_LONGEST = 8  # tokens compared backwards
_CANDIDATES = 4  # earlier places looked at, the latest first
_GRADE_OF = (0, 0, 0, 1, 2, 2, 2, 2, 3)  # length of a match -> grade
_SPELLED = 4  # the grade of text that the grammar forces
_PREDICTED = 5  # the grade of the client's prediction
_PRIOR = (0.25, 0.4, 0.6, 0.8, 0.8, 0.8)  # by grade: the chance that a draft is accepted
_MOST_SPELLED = 8  # drafts of that grade in a step: each costs a mask first
_PRIOR_TRIALS = 2.0  # drafts that the prior counts for
_DECAY = 0.75  # of a grade's record with each use
_SKIP_DECAY = 0.985  # and with each time it is skipped: so it is tried again
_MAX_CHANCE = 0.98
_FLOORS = (0.03, 0.1, 0.3, 0.6, 0.85)  # thresholds of a draft's chance; one is chosen per step
_MARGIN = 1.03  # least expected speed-up


def may_speculate(config: EngineConfig, *, exact: bool, overlapped: bool) -> bool:
    """Whether a runner supports drafts without any effect on its outputs.

    Drafts change the shape of steps, so a runner whose rounding depends on the shape does not
    qualify. A runner with overlapped steps samples once per sequence, from state by batch slot.
    """
    return config.speculate and exact and not overlapped


def accepted(drafts: Tokens[int], sampled: Tokens[int]) -> int:
    """Number of valid sampled tokens: those up to and including the first that is not its draft."""
    for index, draft in enumerate(drafts):
        if sampled[index] != draft:
            return index + 1
    return len(drafts) + 1


class Lookup:
    """Finds earlier occurrences of the last tokens of one sequence. Reads each token once.

    A dictionary maps each pair of tokens to its latest position, and a list each position to the
    previous one of the same pair (itself if there is none). Matches are compared backwards.
    """

    def __init__(self) -> None:
        self._latest: dict[int, int] = {}  # pair -> position of its second token
        self._before: list[int] = [0]  # by position

    def find(self, tokens: Tokens[int]) -> tuple[int, int]:
        """(position, length) of the longest earlier match of the last tokens: its last position and
        its number of tokens. The latest of equally long ones; length 0 if not even two match.
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
    """Number of equal tokens, backwards from `place` and from `last`; at most `_LONGEST`."""
    length = 0
    most = min(_LONGEST, place + 1)
    while length < most and tokens[place - length] == tokens[last - length]:
        length += 1
    return length


def _continuation(tokens: list[int], place: int, num: int) -> list[int]:
    """The `num` tokens after `place`, repeated periodically beyond the end."""
    after = tokens[place + 1 : place + 1 + num]
    return (after * -(-num // len(after)))[:num]


@dataclass(slots=True)
class _Track:
    """State of one sequence: its lookup, and the acceptance record per grade."""

    predicted: PredictedText | None = None
    lookup: Lookup = field(default_factory=Lookup)
    hits: list[float] = field(default_factory=lambda: [0.0] * len(_PRIOR))
    trials: list[float] = field(default_factory=lambda: [0.0] * len(_PRIOR))
    grade: int = 0  # of the drafts in flight

    def chance(self, grade: int) -> float:
        hits = self.hits[grade] + _PRIOR_TRIALS * _PRIOR[grade]
        return min(_MAX_CHANCE, hits / (self.trials[grade] + _PRIOR_TRIALS))

    def learn(self, num: int, hits: int) -> None:
        """Of `num` drafts the first `hits` were accepted. Later drafts than the
        first rejected one do not count.
        """
        grade = self.grade
        self.hits[grade] = _DECAY * self.hits[grade] + hits
        self.trials[grade] = _DECAY * self.trials[grade] + min(num, hits + 1)

    def skip(self, grade: int) -> None:
        self.hits[grade] *= _SKIP_DECAY
        self.trials[grade] *= _SKIP_DECAY


def _find(sequence: Sequence, track: _Track, most: int) -> tuple[list[int], int]:
    """Drafts, possibly none, and their grade. A prediction that the output follows comes first, as
    long as it is not worse than the sequence's own tokens.
    """
    place, length = track.lookup.find(sequence.tokens)
    grade = _GRADE_OF[length]
    if track.predicted is not None:
        drafts = track.predicted.drafts(sequence.tokens, sequence.num_prompt, most)
        if drafts and (not length or track.chance(_PREDICTED) >= track.chance(grade)):
            return drafts, _PREDICTED
    return (_continuation(sequence.tokens, place, most) if length else []), grade


@dataclass(slots=True)
class _Candidate:
    """A sequence with possible drafts."""

    sequence: Sequence
    track: _Track
    drafts: list[int]
    grade: int
    chance: float

    def num_drafts(self, floor: float) -> int:
        """Number of leading drafts that are all accepted with a chance of at least `floor`."""
        return min(len(self.drafts), int(log(floor) / log(self.chance)))

    def gain(self, num: int) -> float:
        """Expected number of accepted drafts: chance + chance ** 2 + ..."""
        return self.chance * (1 - self.chance**num) / (1 - self.chance)


class Speculator:
    """Proposes drafts for the steps of one engine."""

    def __init__(self, config: EngineConfig, cost: CostModel) -> None:
        self._config = config
        self._cost = cost
        self._tracks: dict[Sequence, _Track] = {}

    def propose(self, plan: Plan) -> dict[Sequence, list[int]]:
        """Drafts for sequences of a plan that computes one token per sequence."""
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
                candidate.track.skip(candidate.grade)
        return drafts

    def learn(self, sequence: Sequence, *, num: int, hits: int) -> None:
        """Records that of `num` drafts the first `hits` were accepted."""
        self._tracks[sequence].learn(num, hits)

    def forget(self, sequence: Sequence) -> None:
        """Drops the state of a finished sequence."""
        self._tracks.pop(sequence, None)

    def _candidate(self, sequence: Sequence) -> _Candidate | None:
        most = min(self._config.max_drafts, sequence.num_remaining - 1)
        if most < 1:
            return None
        track = self._tracks.get(sequence)
        if track is None:
            prediction = sequence.request.prediction
            track = _Track(PredictedText(prediction) if prediction else None)
            self._tracks[sequence] = track
        guide = sequence.guide
        if guide is not None and (spelled := guide.forced(min(most, _MOST_SPELLED))):
            return _Candidate(sequence, track, spelled, _SPELLED, track.chance(_SPELLED))
        drafts, grade = _find(sequence, track, most)
        if guide is not None and drafts:
            drafts = drafts[: guide.num_allowed(drafts)]
        if not drafts:
            return None
        return _Candidate(sequence, track, drafts, grade, track.chance(grade))

    def _weigh(self, work: StepWork, candidates: list[_Candidate], seconds: float) -> list[int]:
        """Number of drafts per candidate with the best expected rate of tokens per second; all 0 if
        no drafts are the best.
        """
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
