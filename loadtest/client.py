"""A streaming client for load tests: plain asyncio, so that it takes little of a shared machine.

It speaks as much HTTP/1.1 and SSE as servers of the OpenAI API answer with, and judges each stream:
one that ends without a finish reason, with an error, or with another number of tokens than asked
for is a failure. It does not retry and it does not start servers.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import orjson


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where completions are asked for, and what this server wants said."""

    port: int
    host: str = "127.0.0.1"
    path: str = "/v1/completions"
    fields: Mapping[str, object] = field(default_factory=dict)  # of the body, beside the usual
    key: str = ""  # an API key
    sends_done: bool = True  # whether a whole stream ends with `data: [DONE]`


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An answer with another status than 200."""

    status: int
    retry_after: str | None  # seconds, as the header says


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request, as its client saw it. Times in seconds, of one monotonic clock."""

    sent: float
    arrivals: tuple[float, ...]  # of events that carried text
    completion_tokens: int
    prompt_tokens: int
    error: str | None  # None: whole and of the length asked for
    gave_up: bool = False  # the client did not wait for the end; then `error` says so
    refusal: Refusal | None = None
    ended: float = math.nan

    @property
    def time_to_first(self) -> float:
        """From sending the request to the first text."""
        return self.arrivals[0] - self.sent

    @property
    def time_per_token(self) -> float:
        """Mean time of the tokens after the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(self.completion_tokens - 1, 1)

    @property
    def gaps(self) -> list[float]:
        """Times between events."""
        return [after - before for before, after in itertools.pairwise(self.arrivals)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run of many requests comes to. Times in seconds; of the whole requests only."""

    requests: int
    failures: int
    errors: tuple[str, ...]  # the different ones
    prompt_tokens: int  # of all whole requests
    completion_tokens: int
    wall: float
    tokens_per_second: float
    time_to_first_p50: float
    time_per_token_p50: float
    gap_p50: float
    gap_p99: float


class SseDecoder:
    """Bytes in any cuts -> the data of each event. Comments and other fields are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """The events that these bytes complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        events = []
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


class BrokenAnswer(Exception):
    """The answer cannot be one of a whole request; the message says why."""


class Refused(BrokenAnswer):
    """The server did not take the request."""

    def __init__(self, message: str, refusal: Refusal) -> None:
        super().__init__(message)
        self.refusal = refusal


@dataclass(slots=True)
class Stream:
    """What was read of one answer so far."""

    arrivals: list[float] = field(default_factory=list)
    usage: Mapping[str, int] | None = None
    finish_reason: str | None = None
    done: bool = False

    def read(self, data: bytes, *, now: float) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        event: dict[str, Any] = orjson.loads(data)
        if "error" in event:
            raise BrokenAnswer(f"error event: {str(event['error'])[:200]}")
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            if choice.get("text") or choice.get("delta", {}).get("content"):
                self.arrivals.append(now)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def completion_tokens(self, *, max_tokens: int) -> int:
        """As the server counts; where it does not, all of an answer that ended by its length."""
        if self.usage:
            return self.usage["completion_tokens"]
        return max_tokens if self.finish_reason == "length" else len(self.arrivals)

    def fault(self, *, max_tokens: int, sends_done: bool) -> str | None:
        """Why this is no whole answer, or None."""
        if self.finish_reason is None:
            return "the stream ended without a finish reason"
        if sends_done and not self.done:
            return "the stream ended without [DONE]"
        if not self.arrivals:
            return "no text"
        if (tokens := self.completion_tokens(max_tokens=max_tokens)) != max_tokens:
            return f"{tokens} tokens instead of {max_tokens}"
        return None


