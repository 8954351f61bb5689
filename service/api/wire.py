"""Closed: what all objects of a body have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from service.errors import BadRequest

MAX_KEYS = 256


class Closed(BaseModel):
    """Strict: no string is taken for a number. Closed: no unknown field passes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_many_keys(cls, value: Any) -> Any:  # noqa: ANN401  # any JSON
        if isinstance(value, dict) and len(value) > MAX_KEYS:  # before each becomes an error
            message = f"an object of the body may have at most {MAX_KEYS} fields"
            raise BadRequest(message, code="object_above_max_length")
        return value
