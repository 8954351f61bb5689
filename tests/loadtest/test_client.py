"""The streaming client against a scripted HTTP server."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import orjson
import pytest

from service.bench.client import (
    Outcome,
    Question,
    Target,
    arrive,
    complete,
    drive,
    percentile,
    summarise,
)
from service.bench.sse import SseDecoder
from service.bench.workloads import make_prompts
from tests.support.waiting import PATIENCE


def event(text: str = "", **fields: object) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": fields.pop("finish_reason", None)}
    return b"data: " + orjson.dumps({"choices": [choice], **fields}) + b"\n\n"


def complete_stream(num_tokens: int) -> list[bytes]:
    usage = {"prompt_tokens": 3, "completion_tokens": num_tokens}
    tokens = [event("a") for _ in range(num_tokens)]
    return [*tokens, event(finish_reason="length", usage=usage), b"data: [DONE]\n\n"]


@asynccontextmanager
async def serving(
    parts: list[bytes],
    *,
    status: int = 200,
    chunked: bool = True,
    ends: bool = True,
    pause: float = 0.0,
) -> AsyncIterator[tuple[Target, list[dict[str, object]]]]:
    """A server that responds to every request with these parts; yields target and received bodies.

    `ends` False leaves out the end mark of a chunked body.
    """
    bodies: list[dict[str, object]] = []
    handlers: set[asyncio.Task[None] | None] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(asyncio.current_task())
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        bodies.append(orjson.loads(await reader.readexactly(length)))
        encoding = b"Transfer-Encoding: chunked\r\n" if chunked else b"Connection: close\r\n"
        try:
            writer.write(b"HTTP/1.1 %d X\r\n%b\r\n" % (status, encoding))
            for part in parts:
                await asyncio.sleep(pause)
                writer.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
            if chunked and ends:
                writer.write(b"0\r\n\r\n")
        finally:
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield Target(port=server.sockets[0].getsockname()[1], fields={"ignore_eos": True}), bodies
        tasks = [task for task in handlers if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("seed", range(30))
def test_events_are_the_same_however_the_bytes_are_cut(seed: int) -> None:
    rng = random.Random(seed)
    stream = b'data: {"a":1}\r\n\r\n: ping\ndata:x\ndata: y\n\nevent: z\nid: 4\n\ndata: [DONE]\n\n'
    cuts = sorted(rng.choices(range(len(stream) + 1), k=rng.randrange(12)))
    decoder, events = SseDecoder(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        events += decoder.feed(stream[start:end], at=float(end))
    assert [event.data for event in events] == [b'{"a":1}', b"x\ny", b"[DONE]"]
    assert [event.raw for event in events][1] == b"data:x\ndata: y\n\n"


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_complete_stream_is_counted_and_timed(*, chunked: bool) -> None:
    async with serving(complete_stream(5), chunked=chunked, pause=0.01) as (target, bodies):
        before = time.monotonic()
        outcome = await complete(target, "one two", max_tokens=5)
        passed = time.monotonic() - before
    assert outcome.error is None
    assert (outcome.prompt_tokens, outcome.completion_tokens, len(outcome.gaps)) == (3, 5, 4)
    assert 0.005 < outcome.time_to_first < passed
    assert sum(outcome.gaps) == pytest.approx(4 * outcome.time_per_token)
    assert bodies == [
        {"prompt": "one two", "max_tokens": 5, "stream": True, "temperature": 0, "ignore_eos": True}
    ]


@pytest.mark.parametrize(
    ("parts", "ends", "reason"),
    [
        (complete_stream(4), True, "4 tokens instead of 5"),
        (complete_stream(5)[:3], False, "IncompleteReadError"),
        (complete_stream(5)[:3], True, "without a finish reason"),
        (complete_stream(5)[:-1], True, "without [DONE]"),
        ([event("a"), b'data: {"error": {"message": "broken"}}\n\n'], True, "broken"),
        ([b"data: {nonsense\n\n"], True, "JSONDecodeError"),
        (complete_stream(5)[5:], True, "no text"),
    ],
)
async def test_an_incomplete_stream_is_a_failure(
    parts: list[bytes], *, ends: bool, reason: str
) -> None:
    async with serving(parts, ends=ends) as (target, _):
        outcome = await complete(target, "p", max_tokens=5)
    assert outcome.error is not None
    assert reason in outcome.error


async def test_the_answer_to_a_question_may_be_shorter_and_is_a_chat() -> None:
    async with serving(complete_stream(4)) as (plain, bodies):
        target = replace(plain, chat_fields={"model": "m"})
        question = Question(text="why?", seed=3)
        assert (await complete(target, question, max_tokens=5)).error is None
        assert (await complete(target, question, max_tokens=3)).error == "4 tokens instead of 3"
    messages = [{"role": "user", "content": "why?"}]
    common = {"messages": messages, "temperature": 0.7, "seed": 3, "model": "m", "stream": True}
    assert bodies == [common | {"max_tokens": 5}, common | {"max_tokens": 3}]


async def test_servers_may_omit_done() -> None:
    async with serving(complete_stream(5)[:-1]) as (target, _):
        outcome = await complete(replace(target, sends_done=False), "p", max_tokens=5)
    assert outcome.error is None


async def test_a_rejection_and_a_closed_port_are_failures() -> None:
    async with serving([b'{"error": "full"}'], status=503, chunked=False) as (target, _):
        rejected = await complete(target, "p", max_tokens=5)
    closed = await complete(target, "p", max_tokens=5)
    assert rejected.error is not None
    assert rejected.error.startswith("HTTP 503")
    assert closed.error is not None
    assert closed.error.startswith("ConnectionRefusedError")


async def test_a_stream_that_hangs_times_out() -> None:
    async with serving(complete_stream(5), pause=5.0) as (target, _):
        outcome = await complete(target, "p", max_tokens=5, timeout=0.05)
    assert (outcome.error, outcome.timed_out) == ("timed out after 0.05 s", True)


async def test_without_usage_a_response_that_ended_by_length_has_all_tokens() -> None:
    """Two tokens may come in one event, and some have no text of their own."""
    parts = [event("ab"), event("c"), event(finish_reason="length"), b"data: [DONE]\n\n"]
    async with serving(parts) as (target, _):
        outcome = await complete(target, "p", max_tokens=5)
    stopped = [event("ab"), event(finish_reason="stop"), b"data: [DONE]\n\n"]
    async with serving(stopped) as (target, _):
        short = await complete(target, "p", max_tokens=5)
    assert (outcome.error, outcome.completion_tokens) == (None, 5)
    assert short.error == "1 tokens instead of 5"


@pytest.mark.slow
async def test_arrivals_are_independent_and_time_out_together() -> None:
    times = (0.0, 0.02, 0.03, 0.1)
    prompts = make_prompts("a", count=4, num_tokens=3)
    async with serving(complete_stream(2), pause=0.02) as (target, bodies):  # 0.08 s an answer
        outcomes, wall = await arrive(target, prompts, times=times, max_tokens=2, patience=PATIENCE)
    sent = [outcome.sent - outcomes[0].sent for outcome in outcomes]
    assert [outcome.error for outcome in outcomes] == [None] * 4
    assert sorted(str(body["prompt"]) for body in bodies) == sorted(prompts)
    assert all(at >= time - 0.01 for at, time in zip(sent, times, strict=True))
    assert outcomes[2].sent < outcomes[0].arrivals[-1] + 0.02
    assert wall < PATIENCE
    async with serving(complete_stream(2), pause=PATIENCE) as (target, _):
        late, wall = await arrive(target, prompts, times=times, max_tokens=2, patience=0.1)
    assert all(outcome.timed_out for outcome in late)
    assert 0.15 < wall < PATIENCE


async def test_drive_sends_every_prompt_once() -> None:
    prompts = make_prompts("seed", count=11, num_tokens=4)
    async with serving(complete_stream(2), pause=0.001) as (target, bodies):
        outcomes, wall = await drive(target, prompts, clients=3, max_tokens=2)
    assert sorted(str(body["prompt"]) for body in bodies) == sorted(prompts)
    summary = summarise(outcomes, wall=wall)
    assert (summary.requests, summary.failures, summary.completion_tokens) == (11, 0, 22)
    assert summary.tokens_per_second == pytest.approx(22 / wall)


def make_outcome(*arrivals: float, error: str | None = None) -> Outcome:
    return Outcome(
        sent=0.0,
        arrivals=arrivals,
        completion_tokens=len(arrivals),
        prompt_tokens=2,
        error=error,
    )


def test_failures_are_counted_and_excluded_from_figures() -> None:
    outcomes = [make_outcome(1, 2, 4), make_outcome(3, 4, 5), make_outcome(0.1, error="short")]
    summary = summarise(outcomes, wall=2.0)
    assert (summary.requests, summary.failures, summary.errors) == (3, 1, ("short",))
    assert (summary.tokens_per_second, summary.time_to_first_p50) == (3.0, 2.0)
    assert (summary.time_per_token_p50, summary.gap_p50) == (1.25, 1.0)
    assert summary.gap_p99 == pytest.approx(1.97)


def test_without_complete_requests_figures_are_nan_and_speed_is_zero() -> None:
    summary = summarise([make_outcome(error="rejected")], wall=1.0)
    assert summary.tokens_per_second == 0
    assert math.isnan(summary.time_to_first_p50)


def test_percentiles_interpolate() -> None:
    assert [percentile([4, 1, 3, 2], p) for p in (0, 50, 100)] == [1, 2.5, 4]
    assert percentile([7], 99) == 7


def test_prompts_are_seeded_and_share_no_prefix() -> None:
    prompts = make_prompts("s", count=20, num_tokens=64)
    assert prompts == make_prompts("s", count=20, num_tokens=64)
    assert {len(prompt.split()) for prompt in prompts} == {64}
    assert len({prompt[:20] for prompt in prompts}) == 20
    assert not set(prompts) & set(make_prompts("t", count=20, num_tokens=64))
