"""GET /v1/usage: tokens by day, key, tenant and model. A key sees its own; the admin port all."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import Field

from service.api.http.context import Caller, Context, from_app
from service.api.http.models import AnswerModel, Count, ModelId, described, json_response
from service.api.system.health import HealthContext
from service.errors import BadRequest
from service.queues.usage import NO_KEY, USAGE_KEPT, Usage

DEFAULT_DAYS = 30
FIRST_YEAR = 2000
_EPOCH = date(1970, 1, 1)

router = APIRouter()
admin_router = APIRouter()

Start = Annotated[
    date | None, Query(description=f"The first day (UTC); default: {DEFAULT_DAYS} days.")
]
End = Annotated[date | None, Query(description="The last day (UTC); default: today.")]


class UsageRow(AnswerModel):
    """What was used on a day."""

    date: str = Field(description="The day (UTC) on which the requests ended.")
    tenant: str = Field(description="The tenant.")
    key: str | None = Field(description="The name of the API key; null: none is required.")
    model: ModelId
    requests: Count = Field(description="Choices that an engine began.")
    prompt_tokens: Count = Field(description="Tokens of their prompts, each prompt once.")
    cached_tokens: Count = Field(description="Of these, found in the prefix cache.")
    generated_tokens: Count = Field(description="Tokens of the answers.")


class UsageList(AnswerModel):
    """Usage by day, tenant, key and model. What was not used is left out."""

    object: Literal["list"] = Field(description="The type of this object.")
    start_date: str = Field(description="The first day.")
    end_date: str = Field(description="The last day.")
    data: list[UsageRow] = Field(description="The rows, oldest first.")


@router.get("/v1/usage", responses=described(UsageList))
async def read_usage(
    context: Context,
    tenant: Caller,
    *,
    start_date: Start = None,
    end_date: End = None,
) -> Response:
    """Tokens of the caller's key by day and model. A request counts once, when it ends."""
    days = _days(start_date, end_date)
    key = NO_KEY if tenant.allowance is None else tenant.allowance.key
    rows = await context.queue.usage(days)
    own = [row for row in rows if (row.tenant, row.key) == (tenant.name, key)]
    return json_response(_listed(days, own))


@admin_router.get("/v1/usage", responses=described(UsageList))
async def read_all_usage(
    health: Annotated[HealthContext, from_app("health")],
    *,
    start_date: Start = None,
    end_date: End = None,
) -> Response:
    """Tokens of all keys by day, tenant and model."""
    days = _days(start_date, end_date)
    return json_response(_listed(days, await health.queue.usage(days)))


def _days(start: date | None, end: date | None) -> Sequence[int]:
    last = end or datetime.now(UTC).date()
    if last.year < FIRST_YEAR:
        raise BadRequest(f"end_date must be in {FIRST_YEAR} or later", param="end_date")
    first = start or last - timedelta(days=DEFAULT_DAYS - 1)
    num_days = (last - first).days + 1
    if not 1 <= num_days <= USAGE_KEPT:
        raise BadRequest(
            f"end_date must be 0 to {USAGE_KEPT - 1} days after start_date", param="end_date"
        )
    return range((first - _EPOCH).days, (last - _EPOCH).days + 1)


def _listed(days: Sequence[int], rows: Sequence[Usage]) -> dict[str, Any]:
    return {
        "object": "list",
        "start_date": _date(days[0]),
        "end_date": _date(days[-1]),
        "data": [
            {
                "date": _date(row.day),
                "tenant": row.tenant,
                "key": None if row.key == NO_KEY else row.key,
                "model": row.model,
                "requests": row.requests,
                "prompt_tokens": row.prompt_tokens,
                "cached_tokens": row.cached_tokens,
                "generated_tokens": row.generated_tokens,
            }
            for row in rows
        ],
    }


def _date(day: int) -> str:
    return (_EPOCH + timedelta(days=day)).isoformat()
