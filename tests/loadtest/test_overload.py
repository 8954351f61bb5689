"""Figures of the overload test: goodput, rejections, recovery."""

from __future__ import annotations

import asyncio
import math

import pytest

from loadtest.overload import goodput, recovery
from service.bench.client import Outcome, Rejection, Target, complete


def outcome(sent: float, *, first: float = 0.1, ended: float = 1.0, good: bool = True) -> Outcome:
    return Outcome(
        sent=sent,
        arrivals=(sent + first,) if good else (),
        completion_tokens=1,
        prompt_tokens=1,
        error=None if good else "broken",
        ended=sent + ended,
    )


def test_goodput_counts_complete_responses_within_the_interval() -> None:
    outcomes = [
        outcome(9.5),  # ends at 10.5
        outcome(12.0),
        outcome(13.5),  # ends at 14.5: too late
        outcome(8.0),  # too early
        outcome(12.0, good=False),
    ]
    assert goodput(outcomes, since=10.0, seconds=4.0) == pytest.approx(2 / 4)


def test_recovery_ends_when_all_later_probes_are_fast() -> None:
    fast, slow = 0.1, 0.5

    def after(*firsts: float) -> float:
        probes = [outcome(20.0 + i, first=first) for i, first in enumerate(firsts)]
        return recovery(probes, since=20.0, idle=0.1)

    assert after(fast, fast) == 0.0
    assert after(slow, fast, fast) == 1.0
    assert after(fast, slow, fast) == 2.0
    assert after(fast, slow) == math.inf
    broken = [outcome(20.0, good=False), outcome(21.0)]
    assert recovery(broken, since=20.0, idle=0.1) == 1.0


async def test_a_rejection_differs_from_a_failure() -> None:
    heads: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(b"HTTP/1.1 503 No\r\nRetry-After: 2\r\nConnection: close\r\n\r\nfull")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        rejected = await complete(Target(port=port, key="secret"), "a", max_tokens=1)
        anonymous = await complete(Target(port=port), "a", max_tokens=1)
    assert rejected.rejection == Rejection(status=503, retry_after="2")
    assert rejected.error == "HTTP 503: full"
    assert rejected.ended >= rejected.sent
    assert "Authorization: Bearer secret\r\n" in heads[0]
    assert anonymous.rejection is not None
    assert "Authorization" not in heads[1]
