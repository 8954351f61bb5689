"""`quire bench`: how fast a server answers at each rate, and how many answers are fast enough.

Requests arrive by chance (a Poisson process), whatever the server does with earlier ones. Goodput
is the rate of complete answers whose first token and further tokens came within the objectives.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from service.bench.client import (
    Outcome,
    Question,
    Summary,
    Target,
    arrive,
    complete,
    percentile,
    summarise,
)
from service.bench.dataset import Prompt, read_dataset
from service.bench.sse import Broken, call
from service.bench.workloads import make_prompt, poisson_arrivals
from service.errors import StartupError

PATIENCE = 120.0
"""Seconds after the last arrival for which answers are awaited."""

MAX_ERRORS = 5
"""Different errors that are printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """Limits of a good answer, in seconds."""

    first_token: float
    per_token: float  # mean of the tokens after the first

    def holds(self, outcome: Outcome) -> bool:
        return (
            outcome.error is None
            and outcome.time_to_first <= self.first_token
            and outcome.time_per_token <= self.per_token
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `quire bench` was asked for."""

    url: str
    model: str | None = None
    api_key: str = ""
    rates: Sequence[float] = (1.0, 2.0, 4.0)
    seconds: float = 30.0  # of arrivals, per rate
    dataset: Path | None = None
    prompt_tokens: int = 256  # about, of a synthetic prompt
    output_tokens: int = 128  # at most
    objectives: Objectives = field(
        default_factory=lambda: Objectives(first_token=1.0, per_token=0.1)
    )
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The result of one rate. Times in seconds; NaN if no answer was complete."""

    rate: float  # requests per second
    summary: Summary
    time_to_first_p99: float
    time_per_token_p99: float
    good: int  # answers within the objectives
    goodput: float  # of those, per second of arrivals


def bench(options: Options, *, console: Console) -> tuple[str, list[Point]]:
    """The model and a point per rate. Raises StartupError if the server cannot be measured."""
    return asyncio.run(_bench(options, console))


async def _bench(options: Options, console: Console) -> tuple[str, list[Point]]:
    prompts = _prompts(options)
    target = _target(options.url, options.api_key)
    model = options.model or await _first_model(target)
    fields = {"model": model, "stream_options": {"include_usage": True}}
    target = _target(options.url, options.api_key, fields=fields)
    await _warm_up(target, next(prompts))
    points = []
    bar = Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        for rate in options.rates:
            times = poisson_arrivals(str(options.seed), rate=rate, window=options.seconds)
            task = bar.add_task(f"{rate:g} requests/s", total=len(times))
            asked = list(itertools.islice(prompts, len(times)))
            points.append(
                await _measure(
                    target, asked, times, rate, options, done=partial(_advance, bar, task)
                )
            )
    return model, points


def _advance(bar: Progress, task: TaskID, _outcome: Outcome) -> None:
    bar.advance(task)


async def _measure(
    target: Target,
    prompts: Sequence[Prompt],
    times: Sequence[float],
    rate: float,
    options: Options,
    *,
    done: Callable[[Outcome], None],
) -> Point:
    outcomes, wall = await arrive(
        target,
        [Question(text=each.text, seed=i, temperature=0.0) for i, each in enumerate(prompts)],
        times=times,
        max_tokens=[each.max_tokens for each in prompts],
        patience=PATIENCE,
        done=done,
    )
    whole = [outcome for outcome in outcomes if outcome.error is None]
    good = sum(map(options.objectives.holds, outcomes))
    return Point(
        rate=rate,
        summary=summarise(outcomes, wall=wall),
        time_to_first_p99=percentile([each.time_to_first for each in whole], 99),
        time_per_token_p99=percentile([each.time_per_token for each in whole], 99),
        good=good,
        goodput=good / options.seconds,
    )


def _prompts(options: Options) -> Iterator[Prompt]:
    """Without end: those of the file in a random order, again and again; or synthetic ones."""
    if options.dataset is not None:
        found = read_dataset(options.dataset, max_tokens=options.output_tokens)
        random.Random(options.seed).shuffle(found)
        return itertools.cycle(found)
    return (
        Prompt(
            make_prompt(f"{options.seed}/{i}", num_tokens=options.prompt_tokens),
            options.output_tokens,
        )
        for i in itertools.count()
    )


def _target(url: str, key: str, *, fields: dict[str, Any] | None = None) -> Target:
    """Raises StartupError for a URL that is none of a server."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        raise StartupError("url: it must be http://HOST:PORT or https://HOST") from None
    if not parts.hostname:
        raise StartupError("url: it must be http://HOST:PORT or https://HOST")
    base = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
    return Target(
        host=parts.hostname,
        port=port,
        tls=parts.scheme == "https",
        path=f"{base}/completions",
        chat_path=f"{base}/chat/completions",
        chat_fields=fields or {},
        key=key,
    )


async def _first_model(target: Target) -> str:
    """The first model that the server lists. Raises StartupError."""
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    path = target.path.removesuffix("completions") + "models"
    address = (target.host, target.port)
    try:
        async with (
            asyncio.timeout(PATIENCE),
            call(address, "GET", path, headers=headers, tls=target.tls) as reply,
        ):
            if reply.status in {401, 403}:
                raise StartupError(
                    f"the server refuses the key: HTTP {reply.status}; see --api-key"
                )
            if reply.status != 200:
                raise StartupError(f"the server lists no models: HTTP {reply.status}")
            return str((await reply.json())["data"][0]["id"])
    except TimeoutError:
        raise StartupError(f"the server does not answer within {PATIENCE:g} s") from None
    except Broken as error:
        raise StartupError(f"the server does not answer: {error}") from None
    except (ValueError, LookupError, TypeError):
        raise StartupError("the server lists no models: name one by --model") from None


async def _warm_up(target: Target, prompt: Prompt) -> None:
    """One request, which is not counted. Raises StartupError if it fails."""
    question = Question(text=prompt.text, seed=0, temperature=0.0)
    outcome = await complete(target, question, max_tokens=prompt.max_tokens)
    if outcome.error is not None:
        raise StartupError(f"the first request failed: {outcome.error}")


def parse_rates(text: str) -> list[float]:
    """Raises StartupError unless it is a list of positive numbers."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise StartupError("rates: they must be positive numbers, separated by commas: 1,2,4")
    return rates


def report(options: Options, file: Path | None, *, console: Console) -> bool:
    """Measures, prints the table, writes JSON. Returns whether any answer was complete."""
    if file is not None:
        _ensure_writable(file)
    model, points = bench(options, console=Console(stderr=True))
    console.print(f"{model} at {options.url}", markup=False, highlight=False)
    console.print(table_of(points, options.objectives))
    errors = sorted({error for point in points for error in point.summary.errors})
    for error in errors[:MAX_ERRORS]:
        console.print(f"failed: {error}", style="red", markup=False, highlight=False)
    if file is not None:
        write_json(file, options, model, points)
    return any(point.summary.completion_tokens for point in points)


def _ensure_writable(file: Path) -> None:
    """Raises StartupError now, rather than after minutes of measuring."""
    try:
        with file.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise StartupError(f"json: {file.name}: {error.strerror or 'cannot be written'}") from None


def table_of(points: Sequence[Point], objectives: Objectives) -> Table:
    """A row per rate; times in milliseconds."""
    table = Table(
        title=f"objectives: first token in {objectives.first_token * 1e3:g} ms,"
        f" others {objectives.per_token * 1e3:g} ms each",
        title_justify="left",
    )
    for name in (
        "requests/s", "requests", "failed", "tokens/s", "first token p50 / p99, ms",
        "per token p50 / p99, ms", "goodput, requests/s",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for point in points:
        summary = point.summary
        table.add_row(
            f"{point.rate:g}",
            f"{summary.requests}",
            f"{summary.failures}",
            f"{summary.tokens_per_second:,.0f}",
            _pair(summary.time_to_first_p50, point.time_to_first_p99),
            _pair(summary.time_per_token_p50, point.time_per_token_p99),
            f"{point.goodput:.2f} ({point.good / summary.requests:.0%})",
        )
    return table


def _pair(first: float, second: float) -> str:
    return " / ".join("-" if math.isnan(each) else f"{each * 1e3:,.1f}" for each in (first, second))


def write_json(path: Path, options: Options, model: str, points: Sequence[Point]) -> None:
    """Everything that was asked for, without the key, and measured; NaN as null."""
    document = {
        "url": options.url,
        "model": model,
        "dataset": None if options.dataset is None else options.dataset.name,
        "seconds": options.seconds,
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "objectives": asdict(options.objectives),
        "seed": options.seed,
        "points": [asdict(point) for point in points],
    }
    path.write_text(json.dumps(_without_nan(document), indent=2) + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
