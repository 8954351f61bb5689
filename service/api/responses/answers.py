"""The shapes of answers about a response, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from service.api.answers import AnswerModel, CallId, ModelId


class ResponseObject(AnswerModel):
    """A response in its current state."""

    id: str = Field(description="The id to retrieve it by.")
    object: Literal["response"] = Field(description="The type of this object.")
    created_at: float = Field(description="When the call arrived, in Unix seconds.")
    status: str = Field(
        description="queued, in_progress, completed, incomplete, failed or cancelled."
    )
    model: ModelId
    output: list[dict[str, Any]] = Field(description="Messages and tool calls of the assistant.")


class ResponseDeleted(AnswerModel):
    """Confirms that a response was deleted."""

    id: CallId
    object: Literal["response"] = Field(description="The type of the deleted object.")
    deleted: Literal[True] = Field(description="Always true.")
