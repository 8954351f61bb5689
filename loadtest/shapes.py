"""Shapes: the number of users over the time of a load test."""

from __future__ import annotations

from enum import StrEnum

STEPS = 4
CALM = 4  # users in the spike / users before and after


class Shape(StrEnum):
    """STEADY: all users from the start. STEP: a quarter more in each quarter of the time. SPIKE:
    all users in the middle third, a quarter of them otherwise.
    """

    STEADY = "steady"
    STEP = "step"
    SPIKE = "spike"


def users_at(shape: Shape, second: float, *, most: int, seconds: float) -> int | None:
    """Users at this second of a test of `seconds`, at least 1; None after its end."""
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
