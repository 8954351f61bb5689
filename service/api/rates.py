"""Rates: where a key stands in its minute, in the headers that OpenAI's clients look for, and the
refusal of what is over it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from service.errors import RateLimited
from service.queues.admission import Meter, Usage


def rate_headers(usage: Usage | None) -> list[tuple[bytes, bytes]]:
    """Limit, what is left of it and when all of it is back, for each limit that the key has."""
    if usage is None:
        return []
    return [*_of_meter("requests", usage.requests), *_of_meter("tokens", usage.tokens)]


def over_rate(usage: Usage) -> RateLimited:
    """The refusal of a call or a submission that has to wait."""
    limits = [
        f"{meter.limit} {unit} a minute"
        for unit, meter in (("requests", usage.requests), ("tokens", usage.tokens))
        if meter is not None
    ]
    return RateLimited(f"this key has {' and '.join(limits)}", retry_after=usage.wait)


def with_tokens(charged: Usage | None, submitted: Usage) -> Usage:
    """Where a key stands after its submission: requests are counted before it, tokens by it."""
    return submitted if charged is None else replace(charged, tokens=submitted.tokens)


def _of_meter(unit: str, meter: Meter | None) -> list[tuple[bytes, bytes]]:
    if meter is None:
        return []
    values = {"limit": meter.limit, "remaining": meter.remaining, "reset": _span(meter.reset)}
    return [
        (f"x-ratelimit-{name}-{unit}".encode(), str(value).encode())
        for name, value in values.items()
    ]


def _span(seconds: float) -> str:
    """As OpenAI writes it: `820ms`, `7.25s`, `2m4.5s`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"
