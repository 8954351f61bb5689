"""The wire types of structured output: OpenAI's `response_format`, vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from service.api.fields import FieldError, FieldNames, Label, StrictModel, Text
from service.api.structured.output import Constraint, JsonOutput, Kind, json_output
from service.errors import BadRequest

MAX_CHOICES = 1024


def _texts(value: object) -> object:
    """Runs before the items are validated, so that a rejection stays cheap."""
    if isinstance(value, list) and len(value) > MAX_CHOICES:
        raise FieldError("array_above_max_length", f"may have at most {MAX_CHOICES} items")
    return value


class JsonSchema(StrictModel):
    """A JSON schema with a name."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: Label | None = Field(None, description="The name of the schema; has no effect.")
    description: Text | None = Field(
        None, description="A description of the schema; has no effect."
    )
    schema_: dict[str, Any] = Field(alias="schema", description="The schema of the answer.")
    strict: bool | None = Field(
        None,
        description="Reject a schema that cannot be enforced exactly. Default false: parts that "
        "cannot be enforced are left to the model.",
    )


class ResponseFormat(StrictModel):
    """OpenAI's format of the answer."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="Any text, a JSON object, or JSON of a schema."
    )
    json_schema: JsonSchema | None = Field(None, description="Only with the type json_schema.")

    def output(self, names: FieldNames) -> JsonOutput | None:
        """Returns None for any text. Raises BadRequest."""
        schema = self.json_schema
        return json_output(
            self.type,
            schema=None if schema is None else schema.schema_,
            strict=None if schema is None else schema.strict,
            names=names,
        )


class StructuredOutputs(StrictModel):
    """vLLM's constraints on the answer: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(
        None, alias="json", description="A JSON schema that the answer must match."
    )
    json_object: bool | None = Field(None, description="The answer must be a JSON object.")
    regex: Text | None = Field(
        None,
        min_length=1,
        description="A regular expression that must match the whole answer: without anchors, "
        "look-around and back references.",
    )
    choice: Annotated[list[Text] | None, BeforeValidator(_texts)] = Field(
        None, min_length=1, description="The answer must be one of these texts."
    )
    grammar: Text | None = Field(
        None,
        min_length=1,
        description="A grammar of the answer, in Lark or in llama.cpp's GBNF.",
    )

    def constraint(self) -> Constraint:
        """Raises BadRequest unless exactly one field is given."""
        fields: dict[Kind, dict[str, Any] | str | tuple[str, ...] | None] = {
            "json": self.json_,
            "json_object": {} if self.json_object else None,
            "regex": self.regex,
            "choice": None if self.choice is None else tuple(self.choice),
            "grammar": self.grammar,
        }
        given = [(kind, value) for kind, value in fields.items() if value is not None]
        if len(given) != 1:
            raise BadRequest(
                f"structured_outputs needs exactly one of {', '.join(fields)}",
                param="structured_outputs",
            )
        ((kind, value),) = given
        return Constraint(kind=kind, value=value)
