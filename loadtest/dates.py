"""Pairs to train a translator with: English dates and numbers, and their ISO forms.

    python -m loadtest.dates --write pairs.csv

Numbers have four to six digits: there are too few shorter ones to learn their ends from.
"""

from __future__ import annotations

import argparse
import csv
import random
from datetime import date, timedelta
from pathlib import Path

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_FIRST, _DAYS = date(1900, 1, 1), 73_000  # to 2099


def in_words(number: int) -> str:
    """A number below a million in English."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        ten, one = _TENS[number // 10 - 2], number % 10
        return f"{ten}-{_ONES[one]}" if one else ten
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    front = f"{in_words(number // unit)} {name}"
    rest = number % unit
    joint = " and " if rest < 100 else " "
    return f"{front}{joint}{in_words(rest)}" if rest else front


def ordinal(day: int) -> str:
    """1st, 2nd, 3rd, 4th, ..."""
    ending = "th" if 10 < day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def pair(draw: random.Random) -> tuple[str, str]:
    """A text and its ISO form."""
    if draw.random() < 0.5:
        number = draw.randrange(1000, 10 ** draw.randint(4, 6))
        return in_words(number), str(number)
    day = _FIRST + timedelta(days=draw.randrange(_DAYS))
    month = draw.choice([day.strftime("%B"), day.strftime("%b")])
    shown = draw.choice([str(day.day), ordinal(day.day)])
    texts = (
        f"{month} {shown}, {day.year}",
        f"{shown} {month} {day.year}",
        f"{day.strftime('%A')}, {month} {shown}, {day.year}",
        f"the {ordinal(day.day)} of {month}, {day.year}",
    )
    return draw.choice(texts), day.isoformat()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--write", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    pairs = dict(pair(draw) for _ in range(options.count))
    with options.write.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("source", "target"))
        writer.writerows(pairs.items())


if __name__ == "__main__":
    main()
