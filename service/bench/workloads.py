"""Workloads: seeded prompts, arrival times and the requests of Locust's users.

Prompts are text, because not every server accepts token ids. Byte-level BPE vocabularies have each
of the words as one token: a prompt of n words has n tokens of the default model. Every request asks
for an exact number of tokens, so that a truncated stream is detected.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

QUESTION = 24  # words of a user's message
SYSTEM = 300  # words of the system prompt that all users share
LONG = 1000  # words of a long prompt
BURST = 4  # requests that a user sends at the same time

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

_TOPICS = (
    "bees", "Rome", "glaciers", "the violin", "inflation", "bread", "chess", "volcanoes", "sleep",
    "the moon", "bicycles", "tea", "Shakespeare", "batteries", "whales", "gardening", "jazz",
    "elections", "vaccines", "deserts", "football", "cheese", "satellites", "poetry",
)  # fmt: skip
_QUESTIONS = (
    "What should everyone know about {}?",
    "Tell me a short story about {}.",
    "Why do people care about {}?",
    "Explain {} to a child.",
    "Write three tips about {}.",
    "What is a common mistake about {}?",
    "How did {} change in the last century?",
)


def make_question(rng: random.Random) -> str:
    """A question of a person, one of 168."""
    return rng.choice(_QUESTIONS).format(rng.choice(_TOPICS))


def make_prompt(seed: str, *, num_tokens: int) -> str:
    """A prompt of about `num_tokens` tokens; equal seeds give equal prompts."""
    return " ".join(random.Random(seed).choices(_WORDS, k=num_tokens))


def make_prompts(seed: str, *, count: int, num_tokens: int) -> list[str]:
    """Prompts without a common prefix, so that no prefix cache helps."""
    return [make_prompt(f"{seed}/{index}", num_tokens=num_tokens) for index in range(count)]


def make_questions(seed: str, *, count: int) -> list[str]:
    """Questions of which two may be equal; equal seeds give equal questions."""
    return [make_question(random.Random(f"{seed}/{index}")) for index in range(count)]


def poisson_arrivals(seed: str, *, rate: float, window: float) -> tuple[float, ...]:
    """Arrival times within `window` seconds: a Poisson process with a fixed number of arrivals.

    The number is the expected one, at least 1, because in a short window chance would change the
    rate. Given the number, the times are independent and uniform.
    """
    rng = random.Random(f"{seed}/{rate:g}")
    return tuple(sorted(rng.uniform(0, window) for _ in range(max(1, round(rate * window)))))


class Workload(StrEnum):
    """CHAT: conversations of one to three turns. LONG: a long prompt, a short output. PREFIX: one
    system prompt, many questions. BURST: several chats at the same time. MIXED: all of these.
    """

    CHAT = "chat"
    LONG = "long"
    PREFIX = "prefix"
    BURST = "burst"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request and the number of tokens that it must get."""

    path: str
    fields: Mapping[str, Any]  # of the body, besides the common ones
    tokens: int

    def body(self, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.fields,
        }


def _words(rng: random.Random, count: int) -> str:
    return make_prompt(f"{rng.random()}", num_tokens=count)


def _chat(rng: random.Random, tokens: int) -> Call:
    turns = rng.randint(1, 3)
    messages = [{"role": "user", "content": _words(rng, QUESTION)}]
    for _ in range(turns - 1):
        messages.append({"role": "assistant", "content": _words(rng, tokens)})
        messages.append({"role": "user", "content": _words(rng, QUESTION)})
    return Call(path="/v1/chat/completions", fields={"messages": messages}, tokens=tokens)


def _long(rng: random.Random, tokens: int) -> Call:
    fields = {"prompt": _words(rng, LONG)}
    return Call(path="/v1/completions", fields=fields, tokens=max(1, tokens // 4))


def _prefix(rng: random.Random, tokens: int) -> Call:
    system = {"role": "system", "content": make_prompt("shared", num_tokens=SYSTEM)}
    question = {"role": "user", "content": _words(rng, QUESTION)}
    fields = {"messages": [system, question]}
    return Call(path="/v1/chat/completions", fields=fields, tokens=tokens)


CALLS: Mapping[Workload, Callable[[random.Random, int], Call]] = MappingProxyType(
    {
        Workload.CHAT: _chat,
        Workload.LONG: _long,
        Workload.PREFIX: _prefix,
        Workload.BURST: _chat,
    }
)
"""Makes the next request of a workload, given a random generator and the usual output length."""

SHARES: Mapping[Workload, float] = MappingProxyType(
    {Workload.CHAT: 5, Workload.LONG: 1, Workload.PREFIX: 3, Workload.BURST: 1}
)
"""Weights of the workloads in MIXED."""


def next_turn(workload: Workload, rng: random.Random) -> Workload:
    """The workload of a user's next turn: for MIXED a random one of the others."""
    if workload is Workload.MIXED:
        return rng.choices(list(SHARES), weights=list(SHARES.values()))[0]
    return workload
