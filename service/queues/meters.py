"""Meters: how much of its minute a key has used. The words of it; each queue keeps its own numbers.

A meter is one number: the time at which all that was used is given back, at the steady rate of
`limit` units a minute (GCRA, the leaky bucket of ATM networks). What is used now is the distance to
that time: a minute's limit may come at once after a minute of rest, and nothing is ever counted
down. A meter whose time is over says what no meter says, so it may be dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

MINUTE = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """One limit a minute of a key. `used` is in seconds at its rate; over 60 is debt."""

    limit: int
    used: float

    @property
    def remaining(self) -> int:
        """Units that may be used at once."""
        # Sums of fractions of a minute do not come out even: a millionth of a unit is none.
        return max(0, int(self.limit * (1 - self.used / MINUTE) + 1e-6))

    @property
    def reset(self) -> float:
        """Seconds until all of the limit is there again."""
        return self.used


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Where a key stands: `requests` after a call, `tokens` after a submission; None if it has no
    such limit.

    `wait` is how many seconds a refused one must wait. One over a minute's limit never fits.
    """

    requests: Meter | None = None
    tokens: Meter | None = None
    wait: float = 0.0
