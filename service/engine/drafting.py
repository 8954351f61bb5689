"""What drafts have cost and gained so far: of a sequence, and of all sequences of a tenant.

Two things are recorded by *grade*, the kind of a draft (see `speculate`).

Chance: of drafts of this grade, how many were accepted. A tenant's record is the prior of each of
its sequences, and a fixed one the prior of the tenant's. Records decay with use and, slowly, when
drafts are not tried, so that they are tried again.

Account: in tokens of ordinary decoding, what accepted drafts gained less what drafts cost, by the
measured durations of steps. It may be overdrawn by little: a fraction of a token at first, and
`INTEREST` for each token of the output. A step gets no more drafts than the account can pay for if
all are rejected, whatever the chances say, so drafts cannot cost much more than `INTEREST` of the
time: sequences for which they do not pay get one now and then.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from service.engine.lookup import LONGEST, Lookup
from service.engine.predicted import PredictedText
from service.engine.recent import RecentTexts


class Grade(IntEnum):
    """Kinds of drafts: by the tokens that match the sequence's own, or by another source."""

    OWN_2 = 0
    OWN_3 = 1
    OWN_4 = 2
    OWN_8 = 3
    SPELLED = 4  # text that the grammar forces
    PREDICTED = 5  # the client's prediction
    RECENT = 6  # recent texts of the tenant


_GRADE_OF = (  # by the length of a match
    Grade.OWN_2, Grade.OWN_2, Grade.OWN_2, Grade.OWN_3, *[Grade.OWN_4] * 4, Grade.OWN_8,
)  # fmt: skip
INTEREST = 0.004  # tokens that may be lost per output token
_PRIOR = (0.25, 0.4, 0.7, 0.95, 0.85, 0.95, 0.5)  # by grade: the chance that a draft is accepted
_OVERDRAFT = (0.2, 0.2, 0.3, 0.7, 0.7, 0.7, 0.3)  # tokens by which the account may be overdrawn
_MOST_SAVED = 12.0  # tokens: what was gained long ago is not to be lost now
_MAX_CHANCE = 0.98

_PRIOR_TRIALS = 2.0  # drafts that the tenant's record counts for in a sequence
_TENANT_PRIOR_TRIALS = 6.0  # drafts that the fixed prior counts for in a tenant
_DECAY = 0.75  # of a sequence's record of a grade with each use
_SKIP_DECAY = 0.985  # and each time it is skipped
_TENANT_DECAY = 0.95
_TENANT_SKIP_DECAY = 0.999

_SHARED_AT_ONCE = 16  # tokens: a call per token would cost more than they are worth
MOST_TENANTS = 32  # with a record and a table of texts


@dataclass(slots=True)
class _Record:
    """Hits and trials by grade."""

    hits: list[float] = field(default_factory=lambda: [0.0] * len(Grade))
    trials: list[float] = field(default_factory=lambda: [0.0] * len(Grade))

    def chance(self, grade: Grade, *, prior: float, weight: float) -> float:
        return (self.hits[grade] + weight * prior) / (self.trials[grade] + weight)

    def add(self, grade: Grade, *, trials: int, hits: int, decay: float) -> None:
        self.hits[grade] = decay * self.hits[grade] + hits
        self.trials[grade] = decay * self.trials[grade] + trials

    def fade(self, grade: Grade, decay: float) -> None:
        self.hits[grade] *= decay
        self.trials[grade] *= decay


@dataclass(slots=True)
class TenantDrafts:
    """What the sequences of one tenant share."""

    texts: RecentTexts = field(default_factory=RecentTexts)
    record: _Record = field(default_factory=_Record)

    def chance(self, grade: Grade) -> float:
        return self.record.chance(grade, prior=_PRIOR[grade], weight=_TENANT_PRIOR_TRIALS)


class Tenants:
    """The tenants that were active last."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, TenantDrafts] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tenants)

    def get(self, tenant: str) -> TenantDrafts:
        found = self._tenants.setdefault(tenant, TenantDrafts())
        self._tenants.move_to_end(tenant)
        if len(self._tenants) > MOST_TENANTS:
            self._tenants.popitem(last=False)
        return found


class Track:
    """The drafts of one sequence."""

    def __init__(self, tenant: TenantDrafts, predicted: PredictedText | None) -> None:
        self.grade = Grade.OWN_2  # of the drafts in flight
        self.gained_at: float = -math.inf  # length of the output after the last accepted draft
        self._tenant = tenant
        self._predicted = predicted
        self._lookup = Lookup()
        self._num_shared = 0  # tokens that are in the tenant's texts
        self._account = 0.0  # tokens gained, less tokens lost
        self._record = _Record()

    def sources(
        self, tokens: list[int], num_prompt: int, most: int
    ) -> Iterator[tuple[Grade, list[int]]]:
        """Possible drafts by where they come from; the first is preferred among equals."""
        if self._predicted is not None:
            yield Grade.PREDICTED, self._predicted.drafts(tokens, num_prompt, most)
        length, drafts = self._lookup.drafts(tokens, most)
        yield _GRADE_OF[length], drafts
        if length < LONGEST:
            if len(tokens) >= self._num_shared + _SHARED_AT_ONCE:
                self.share(tokens)
            yield Grade.RECENT, self._tenant.texts.drafts(tokens, most)

    def chance(self, grade: Grade) -> float:
        """The chance that a draft is accepted if those before it are."""
        prior = self._tenant.chance(grade)
        return min(_MAX_CHANCE, self._record.chance(grade, prior=prior, weight=_PRIOR_TRIALS))

    @property
    def has_gained(self) -> bool:
        return self._account > 0

    def funds(self, grade: Grade, *, num_output: int) -> float:
        """Tokens that the account can pay."""
        return max(0.0, self._account + INTEREST * num_output + _OVERDRAFT[grade])

    def most_drafts(self, grade: Grade, *, num_output: int, price: float) -> int:
        """Drafts that the account can pay for, if each costs `price` tokens."""
        return int(self.funds(grade, num_output=num_output) / price)

    def share(self, tokens: list[int]) -> None:
        """Adds new tokens to the tenant's texts."""
        self._tenant.texts.read(tokens, self._num_shared)
        self._num_shared = len(tokens)

    def learn(self, num: int, hits: int, *, at: int) -> None:
        """Of `num` drafts the first `hits` were accepted, at this length of the output. Later
        drafts than the first rejected one do not count.
        """
        if hits:
            self.gained_at = at
        trials = min(num, hits + 1)
        self._record.add(self.grade, trials=trials, hits=hits, decay=_DECAY)
        self._tenant.record.add(self.grade, trials=trials, hits=hits, decay=_TENANT_DECAY)
        self._account = min(_MOST_SAVED, self._account + hits)

    def pay(self, cost: float) -> None:
        """Charges what drafts cost, in tokens."""
        self._account -= cost

    def skip(self, grade: Grade) -> None:
        """Notes that drafts were possible and not worth trying."""
        self._record.fade(grade, _SKIP_DECAY)
        self._tenant.record.fade(grade, _TENANT_SKIP_DECAY)
