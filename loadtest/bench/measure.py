"""Measures one started server: prefill, decoding by 1 to N clients, Poisson arrivals.

    prefill    one client, long prompts, one token out: how fast a prompt is computed
    decode     N clients start at once, each with one request: a burst
    arrivals   requests come at random times, whether or not those before are done; good are those
               whose first token and whose tokens after it come in time

Every server gets the same prompts at the same times. Prompts share no beginning with one another.
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

from loadtest.bench.servers import Plan, Running, Server, ServerFailed, running
from loadtest.client import Outcome, Summary, arrive, complete, drive, summarise
from loadtest.workloads import make_prompts, poisson_arrivals

FIRST_TOKEN_WITHIN = 1.0  # seconds
A_TOKEN_WITHIN = 0.06

_WAIT = 120.0  # seconds for an answer that nothing else bounds
_LOOK = 0.5  # seconds between two looks at the memory


class Kind(StrEnum):
    """What is measured. Its level: prompt tokens, clients, or requests a second."""

    PREFILL = "prefill"
    DECODE = "decode"
    ARRIVALS = "arrivals"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is asked for."""

    clients: Sequence[int] = (1, 8, 32)
    least: int = 2  # requests of a load, where there are fewer clients
    tokens_in: int = 128
    tokens_out: int = 128
    prefill_tokens: int = 512
    prefill_requests: int = 3
    rates: Sequence[float] = (1, 2, 4, 8, 16, 32)
    window: float = 6.0  # seconds of arrivals at each rate
    tokens_out_arrivals: int = 32
    patience: float = 60.0  # seconds that one load may be expected to take
    seed: str = "0"

    @property
    def context(self) -> int:
        """Tokens that the longest request holds, and a few that a server may add."""
        return 16 + max(self.prefill_tokens + 1, self.tokens_in + self.tokens_out)

    @property
    def answer_in_time(self) -> float:
        """Seconds within which a good answer of the arrivals is whole."""
        return FIRST_TOKEN_WITHIN + A_TOKEN_WITHIN * (self.tokens_out_arrivals - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One server under one load, once."""

    server: str
    kind: Kind
    level: float
    repeat: int
    summary: Summary
    good: int  # whole requests that met both times
    server_cpu: float  # seconds
    client_cpu: float
    rss_peak: int  # bytes, since the server started
    start_seconds: float
    load_before: float  # the machine's, of the last minute: whether it had other work

    @property
    def speed(self) -> float:
        """Tokens a second: of the prompt, or of the answers."""
        if self.kind is Kind.PREFILL:
            first = self.summary.time_to_first_p50
            return self.level / first if self.summary.failures < self.summary.requests else 0.0
        return self.summary.tokens_per_second


Notify = Callable[[str], None]
"""Called with a load's name before it begins."""


def is_good(outcome: Outcome) -> bool:
    """Whole, and in time."""
    return (
        outcome.error is None
        and outcome.time_to_first <= FIRST_TOKEN_WITHIN
        and outcome.time_per_token <= A_TOKEN_WITHIN
    )


class TooSlow(Exception):
    """More than anyone wants to wait for; the message says what."""


class Session:
    """One start of one server, to be measured. Results are kept where a later load fails."""

    def __init__(self, server: Server, plan: Plan, sizes: Sizes, *, repeat: int) -> None:
        self.results: list[Result] = []
        self.server, self.repeat = server, repeat
        self._plan, self._sizes = plan, sizes

    def run(self, *, with_arrivals: bool, notify: Notify = lambda _: None) -> None:
        """Starts the server, warms it up, measures, ends it. Raises ServerFailed and TooSlow."""
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
            for rate in self._sizes.rates if with_arrivals else ():
                notify(f"{rate:g} requests a second")
                result = self._measure(started, Kind.ARRIVALS, rate, load=load)
                if result.good < result.summary.requests / 2:
                    break  # a higher rate gives no more good ones

    def _warm_up(self, started: Running) -> None:
        """Until there is a whole answer; a server that is up may still wait for its engine."""
        (prompt,) = make_prompts("warm-up", count=1, num_tokens=self._sizes.tokens_in)
        deadline = time.monotonic() + _WAIT
        while True:
            answer = complete(started.target, prompt, max_tokens=8, timeout=_WAIT)
            outcome = asyncio.run(answer)
            if outcome.error is None:
                return
            if time.monotonic() > deadline:
                raise ServerFailed(f"gives no answer: {outcome.error}")
            time.sleep(_LOOK)

    def _check_patience(self, clients: int) -> None:
        """Speed is taken to grow with the square root of the clients."""
        sizes = self._sizes
        known = [result for result in self.results if result.kind is Kind.DECODE]
        if not known:
            return
        if known[-1].speed == 0:
            raise TooSlow(f"no whole answer by {known[-1].level:g} clients")
        speed = known[-1].speed * math.sqrt(clients / known[-1].level)
        tokens = max(clients, sizes.least) * sizes.tokens_out
        if tokens > speed * sizes.patience:
            raise TooSlow(f"{clients} clients would take over {sizes.patience:g} s")

    def _measure(self, started: Running, kind: Kind, level: float, *, load: float) -> Result:
        (outcomes, wall), cpu, own = asyncio.run(
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
    """The outcomes of a load's requests, and its wall time."""
    seed = f"{sizes.seed}/{repeat}/{kind}/{level:g}"
    if kind is Kind.ARRIVALS:
        times = poisson_arrivals(seed, rate=level, window=sizes.window)
        outcomes, wall = await arrive(
            started.target,
            make_prompts(seed, count=len(times), num_tokens=sizes.tokens_in),
            times=times,
            max_tokens=sizes.tokens_out_arrivals,
            patience=sizes.answer_in_time,
        )
        return [_timed_out(outcome) for outcome in outcomes], wall
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
    """A load's outcome, and the CPU seconds of the server and of this client meanwhile."""
    looking = asyncio.create_task(_look_at_memory(started))
    try:
        before, own_before = started.cpu_seconds(), time.process_time()
        driven = await load
        own, cpu = time.process_time() - own_before, started.cpu_seconds() - before
    finally:
        looking.cancel()
        with suppress(asyncio.CancelledError, ServerFailed):
            await looking
    return driven, cpu, own


async def _look_at_memory(started: Running) -> None:
    while True:
        started.sample_rss()
        await asyncio.sleep(_LOOK)


def better_threads(server: Server, plan: Plan, *, candidates: Sequence[int]) -> int:
    """The number of threads with the most tokens a second, by 1 and by 8 clients alike."""
    sizes = Sizes(
        clients=(1, min(8, plan.clients)),
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