async def complete(
    target: Target, prompt: str, *, max_tokens: int, give_up_after: float = 600.0
) -> Outcome:
    """One streamed completion, from connecting to its last byte."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "temperature": 0}
    stream, error, gave_up, refusal = Stream(), None, False, None
    sent = time.perf_counter()
    try:
        async with asyncio.timeout(give_up_after):
            async with aclosing(_post(target, orjson.dumps(body | dict(target.fields)))) as events:
                async for data in events:
                    stream.read(data, now=time.perf_counter())
        error = stream.fault(max_tokens=max_tokens, sends_done=target.sends_done)
    except TimeoutError:
        error, gave_up = f"no end within {give_up_after:.3g} s", True
    except BrokenAnswer as broken:
        error, refusal = str(broken), broken.refusal if isinstance(broken, Refused) else None
    except (OSError, EOFError, ValueError) as broken:
        error = f"{type(broken).__name__}: {broken}"
    return Outcome(
        sent=sent,
        arrivals=tuple(stream.arrivals),
        completion_tokens=stream.completion_tokens(max_tokens=max_tokens),
        prompt_tokens=stream.usage["prompt_tokens"] if stream.usage else 0,
        error=error,
        gave_up=gave_up,
        refusal=refusal,
        ended=time.perf_counter(),
    )


async def drive(
    target: Target,
    prompts: Iterable[str],
    *,
    clients: int,
    max_tokens: int,
    give_up_after: float = 600.0,
) -> tuple[list[Outcome], float]:
    """All prompts by `clients` clients, each at once after its last; the outcomes and the time."""
    waiting = iter(prompts)
    outcomes: list[Outcome] = []

    async def client() -> None:
        for prompt in waiting:
            answer = complete(target, prompt, max_tokens=max_tokens, give_up_after=give_up_after)
            outcomes.append(await answer)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return outcomes, time.perf_counter() - started


async def arrive(
    target: Target,
    prompts: Sequence[str],
    *,
    times: Sequence[float],
    max_tokens: int,
    patience: float,
) -> tuple[list[Outcome], float]:
    """Each prompt at its time (seconds from now), whatever became of those before.

    All that is not done `patience` after the last time is given up then: the load ends at once.
    """
    started = time.perf_counter()
    end = times[-1] + patience

    async def client(prompt: str, at: float) -> Outcome:
        await asyncio.sleep(at - (time.perf_counter() - started))
        left = end - (time.perf_counter() - started)
        return await complete(target, prompt, max_tokens=max_tokens, give_up_after=left)

    async with asyncio.TaskGroup() as group:
        clients = zip(prompts, times, strict=True)
        tasks = [group.create_task(client(prompt, at)) for prompt, at in clients]
    return [task.result() for task in tasks], time.perf_counter() - started


def summarise(outcomes: Sequence[Outcome], *, wall: float) -> Summary:
    """Figures over the whole requests; NaN where there is none."""
    whole = [outcome for outcome in outcomes if outcome.error is None]
    gaps = [gap for outcome in whole for gap in outcome.gaps]
    tokens = sum(outcome.completion_tokens for outcome in whole)
    return Summary(
        requests=len(outcomes),
        failures=len(outcomes) - len(whole),
        errors=tuple(sorted({outcome.error for outcome in outcomes if outcome.error})),
        prompt_tokens=sum(outcome.prompt_tokens for outcome in whole),
        completion_tokens=tokens,
        wall=wall,
        tokens_per_second=tokens / wall,
        time_to_first_p50=percentile([outcome.time_to_first for outcome in whole], 50),
        time_per_token_p50=percentile([outcome.time_per_token for outcome in whole], 50),
        gap_p50=percentile(gaps, 50),
        gap_p99=percentile(gaps, 99),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolated between the nearest two; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


async def _post(target: Target, body: bytes) -> AsyncGenerator[bytes, None]:
    """Sends the body and yields the data of each event. Raises Refused unless status 200."""
    reader, writer = await asyncio.open_connection(target.host, target.port)
    try:
        who = f"Authorization: Bearer {target.key}\r\n" if target.key else ""
        head = (
            f"POST {target.path} HTTP/1.1\r\nHost: {target.host}:{target.port}\r\n{who}"
            "Content-Type: application/json\r\nAccept: text/event-stream\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status, headers = await _read_head(reader)
        if status != 200:
            detail = await reader.read(500)
            refusal = Refusal(status=status, retry_after=headers.get("retry-after"))
            message = f"HTTP {status}: {detail.decode(errors='replace')[:200]}"
            raise Refused(message, refusal)
        decoder = SseDecoder()
        async with aclosing(_read_body(reader, headers)) as parts:
            async for data in parts:
                for event in decoder.feed(data):
                    yield event
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines[1:] if line)
    status = lines[0].split(" ")[1]
    return int(status), {name.lower(): value.strip().lower() for name, _, value in fields}


async def _read_body(
    reader: asyncio.StreamReader, headers: Mapping[str, str]
) -> AsyncGenerator[bytes, None]:
    if headers.get("transfer-encoding") != "chunked":
        while data := await reader.read(65536):
            yield data
        return
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
