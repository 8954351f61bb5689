"""GET /v1/models and /version: what answers here."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Path, Response

from service.api.context import ApiContext, Context
from service.api.generation.submit import check_model

router = APIRouter()


def _json(value: dict[str, Any]) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _card(context: ApiContext) -> dict[str, Any]:
    card = context.card
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "quire",
        "max_model_len": card.max_model_len,
        "system_fingerprint": card.numeric_class,
        "numeric_class": card.numeric_class,
    }


@router.get(
    "/v1/models",
    summary="List models",
    description="The models served here, with their longest context and numeric class: within one "
    "class the same request has the same answer, bit by bit.",
    response_model=None,
)
async def list_models(context: Context) -> Response:
    """All models: the one."""
    return _json({"object": "list", "data": [_card(context)]})


@router.get(
    "/v1/models/{model:path}",
    summary="Show a model",
    description="One model of the list.",
    response_model=None,
)
async def show_model(
    model: Annotated[str, Path(description="The id of the model.")], context: Context
) -> Response:
    """One model."""
    check_model(model, context)
    return _json(_card(context))


@router.get(
    "/version",
    summary="Version",
    description="The server's version.",
    response_model=None,
)
async def version(context: Context) -> Response:
    """The server's version."""
    return _json({"version": context.version})
