"""Workloads: seeded prompts and arrivals, the same for every server that is compared.

The prompts are text, because not every server takes token ids. Their words are common enough that
byte-level BPE vocabularies have them whole: a prompt of n words has n tokens of the default model.
What a server counted stands in the results beside it.
"""

from __future__ import annotations

import random

_WORDS = tuple(
    """
    the of and to in is it that was for on with as at by from they have this had not are but
    what all were when your can said there use an each which she do how their if will up other
    about out many then them these so some her would make like him into time has look two more
    write go see number no way could people my than first water been call who oil its now find
    long down day did get come made may part over new sound take only little work know place
    year live me back give most very after thing our just name good sentence man think say great
    where help through much before line right too mean old any same tell boy follow came want
    show also around form three small set put end does another well large must big even such
    because turn here why ask went men read need land different home us move try kind hand
    picture again change off play air away animal house point page letter mother answer found
    study still learn should world
    """.split()  # noqa: SIM905 - a list of 200 strings would be 200 lines
)


def make_prompt(seed: str, *, num_tokens: int) -> str:
    """A prompt of about `num_tokens` tokens; equal seeds give equal prompts."""
    return " ".join(random.Random(seed).choices(_WORDS, k=num_tokens))


def make_prompts(seed: str, *, count: int, num_tokens: int) -> list[str]:
    """Prompts that share no beginning, so that no prefix cache helps."""
    return [make_prompt(f"{seed}/{index}", num_tokens=num_tokens) for index in range(count)]


def poisson_arrivals(seed: str, *, rate: float, window: float) -> tuple[float, ...]:
    """Times within `window` seconds at which requests come: a Poisson process of a known count.

    The count is the one to be expected, and at least 1: in a short window, chance would make of
    one rate another. Given the count, the times are independent and uniform.
    """
    rng = random.Random(f"{seed}/{rate:g}")
    return tuple(sorted(rng.uniform(0, window) for _ in range(max(1, round(rate * window)))))
