"""Violations of a soak: a wrong response, a vanished request, a leak."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from service.bench.sse import SseEvent
from tests.cluster import soak_clients
from tests.cluster.audit_log import IN_FLIGHT, AuditLog
from tests.cluster.client import Client, Transcript
from tests.cluster.cluster import Cluster, Timings
from tests.cluster.resources import ResourceSnapshot, leaks
from tests.cluster.soak_clients import SoakClients

ANSWER = (5, 6, 7)
BODY = {"max_tokens": len(ANSWER)}


def event(data: dict[str, Any] | str) -> SseEvent:
    text = (data if isinstance(data, str) else json.dumps(data)).encode()
    return SseEvent(b"data: %b\n\n" % text, text, time.monotonic())


def token(value: int, reason: str | None = None) -> SseEvent:
    return event({"choices": [{"text": "", "token_ids": [value], "finish_reason": reason}]})


DONE = event("[DONE]")
WHOLE = [token(5), token(6), token(7, "length"), DONE]


class Scripted(Client):
    """Returns the same events for each request."""

    def __init__(self, events: Sequence[SseEvent]) -> None:
        super().__init__(list)
        self._script = events

    async def stream(
        self,
        body: dict[str, Any],
        *,
        into: Transcript | None = None,
        patience: float = 0.0,
        **headers: str,
    ) -> Transcript:
        transcript = into or Transcript(body)
        transcript.call_id = "an id"
        transcript.events += self._script
        return transcript


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_clients, "RETRY", 0.0)


async def violations(events: Sequence[SseEvent], way: str) -> list[str]:
    """The violations of one request with this behaviour."""
    over = asyncio.Event()

    def make_body() -> dict[str, Any]:
        over.set()
        return dict(BODY)

    rng = random.Random(0)
    asking = SoakClients(Scripted(events), make_body, lambda _: ANSWER, rng=rng, ways={way})
    await asking.run(over)
    assert asking.answers == {way: 1}
    return asking.violations


async def test_a_complete_response_is_none() -> None:
    assert await violations(WHOLE, "read to the end") == []


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([token(5), token(9), token(7, "length"), DONE], "wrong token"),
        ([token(5), token(7, "length"), DONE], "wrong token"),
        ([token(5), token(6, "length"), DONE], "2 tokens of 3"),
        ([*WHOLE[:3], token(8), DONE], "wrong token"),
        ([token(5), token(6, "cancelled"), DONE], "ended by cancelled"),
        ([token(5), event({"error": {"code": "engine_crash_loop"}})], "an error"),
        ([token(5), token(6)], "no end"),
        ([*WHOLE, DONE], "P3"),
        ([token(5), token(6, "length"), token(7, "length"), DONE], "P3"),
    ],
)
async def test_every_other_response_is_one(events: list[SseEvent], why: str) -> None:
    (violation,) = await violations(events, "read to the end")
    assert why in violation


async def test_a_deadline_is_none_if_the_request_had_one() -> None:
    late = [token(5), token(6, "deadline"), DONE]
    never = [event({"error": {"code": "deadline_exceeded"}})]
    assert await violations(late, "had a deadline") == []
    assert await violations(never, "had a deadline") == []
    assert await violations(late, "read to the end")
    assert await violations(never, "read to the end")


@pytest.mark.slow
def test_a_request_that_vanishes_without_an_end_is_one(tmp_path: Path) -> None:
    """An ended request may vanish: Redis keeps it for the resume window only."""
    cluster = Cluster(tmp_path, tmp_path, fork_server=None, timings=Timings())
    cluster.redis.start()
    try:
        audit_log = AuditLog(cluster)
        for name in ("a", "b", "c"):
            cluster.ask("HSET", cluster.key(f"r:{name}"), "st", "running")
        assert audit_log.update()
        assert audit_log.tally() == {IN_FLIGHT: 3}
        end = '{"reason":"length"}'
        cluster.ask("HSET", cluster.key("r:a"), "st", "ended", "fin", end)
        cluster.ask("DEL", cluster.key("r:b"))
        assert audit_log.update()
        cluster.ask("DEL", cluster.key("r:a"))
        assert audit_log.update()
        assert audit_log.vanished == {"b"}
        assert audit_log.fates == {"a": "length", "b": IN_FLIGHT, "c": IN_FLIGHT}
    finally:
        cluster.redis.close()
    assert not audit_log.update(), "Redis does not respond"


def test_growth_beyond_its_allowance_is_a_leak() -> None:
    before = ResourceSnapshot(
        part="engine", figures={"RSS, MiB": 100, "descriptors": 10, "KV blocks used": 0}
    )

    def grown(name: str, value: float) -> list[str]:
        return leaks(
            before, ResourceSnapshot(part="engine", figures={**before.figures, name: value})
        )

    for name, allowed, too_much in (
        ("RSS, MiB", 113, 114),
        ("descriptors", 13, 14),
        ("KV blocks used", 0, 1),
    ):
        assert grown(name, allowed) == []
        assert grown(name, 0) == []
        (leak,) = grown(name, too_much)
        assert leak.startswith(f"engine: {name} grew")
