"""Pairs to train a translator with: English dates and numbers, and their ISO forms.

    python -m loadtest.dates --write pairs.csv
    python -m loadtest.dates --ask http://127.0.0.1:8000 --model iso

Numbers have four to six digits: there are too few shorter ones to learn their ends from. With
`--chats` the pairs are questions and answers, for a decoder. `--ask` counts the exact answers of a
server to texts that are not among the pairs.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from datetime import date, timedelta
from pathlib import Path

import httpx

_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]  # fmt: skip
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


def question(source: str) -> list[dict[str, str]]:
    """A text as a chat."""
    return [{"role": "user", "content": source}]


def answer(url: str, model: str, source: str, *, chat: bool) -> str:
    """What a model makes of a text, greedily."""
    asked = {"messages": question(source)} if chat else {"prompt": source}
    body = {"model": model, "temperature": 0, "max_tokens": 16, **asked}
    address = f"{url}/v1/{'chat/completions' if chat else 'completions'}"
    (choice,) = httpx.post(address, json=body, timeout=60).raise_for_status().json()["choices"]
    return str(choice["message"]["content"] if chat else choice["text"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chats", action="store_true", help="JSONL of chats, for a decoder")
    parser.add_argument("--write", type=Path, help="file to write")
    parser.add_argument("--ask", help="server to ask for 200 other texts")
    parser.add_argument("--model", help="its model")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    pairs = dict(pair(draw) for _ in range(options.count))
    if options.write is not None:
        with options.write.open("w", encoding="utf-8", newline="") as file:
            if options.chats:
                for source, target in pairs.items():
                    chat = [*question(source), {"role": "assistant", "content": target}]
                    file.write(json.dumps({"messages": chat}) + "\n")
            else:
                csv.writer(file).writerows([("source", "target"), *pairs.items()])
    if options.ask is not None:
        others = [each for each in (pair(draw) for _ in range(2000)) if each[0] not in pairs][:200]
        exact = sum(
            answer(options.ask, options.model, source, chat=options.chats).strip() == target
            for source, target in others
        )
        print(f"{exact} of {len(others)} answers are exact")


if __name__ == "__main__":
    main()
