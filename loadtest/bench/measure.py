"""Measures one server: prefill, decoding and chats with 1 to N clients, Poisson arrivals.

    prefill    one client, long prompts, one output token: prompt tokens per second
    decode     N clients start at the same time, each with one request: a burst
    chat       N clients ask questions; answers are sampled and end where the model ends them
    arrivals   requests arrive at random times, whether or not earlier ones have ended; good are
               those whose time to first token and time per token stay below a limit

Each server gets the same prompts at the same times. No two prompts share a prefix, but chats share
the system prompt of their template.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum

import uvloop

from loadtest.bench.servers import Plan, Running, Server, ServerFailed, running
from service.bench.client import Outcome, Question, Summary, arrive, complete, drive, summarise
from service.bench.workloads import make_prompts, make_questions, poisson_arrivals

FIRST_TOKEN_WITHIN = 1.0  # seconds
PER_TOKEN_WITHIN = 0.06  # seconds

_WAIT = 120.0  # seconds; timeout of requests without another limit
_QUESTION_TOKENS = 96  # more than a question and the template of a chat have
_INTERVAL = 0.5  # seconds between two samples of the memory


class Kind(StrEnum):
    """Kind of load. Its level: prompt tokens, clients, or requests per second."""

    PREFILL = "prefill"
    DECODE = "decode"
    CHAT = "chat"
    ARRIVALS = "arrivals"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of the loads."""

    clients: tuple[int, ...] = (1, 8, 32)
    least: int = 2  # minimum number of requests of a load
    tokens_in: int = 128
    tokens_out: int = 128
    prefill_tokens: int = 512
    prefill_requests: int = 3
    chat_clients: tuple[int, ...] = (1, 8, 32)
    chat_least: int = 4  # minimum number of questions of a load
    chat_tokens: int = 256  # maximum of an answer
    rates: tuple[float, ...] = (1, 2, 4, 8, 16, 32)
    window: float = 6.0  # seconds of arrivals at each rate
    tokens_out_arrivals: int = 32
    patience: float = 60.0  # seconds; loads that would take longer are skipped
    seed: str = "0"

    @property
    def context(self) -> int:
        """Tokens of the longest request, plus some that a server may add."""
        chat = _QUESTION_TOKENS + self.chat_tokens
        return 16 + max(self.prefill_tokens + 1, self.tokens_in + self.tokens_out, chat)

    @property
    def good_within(self) -> float:
        """Seconds within which a good request of the arrivals ends."""
        return FIRST_TOKEN_WITHIN + PER_TOKEN_WITHIN * (self.tokens_out_arrivals - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run of one load on one server."""

    server: str
    kind: Kind
    level: float
    repeat: int
    summary: Summary
    good: int  # requests within both limits
    server_cpu: float  # seconds
    client_cpu: float
    rss_peak: int  # bytes, since the server started
    start_seconds: float
    load_before: float  # load average of the last minute: other work on the machine

    @property
    def speed(self) -> float:
        """Tokens per second: of the prompt for prefill, else of the output."""
        if self.kind is Kind.PREFILL:
            first = self.summary.time_to_first_p50
            return self.level / first if self.summary.failures < self.summary.requests else 0.0
        return self.summary.tokens_per_second

    @property
    def cpu(self) -> float:
        """CPU seconds of the server per 1,000 tokens of `speed`; NaN if a request failed."""
        whole = self.summary
        tokens = (
            self.level * whole.requests if self.kind is Kind.PREFILL else whole.completion_tokens
        )
        return math.nan if whole.failures or not tokens else 1e3 * self.server_cpu / tokens


Notify = Callable[[str], None]
"""Called with the name of each load before it begins."""


def is_good(outcome: Outcome) -> bool:
    """Complete and within both limits."""
    return (
        outcome.error is None
        and outcome.time_to_first <= FIRST_TOKEN_WITHIN
        and outcome.time_per_token <= PER_TOKEN_WITHIN
    )


class TooSlow(Exception):
    """A load would take too long; the message names it."""


class Session:
    """Starts a server once and measures it. Keeps results if a later load fails."""

    def __init__(self, server: Server, plan: Plan, sizes: Sizes, *, repeat: int) -> None:
        self.results: list[Result] = []
        self.server, self.repeat = server, repeat
        self._plan, self._sizes = plan, sizes

    def run(self, *, with_arrivals: bool, notify: Notify = lambda _: None) -> None:
        """Raises ServerFailed and TooSlow."""
        load = os.getloadavg()[0]
        with running(self.server, self._plan) as started:
            notify("warm-up")
            self._warm_up(started)
            started.find_processes()
            notify(f"prompts of {self._sizes.prefill_tokens}")
            self._measure(started, Kind.PREFILL, self._sizes.prefill_tokens, load=load)
            for clients in self._sizes.clients:
                self._check_patience(clients)
                notify(f"{clients} client{'s' * (clients > 1)}")
                self._measure(started, Kind.DECODE, clients, load=load)
            for clients in self._sizes.chat_clients:
                notify(f"chat of {clients}")
                self._measure(started, Kind.CHAT, clients, load=load)
            for rate in self._sizes.rates if with_arrivals else ():
                notify(f"{rate:g} requests per second")
                result = self._measure(started, Kind.ARRIVALS, rate, load=load)
                if result.good < result.summary.requests / 2:
                    break  # higher rates do not give more good ones

    def _warm_up(self, started: Running) -> None:
        """Retries until a request succeeds: a ready server may still wait for its engine."""
        (prompt,) = make_prompts("warm-up", count=1, num_tokens=self._sizes.tokens_in)
        deadline = time.monotonic() + _WAIT
        while True:
            request = complete(started.target, prompt, max_tokens=8, timeout=_WAIT)
            outcome = uvloop.run(request)
            if outcome.error is None:
                return
            if time.monotonic() > deadline:
                raise ServerFailed(f"no request succeeds: {outcome.error}")
            time.sleep(_INTERVAL)

    def _check_patience(self, clients: int) -> None:
        """Raises TooSlow. Assumes that speed grows with the square root of the clients."""
        sizes = self._sizes
        known = [result for result in self.results if result.kind is Kind.DECODE]
        if not known:
            return
        if known[-1].speed == 0:
            raise TooSlow(f"all requests of {known[-1].level:g} clients failed")
        speed = known[-1].speed * math.sqrt(clients / known[-1].level)
        tokens = max(clients, sizes.least) * sizes.tokens_out
        if tokens > speed * sizes.patience:
            raise TooSlow(f"{clients} clients would take over {sizes.patience:g} s")

    def _measure(self, started: Running, kind: Kind, level: float, *, load: float) -> Result:
        (outcomes, wall), cpu, own = uvloop.run(
            _watched(started, _load(started, kind, level, sizes=self._sizes, repeat=self.repeat))
        )
        result = Result(
            server=self.server.name,
            kind=kind,
            level=level,
            repeat=self.repeat,
            summary=summarise(outcomes, wall=wall),
            good=sum(map(is_good, outcomes)),
            server_cpu=cpu,
            client_cpu=own,
            rss_peak=started.rss_peak,
            start_seconds=started.start_seconds,
            load_before=load,
        )
        self.results.append(result)
        return result


Driven = tuple[list[Outcome], float]


async def _load(started: Running, kind: Kind, level: float, *, sizes: Sizes, repeat: int) -> Driven:
    """Outcomes and wall time of a load."""
    seed = f"{sizes.seed}/{repeat}/{kind}/{level:g}"
    if kind is Kind.ARRIVALS:
        times = poisson_arrivals(seed, rate=level, window=sizes.window)
        outcomes, wall = await arrive(
            started.target,
            make_prompts(seed, count=len(times), num_tokens=sizes.tokens_in),
            times=times,
            max_tokens=sizes.tokens_out_arrivals,
            patience=sizes.good_within,
        )
        return [_timed_out(outcome) for outcome in outcomes], wall
    if kind is Kind.CHAT:
        texts = make_questions(seed, count=max(int(level), sizes.chat_least))
        return await drive(
            started.target,
            [Question(text=text, seed=number) for number, text in enumerate(texts)],
            clients=int(level),
            max_tokens=sizes.chat_tokens,
            timeout=_WAIT,
        )
    if kind is Kind.PREFILL:
        count, tokens_in = sizes.prefill_requests, sizes.prefill_tokens
        clients, tokens_out = 1, 1
    else:
        clients, tokens_out = int(level), sizes.tokens_out
        count, tokens_in = max(clients, sizes.least), sizes.tokens_in
    return await drive(
        started.target,
        make_prompts(seed, count=count, num_tokens=tokens_in),
        clients=clients,
        max_tokens=tokens_out,
        timeout=_WAIT,
    )


def _timed_out(outcome: Outcome) -> Outcome:
    """Replaces timeout messages, which differ in their seconds, by a single one."""
    return replace(outcome, error="timed out") if outcome.timed_out else outcome


async def _watched(
    started: Running, load: Coroutine[None, None, Driven]
) -> tuple[Driven, float, float]:
    """Result of a load, CPU seconds of the server and of this client during it."""
    sampling = asyncio.create_task(_sample_memory(started))
    try:
        before, own_before = started.cpu_seconds(), time.process_time()
        driven = await load
        own, cpu = time.process_time() - own_before, started.cpu_seconds() - before
    finally:
        sampling.cancel()
        with suppress(asyncio.CancelledError, ServerFailed):
            await sampling
    return driven, cpu, own


async def _sample_memory(started: Running) -> None:
    while True:
        started.sample_rss()
        await asyncio.sleep(_INTERVAL)


def better_threads(server: Server, plan: Plan, *, candidates: Sequence[int]) -> int:
    """The number of threads with the best product of speeds with 1 and with 8 clients."""
    sizes = Sizes(
        clients=(1, min(8, plan.clients)),
        chat_clients=(),
        tokens_out=32,
        least=1,
        prefill_tokens=128,
        prefill_requests=1,
    )
    scores: dict[int, float] = {}
    for threads in candidates:
        session = Session(server, replace(plan, threads=threads), sizes, repeat=-1)
        session.run(with_arrivals=False)
        speeds = [result.speed for result in session.results if result.kind is Kind.DECODE]
        scores[threads] = math.prod(speeds)
    return max(scores, key=lambda threads: scores[threads])
