"""Traffic: what users ask for, by workload: streamed calls whose length is known beforehand.

Each asks for an exact number of tokens, so that a stream that was cut short can be told from one
that ended. Who sends them, and when, is decided elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from loadtest.workloads import make_prompt

QUESTION = 24  # words of a user's message
SYSTEM = 300  # words of the system prompt that all users of a workload share
LONG = 1000  # words of a long prompt
BURST = 4  # calls that a user sends at once


class Workload(StrEnum):
    """CHAT: a conversation of some turns. LONG: a long prompt, a short answer. PREFIX: one system
    prompt, many questions. BURST: a pause, then some chats at once. MIXED: of all these.
    """

    CHAT = "chat"
    LONG = "long"
    PREFIX = "prefix"
    BURST = "burst"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call. `tokens` is the number that a whole answer has."""

    path: str
    fields: Mapping[str, Any]  # of the body, beside those that every call has
    tokens: int

    def body(self, model: str) -> dict[str, Any]:
        """What is sent."""
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
"""Workload -> its next call, of random numbers and the usual number of tokens."""

SHARES: Mapping[Workload, float] = MappingProxyType(
    {Workload.CHAT: 5, Workload.LONG: 1, Workload.PREFIX: 3, Workload.BURST: 1}
)
"""Of the turns of a mixed workload's users."""


def next_turn(workload: Workload, rng: random.Random) -> Workload:
    """What a user does next; for MIXED one of the others."""
    if workload is Workload.MIXED:
        return rng.choices(list(SHARES), weights=list(SHARES.values()))[0]
    return workload
