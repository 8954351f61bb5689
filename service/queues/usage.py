"""Usage: tokens by day, tenant, key and model, counted when a request ends.

The count is written together with the terminal record, so a request counts once, however many
engines worked on it. What never ran does not count. The prompt and its cached tokens count for the
first choice of a prompt only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from service.messages import GenerationRequest, Submission

NO_KEY = "-"
"""Stands for the key of calls without one."""
USAGE_KEPT = 400
"""Days."""
DAY = 86_400
"""Seconds."""
_KINDS = ("n", "p", "c", "g")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What was used on a day (since 1970, UTC) by one tenant, key and model."""

    day: int
    tenant: str
    key: str
    model: str
    requests: int = 0  # choices
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt tokens
    generated_tokens: int = 0


def account_of(submission: Submission) -> str:
    """Tenant, key and model, in one string."""
    allowance = submission.allowance
    key = NO_KEY if allowance is None else allowance.key
    return f"{submission.tenant} {key} {submission.model}"


def counted_prompt(request: GenerationRequest) -> int:
    """The prompt tokens that a request counts for."""
    return 0 if request.sampling.choice else len(request.prompt_ids)


def counts_output(request: GenerationRequest) -> bool:
    """Whether its records are tokens: those of an encoding are vectors and scores."""
    return request.encoding is None


def decode_usage(day: int, counts: Mapping[str, int]) -> list[Usage]:
    """The rows of a day. `counts`: `<kind> <account>` -> number; the kinds are n (requests), p
    (prompt), c (cached) and g (generated tokens).
    """
    accounts = sorted({name.partition(" ")[2] for name in counts})
    rows = []
    for account in accounts:
        tenant, _, rest = account.partition(" ")
        key, _, model = rest.partition(" ")
        numbers = [counts.get(f"{kind} {account}", 0) for kind in _KINDS]
        requests, prompt, cached, generated = numbers
        rows.append(
            Usage(
                day=day,
                tenant=tenant,
                key=key,
                model=model,
                requests=requests,
                prompt_tokens=prompt,
                cached_tokens=cached,
                generated_tokens=generated,
            )
        )
    return rows


def sum_usage(parts: Iterable[Sequence[Usage]]) -> list[Usage]:
    """The sums of what several shards counted."""
    sums: dict[tuple[int, str, str, str], Usage] = {}
    for row in (row for rows in parts for row in rows):
        name = (row.day, row.tenant, row.key, row.model)
        other = sums.get(name)
        sums[name] = row if other is None else _plus(row, other)
    return [sums[name] for name in sorted(sums)]


def _plus(a: Usage, b: Usage) -> Usage:
    return Usage(
        day=a.day,
        tenant=a.tenant,
        key=a.key,
        model=a.model,
        requests=a.requests + b.requests,
        prompt_tokens=a.prompt_tokens + b.prompt_tokens,
        cached_tokens=a.cached_tokens + b.cached_tokens,
        generated_tokens=a.generated_tokens + b.generated_tokens,
    )
