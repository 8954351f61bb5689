"""GET /v1/models and /version."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Response
from pydantic import Field

from service.api.answers import (
    AnswerModel,
    ContextLength,
    Created,
    ModelId,
    NumericClass,
    described,
    json_response,
)
from service.api.context import ApiContext, Context
from service.api.generation.submit import check_model

router = APIRouter()


class Model(AnswerModel):
    """A model that is served here."""

    id: ModelId
    object: Literal["model"] = Field(description="The type of this object.")
    created: Created
    owned_by: str = Field(description="The server.")
    max_model_len: ContextLength
    numeric_class: NumericClass
    system_fingerprint: NumericClass


class ModelList(AnswerModel):
    """All models."""

    object: Literal["list"] = Field(description="The type of this object.")
    data: list[Model] = Field(description="The models.")


class Version(AnswerModel):
    """The server's version."""

    version: str = Field(description="The server's version.")


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


@router.get("/v1/models", responses=described(ModelList))
async def list_models(context: Context) -> Response:
    """The models served here, with their maximum context length and numeric class: within a class,
    equal requests get bit-identical answers.
    """
    return json_response({"object": "list", "data": [_card(context)]})


@router.get("/v1/models/{model:path}", responses=described(Model))
async def show_model(
    model: Annotated[str, Path(description="The id of the model.")], context: Context
) -> Response:
    """One model of the list."""
    check_model(model, context)
    return json_response(_card(context))


@router.get("/version", responses=described(Version))
async def version(context: Context) -> Response:
    """The server's version."""
    return json_response({"version": context.version})
