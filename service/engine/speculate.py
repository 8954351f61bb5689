"""Speculative decoding by lookup: drafts are copied from earlier tokens of the sequence (`lookup`),
from recent texts of its tenant (`recent`), or from what the client predicts (`predicted`).

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
compute. `Speculator` weighs the expected number of accepted drafts, by the acceptance rate of such
drafts so far, against the durations predicted by the cost model. What drafts really gained and cost
is counted afterwards: a sequence for which they do not pay gets none for a while (see `drafting`).

Drafts continue tokens that have been read. If the runner overlaps steps, a step with drafts is
planned when the one before has been read, and so is the step after it: meanwhile the device waits
for the host. These *pauses* are measured, weighed and charged like drafts. Whether drafts are worth
one is judged beforehand (`expects`), by the tokens that have been read: the first draft is then a
guess of the token in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from math import log
from statistics import median

from service.engine.cost import CostModel, StepWork
from service.engine.drafting import Grade, Tenants, Track
from service.engine.plan import EngineConfig, Plan
from service.engine.predicted import PredictedText
from service.engine.sequence import Sequence

# Sequences, from which on drafts of texts that their grammars force gain less than pauses cost: if
# they are sampled, and if they take the argmax, where it costs little to see that none is forced.
FEW_TO_SPELL = (4, 12)
_MOST_SPELLED = 8  # drafts of that grade in a step: each costs a mask first
_FLOORS = (0.03, 0.1, 0.3, 0.6, 0.85)  # thresholds of a draft's chance; one is chosen per step
_MARGIN = 1.08  # least expected speed-up, if such steps were seen; else they are worth a try
_PROBES = (1, 7)  # drafts per sequence: if not even these could pay, none are looked for
_DEAR = 0.25  # a price from which on looking for drafts does not pay in every step
_RARELY = 4  # steps of which one looks for drafts then, if earlier ones did not pay
_COPIES = 2  # tokens after an accepted draft, in which more drafts are likely
_LEAST_PRICE = 0.01  # tokens that a draft costs
_COST_RANGE = (0.5, 2.0)  # of the predicted cost of drafts: what is measured beyond is a stall
_PAUSES = 9  # whose median is the expected one; one that is longer than twice that is a stall


def may_speculate(config: EngineConfig, *, exact: bool) -> bool:
    """Whether a runner supports drafts without any effect on its outputs.

    Drafts change the shape of steps, so a runner whose rounding depends on the shape does not
    qualify.
    """
    return config.speculate and exact


def accepted(drafts: Tokens[int], sampled: Tokens[int]) -> int:
    """Number of valid sampled tokens: those up to and including the first that is not its draft."""
    for index, draft in enumerate(drafts):
        if sampled[index] != draft:
            return index + 1
    return len(drafts) + 1


@dataclass(slots=True)
class _Candidate:
    """A sequence with possible drafts."""

    sequence: Sequence
    track: Track
    drafts: list[int]
    grade: Grade
    chance: float
    num_guessed: int  # leading drafts that stand for tokens in flight

    def num_drafts(self, floor: float) -> int:
        """Number of leading drafts that are all accepted with a chance of at least `floor`."""
        return min(len(self.drafts), int(log(floor) / log(self.chance)))

    @property
    def most_gain(self) -> float:
        return self.gain(len(self.drafts))

    def gain(self, num: int) -> float:
        """Expected number of accepted drafts: chance + chance ** 2 + ...

        That of a token in flight is no gain.
        """
        hits = self.chance * (1 - self.chance**num) / (1 - self.chance)
        return hits - self.chance * min(num, self.num_guessed)


class Speculator:
    """Proposes drafts for the steps of one engine."""

    def __init__(
        self, config: EngineConfig, cost: CostModel, *, most_sampled: int, pauses: bool = True
    ) -> None:
        """`most_sampled`: rows of a step that may sample. `pauses`: whether a pause of the runner
        costs more than the host's work, which a CPU has to do at some time.
        """
        self._config = config
        self._cost = cost
        self._most_sampled = most_sampled
        self._tracks: dict[Sequence, Track] = {}
        self._tenants = Tenants()
        self._plain = StepWork()  # the work of the latest plan without its drafts
        self._counts_pauses = pauses
        self._pauses: deque[float] = deque(maxlen=_PAUSES)
        self._pause = 0.0  # seconds, expected: see `settle`

    def propose(self, plan: Plan) -> dict[Sequence, list[int]]:
        """Drafts for sequences of a plan that computes one token per sequence."""
        self._plain = plan.work
        if any(sequence.num_unread for sequence in plan.tokens):
            return {}
        anyway = any(sequence.chooses_by_tokens for sequence in plan.tokens)
        drafts: dict[Sequence, list[int]] = {}
        for candidate, num in self._choose(plan.work, plan.tokens, pauses_anyway=anyway):
            candidate.track.grade = candidate.grade
            drafts[candidate.sequence] = candidate.drafts[:num]
        return drafts

    def expects(self, sequences: Collection[Sequence]) -> list[Sequence]:
        """Those whose drafts will probably pay if the step in flight is read before the next plan.

        `sequences` decode; the latest plan did nothing else. None of them if drafts cannot pay.
        """
        work = self._plain
        base = self._cost.seconds(work)
        if not base:
            return []
        if not self._counts_pauses and (copying := [s for s in sequences if self._copies(s)]):
            return copying
        chosen = [candidate for candidate, _ in self._choose(work, sequences)]
        lost = self._pause / base * work.sampled  # tokens
        funds = sum(c.track.funds(c.grade, num_output=c.sequence.num_output) for c in chosen)
        return [candidate.sequence for candidate in chosen] if funds > lost else []

    def _copies(self, sequence: Sequence) -> bool:
        """Whether one of its last tokens was a draft."""
        track = self._tracks.get(sequence)
        return track is not None and sequence.num_output - track.gained_at < _COPIES

    def _choose(
        self, work: StepWork, sequences: Iterable[Sequence], *, pauses_anyway: bool = False
    ) -> list[tuple[_Candidate, int]]:
        """The sequences whose drafts are expected to pay, and how many drafts."""
        base = self._cost.seconds(work)
        if base is None or work.sampled >= self._most_sampled:
            return []
        rate = work.sampled / (base + self._pause if pauses_anyway else base)
        price = self._price(work, base, rate)
        if price is None:
            return []
        candidates = [
            candidate
            for sequence in sequences
            if (candidate := self._candidate(sequence, price=price))
        ]
        chosen = []
        for candidate, num in zip(candidates, self._weigh(work, candidates, rate), strict=True):
            if num:
                chosen.append((candidate, num))
            else:
                candidate.track.skip(candidate.grade)
        return chosen

    def learn(self, sequence: Sequence, *, num: int, hits: int) -> None:
        """Records that of `num` drafts the first `hits` were accepted."""
        self._tracks[sequence].learn(num, hits, at=sequence.num_output)

    def settle(self, plan: Plan, seconds: float, *, pause: float = 0.0) -> None:
        """Charges the sequences of a step what its drafts cost, by the step's measured duration.

        `pause`: seconds before it, in which the device waited because a step was read first.
        """
        if pause and self._counts_pauses:
            self._pauses.append(pause)
            self._pause = median(self._pauses)
            self._charge_pause(plan, min(pause, 2 * self._pause))
        if not plan.drafts:
            return
        plain, drafted = self._cost.seconds(self._plain), self._cost.seconds(plan.work)
        if not plain or not drafted:
            return
        predicted = max(0.0, drafted - plain)
        low, high = (factor * predicted for factor in _COST_RANGE)
        cost = min(max(seconds - plain, low), high)
        tokens_per_draft = cost / plain * self._plain.sampled / plan.num_drafts
        for sequence, drafts in plan.drafts.items():
            if track := self._tracks.get(sequence):
                track.pay(tokens_per_draft * len(drafts))

    def _charge_pause(self, plan: Plan, pause: float) -> None:
        """Charges those for whose drafts the step before was read first."""
        tracks = [track for sequence in plan.read_for if (track := self._tracks.get(sequence))]
        work = self._plain if plan.drafts else plan.work
        if not (plain := self._cost.seconds(work)):
            return
        for track in tracks:
            track.pay(pause / plain * work.sampled / len(tracks))

    def forget(self, sequence: Sequence) -> None:
        """Drops the state of a finished sequence; its text may be that of others to come."""
        if sequence.num_output > 1:
            self._track(sequence).share(sequence.tokens)
        self._tracks.pop(sequence, None)

    def _track(self, sequence: Sequence) -> Track:
        track = self._tracks.get(sequence)
        if track is None:
            prediction = sequence.request.prediction
            predicted = PredictedText(prediction) if prediction else None
            track = Track(self._tenants.get(sequence.tenant), predicted)
            self._tracks[sequence] = track
        return track

    def _price(self, work: StepWork, seconds: float, rate: float) -> float | None:
        """What a draft costs, in tokens of ordinary decoding; None if drafts could not pay even if
        all of them were accepted. `seconds` and `rate`, in tokens per second, without drafts.
        """
        pays, price = False, _LEAST_PRICE
        for num in _PROBES:
            more = StepWork(
                work.tokens * (1 + num),
                work.products * (1 + num),
                work.contexts + num * work.sampled,
                work.sampled * (1 + num),
            )
            duration = self._cost.seconds(more)
            if duration is not None:
                pays |= more.sampled > rate * self._margin(more) * (duration + self._pause)
                price = max(price, (duration / seconds - 1) / num)
        return price if pays else None

    def _margin(self, work: StepWork) -> float:
        return _MARGIN if self._cost.has_seen(work) else 1.0

    def _candidate(self, sequence: Sequence, *, price: float) -> _Candidate | None:
        most = min(self._config.max_drafts, sequence.num_remaining - 1)
        if most < 1:
            return None
        track, guide = self._track(sequence), sequence.guide
        waits = sequence.num_unread > 0 and self._counts_pauses
        rarely = price > _DEAR or waits  # a device's steps may be short, too
        if rarely and not track.has_gained and sequence.num_output % _RARELY:
            return None
        if guide is not None and (spelled := guide.forced(min(most, _MOST_SPELLED))):
            sources = [(Grade.SPELLED, spelled)]
        else:
            sources = list(track.sources(sequence.tokens, sequence.num_prompt, most))
        # If it costs nothing to read the token in flight: what if the guess of it is right?
        right = 0 if self._counts_pauses else sequence.num_unread
        guessed = sequence.num_unread - right
        best = None
        for grade, found in sources:
            if len(found) <= right:
                continue
            limit = track.most_drafts(grade, num_output=sequence.num_output, price=price)
            drafts = found[right : right + limit]
            if guide is not None and grade is not Grade.SPELLED and drafts:
                drafts = drafts[: guide.num_allowed(drafts)]
            if not drafts:
                track.skip(grade)
                continue
            candidate = _Candidate(sequence, track, drafts, grade, track.chance(grade), guessed)
            if best is None or candidate.most_gain > best.most_gain:
                best = candidate
        return best

    def _weigh(self, work: StepWork, candidates: list[_Candidate], rate: float) -> list[int]:
        """Number of drafts per candidate with the best expected rate of tokens per second; all 0 if
        that is `rate`, without drafts.
        """
        best, best_rate = [0] * len(candidates), rate
        for floor in _FLOORS if candidates else ():
            nums = [candidate.num_drafts(floor) for candidate in candidates]
            gain, more = float(work.sampled), work
            for candidate, num in zip(candidates, nums, strict=True):
                if num:
                    gain += candidate.gain(num)
                    more = more.drafted(num, context=candidate.sequence.num_tokens)
            if more.tokens > self._config.max_batch_tokens or more.sampled > self._most_sampled:
                continue
            duration = self._cost.seconds(more)
            if duration is None:
                continue
            duration += self._pause
            if gain > max(best_rate, rate * self._margin(more)) * duration:
                best, best_rate = nums, gain / duration
        return best
