"""Shapes: how many users there are at a moment of a load test. Knows nothing of who runs them."""

from __future__ import annotations

from enum import StrEnum

STEPS = 4
CALM = 4  # a spike has this many times the users of its calm


class Shape(StrEnum):
    """STEADY: all from the start. STEP: a quarter more in each quarter. SPIKE: all in the middle
    third, a quarter of them before and after.
    """

    STEADY = "steady"
    STEP = "step"
    SPIKE = "spike"


def users_at(shape: Shape, second: float, *, most: int, seconds: float) -> int | None:
    """Users at a second of a test that lasts `seconds`; at least 1. None when it is over."""
    if second >= seconds:
        return None
    match shape:
        case Shape.STEADY:
            return most
        case Shape.STEP:
            return max(1, most * (1 + int(STEPS * second / seconds)) // STEPS)
        case Shape.SPIKE:
            in_the_middle = seconds / 3 <= second < seconds * 2 / 3
            return most if in_the_middle else max(1, most // CALM)
