"""Streamed answers for load tests: sends prompts and questions, times the tokens, checks streams.

A stream that ends without a finish reason, with an error, or with another number of tokens than
requested is a failure; the answer to a question may be shorter. The client neither retries nor
starts servers.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BeforeValidator

from service.bench.sse import DONE, Broken, SseEvent, call

Figure = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number that may be NaN, which JSON has as null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server's endpoints and what its requests need."""

    port: int
    host: str = "127.0.0.1"
    tls: bool = False
    path: str = "/v1/completions"
    chat_path: str = "/v1/chat/completions"
    fields: Mapping[str, object] = field(default_factory=dict)  # added to the body of a prompt
    chat_fields: Mapping[str, object] = field(default_factory=dict)  # of a question
    key: str = ""  # an API key
    sends_done: bool = True  # whether complete streams end with `data: [DONE]`


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A chat of one message; the answer is sampled and ends where the model ends it."""

    text: str
    seed: int
    temperature: float = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A response with a status other than 200."""

    status: int
    retry_after: str | None  # seconds, from the header


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request as its client saw it. Times in seconds of `time.monotonic`."""

    sent: float
    arrivals: tuple[float, ...]  # of events with text
    completion_tokens: int
    prompt_tokens: int
    error: str | None  # None: complete, with the requested number of tokens
    timed_out: bool = False  # the client did not wait for the end; `error` is set
    rejection: Rejection | None = None
    ended: float = math.nan

    @property
    def time_to_first(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def time_per_token(self) -> float:
        """Mean time per token after the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(self.completion_tokens - 1, 1)

    @property
    def gaps(self) -> list[float]:
        """Times between events."""
        return [after - before for before, after in itertools.pairwise(self.arrivals)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures of a run. Times in seconds, over the complete requests; NaN if there are none."""

    requests: int
    failures: int
    errors: tuple[str, ...]  # without repetitions
    prompt_tokens: int  # of all complete requests
    completion_tokens: int
    wall: float
    tokens_per_second: float
    time_to_first_p50: Figure
    time_per_token_p50: Figure
    gap_p50: Figure
    gap_p99: Figure


class StreamError(Exception):
    """The stream reported an error; the message contains it."""


@dataclass(slots=True)
class Stream:
    """What was read of one response so far."""

    arrivals: list[float] = field(default_factory=list)
    usage: Mapping[str, int] | None = None
    finish_reason: str | None = None
    done: bool = False

    def read(self, event: SseEvent) -> None:
        """Raises StreamError for an error event, ValueError for invalid JSON."""
        if event.data == DONE:
            self.done = True
            return
        payload = event.json()
        if "error" in payload:
            raise StreamError(f"error event: {str(payload['error'])[:200]}")
        self.usage = payload.get("usage") or self.usage
        for choice in payload.get("choices", ()):
            delta = choice.get("delta", {})
            if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
                self.arrivals.append(event.at)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def completion_tokens(self, *, max_tokens: int) -> int:
        """The server's count; without one, `max_tokens` if the finish reason is `length`."""
        if self.usage:
            return self.usage["completion_tokens"]
        return max_tokens if self.finish_reason == "length" else len(self.arrivals)

    def fault(self, *, max_tokens: int, sends_done: bool, may_stop: bool = False) -> str | None:
        """Why this stream is incomplete, or None. `may_stop`: before it has all tokens."""
        if self.finish_reason is None:
            return "the stream ended without a finish reason"
        if sends_done and not self.done:
            return "the stream ended without [DONE]"
        if not self.arrivals:
            return "no text"
        tokens = self.completion_tokens(max_tokens=max_tokens)
        if tokens > max_tokens or (tokens < max_tokens and not may_stop):
            return f"{tokens} tokens instead of {max_tokens}"
        return None


def _request(target: Target, prompt: str | Question) -> tuple[str, dict[str, object]]:
    """Path and body of a request."""
    if isinstance(prompt, str):
        return target.path, {"prompt": prompt, "temperature": 0, **target.fields}
    sampling = {"temperature": prompt.temperature, "seed": prompt.seed}
    messages = [{"role": "user", "content": prompt.text}]
    return target.chat_path, {"messages": messages, **sampling, **target.chat_fields}


async def complete(
    target: Target,
    prompt: str | Question,
    *,
    max_tokens: int,
    timeout: float = 600.0,  # noqa: ASYNC109
) -> Outcome:
    """One streamed answer, from connecting to its last byte."""
    path, body = _request(target, prompt)
    body |= {"max_tokens": max_tokens, "stream": True}
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    stream, error, timed_out, rejection = Stream(), None, False, None
    sent = time.monotonic()
    try:
        async with (
            asyncio.timeout(timeout),
            call(
                (target.host, target.port),
                "POST",
                path,
                body=body,
                headers=headers,
                tls=target.tls,
            ) as reply,
        ):
            if reply.status == 200:
                async for event in reply.events():
                    stream.read(event)
                error = stream.fault(
                    max_tokens=max_tokens,
                    sends_done=target.sends_done,
                    may_stop=isinstance(prompt, Question),
                )
            else:
                retry_after = reply.headers.get("retry-after")
                rejection = Rejection(status=reply.status, retry_after=retry_after)
                detail = (await reply.body()).decode(errors="replace")
                error = f"HTTP {reply.status}: {detail[:200]}"
    except TimeoutError:
        error, timed_out = f"timed out after {timeout:.3g} s", True
    except (Broken, StreamError) as broken:
        error = str(broken)
    except ValueError as invalid:
        error = f"{type(invalid).__name__}: {invalid}"
    return Outcome(
        sent=sent,
        arrivals=tuple(stream.arrivals),
        completion_tokens=stream.completion_tokens(max_tokens=max_tokens),
        prompt_tokens=stream.usage["prompt_tokens"] if stream.usage else 0,
        error=error,
        timed_out=timed_out,
        rejection=rejection,
        ended=time.monotonic(),
    )


async def drive(
    target: Target,
    prompts: Iterable[str | Question],
    *,
    clients: int,
    max_tokens: int,
    timeout: float = 600.0,  # noqa: ASYNC109 - of each request
    pause: Callable[[Outcome], float] = lambda _: 0.0,
) -> tuple[list[Outcome], float]:
    """Closed loop: each of `clients` sends its next prompt when its last one ended, or `pause`
    seconds later.

    Returns the outcomes and the wall time.
    """
    waiting = iter(prompts)
    outcomes: list[Outcome] = []

    async def client() -> None:
        for prompt in waiting:
            outcome = await complete(target, prompt, max_tokens=max_tokens, timeout=timeout)
            outcomes.append(outcome)
            await asyncio.sleep(pause(outcome))

    started = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return outcomes, time.monotonic() - started


async def arrive(
    target: Target,
    prompts: Sequence[str | Question],
    *,
    times: Sequence[float],
    max_tokens: int | Sequence[int],
    patience: float,
    done: Callable[[Outcome], object] = lambda _: None,
) -> tuple[list[Outcome], float]:
    """Open loop: sends each prompt at its time (seconds from now), whatever the others do, and
    calls `done` as each one ends. `max_tokens`: of all, or of each.

    Requests that still run `patience` after the last time time out together.
    """
    started = time.monotonic()
    end = times[-1] + patience
    lengths = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens

    async def client(prompt: str | Question, at: float, length: int) -> Outcome:
        await asyncio.sleep(at - (time.monotonic() - started))
        left = end - (time.monotonic() - started)
        outcome = await complete(target, prompt, max_tokens=length, timeout=left)
        done(outcome)
        return outcome

    async with asyncio.TaskGroup() as group:
        clients = zip(prompts, times, lengths, strict=True)
        tasks = [group.create_task(client(*each)) for each in clients]
    return [task.result() for task in tasks], time.monotonic() - started


def summarise(outcomes: Sequence[Outcome], *, wall: float) -> Summary:
    complete_ones = [outcome for outcome in outcomes if outcome.error is None]
    gaps = [gap for outcome in complete_ones for gap in outcome.gaps]
    tokens = sum(outcome.completion_tokens for outcome in complete_ones)
    return Summary(
        requests=len(outcomes),
        failures=len(outcomes) - len(complete_ones),
        errors=tuple(sorted({outcome.error for outcome in outcomes if outcome.error})),
        prompt_tokens=sum(outcome.prompt_tokens for outcome in complete_ones),
        completion_tokens=tokens,
        wall=wall,
        tokens_per_second=tokens / wall,
        time_to_first_p50=percentile([each.time_to_first for each in complete_ones], 50),
        time_per_token_p50=percentile([each.time_per_token for each in complete_ones], 50),
        gap_p50=percentile(gaps, 50),
        gap_p99=percentile(gaps, 99),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the nearest two; NaN if empty."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
