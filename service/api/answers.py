"""Answers: JSON, and how the OpenAPI document describes them: base models, `responses=` of a route.

The models describe; no answer is built from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import orjson
from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field

EVENTS = "text/event-stream"


class AnswerModel(BaseModel):
    """Fields without a default are always present; more may be added."""

    model_config = ConfigDict(protected_namespaces=())


Count = Annotated[int, Field(ge=0)]
CallId = Annotated[str, Field(description="The call's id, prefixed with the kind of answer.")]
Created = Annotated[Count, Field(description="When the call arrived, in Unix seconds.")]
ModelId = Annotated[str, Field(description="The id of the model.")]
ContextLength = Annotated[
    Count, Field(description="Maximum context length (prompt + output), in tokens.")
]
NumericClass = Annotated[
    str,
    Field(description="Numeric class: within it, equal requests get bit-identical answers."),
]
Assistant = Annotated[Literal["assistant"], Field(description="The role of the author.")]
TokenList = Annotated[list[Count], Field(description="Token ids.")]


class ErrorFields(BaseModel):
    """What is wrong."""

    message: str = Field(description="For people: what was wrong, and the limit.")
    type: str = Field(description="The kind of error, as OpenAI names it.")
    param: str | None = Field(description="The dotted path of the invalid field.")
    code: str = Field(description="For programs: the error's code.")
    request_id: str = Field(
        "",
        description="With `shutting_down`: the call to resume at another replica, if possible.",
    )
    last_event_id: str = Field("", description="With it: the event to resume after.")


class ErrorBody(BaseModel):
    """The body of every answer with status 400 or higher."""

    error: ErrorFields = Field(description="What is wrong.")


class StreamEvent(AnswerModel):
    """A server-sent event. Keep-alive comments between events are not listed."""

    data: str = Field(description="A chunk of the answer as JSON; [DONE] ends some streams.")
    event: str = Field("", description="The type of the event, in APIs that have event types.")
    id: str = Field("", description="The position to resume after, if event ids were requested.")


class StreamCancelled(AnswerModel):
    """Confirms that a call was cancelled."""

    id: CallId
    object: Literal["stream"] = Field(description="The type of this object.")
    cancelled: Literal[True] = Field(description="Always true.")


def json_response(value: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), media_type="application/json", headers=headers)


def described(model: type[BaseModel] | None, *, stream: bool = False) -> dict[int | str, Any]:
    """The `responses=` of a route that answers with this JSON, or with a stream of events."""
    answer: dict[str, Any] = {"description": "The answer."}
    if model is not None:
        answer["model"] = model
    if stream:
        answer["description"] = (
            "The answer: one JSON object, or with `stream` its chunks as events."
        )
        answer["content"] = {EVENTS: {"schema": StreamEvent.model_json_schema()}}
    return {200: answer}


def refused(model: type[BaseModel]) -> dict[int | str, Any]:
    """The `responses=` of a router or an application whose errors have this shape."""
    return {"4XX": {"model": model, "description": "The request was rejected."}}
