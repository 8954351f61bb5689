"""The wire types of a response's tools: functions, earlier calls and their results as input."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from service.api.fields import Label, ResponseContent, Text
from service.api.tools.schema import (
    MAX_TOOLS,
    Arguments,
    Function,
    FunctionName,
    FunctionTool,
    Mode,
    Parameters,
    ToolChoice,
    Unlisted,
    read_tool_choice,
)
from service.api.wire import StrictModel


class ResponseTool(StrictModel):
    """A tool. Functions are the only kind."""

    type: Literal["function"] = Field(description="Which kind of tool it is.")
    name: FunctionName = Field(description="What the model calls it by.")
    description: Text | None = Field(None, description="For the model: what it does, and when.")
    parameters: Parameters = Field(
        None, description="The JSON schema of its arguments, an object. Default: it has none."
    )
    strict: bool | None = Field(
        None, description="Refuse a schema that cannot be followed to the letter. Default false."
    )

    def as_function(self) -> FunctionTool:
        """As a chat has it."""
        function = Function.model_construct(
            name=self.name,
            description=self.description,
            parameters=self.parameters,
            strict=self.strict,
        )
        return FunctionTool.model_construct(type="function", function=function)

    def told(self) -> dict[str, Any]:
        """As the response repeats it."""
        return self.model_dump() | {"strict": self.strict or False}


class InputCall(StrictModel):
    """An item of the input: a call that an earlier response put out."""

    type: Literal["function_call"] = Field(description="What kind of item it is.")
    call_id: Label = Field(description="What the item with the result names it by.")
    name: FunctionName = Field(description="The function.")
    arguments: Arguments = Field(description="The text of a JSON object.")
    id: Label | None = Field(None, description="Accepted for compatibility; has no effect.")
    status: Label | None = Field(None, description="Accepted for compatibility; has no effect.")


class InputResult(StrictModel):
    """An item of the input: what a call gave."""

    type: Literal["function_call_output"] = Field(description="What kind of item it is.")
    call_id: Label = Field(description="The call that it answers.")
    output: ResponseContent = Field(description="The text, or a list of text parts.")
    id: Label | None = Field(None, description="Accepted for compatibility; has no effect.")
    status: Label | None = Field(None, description="Accepted for compatibility; has no effect.")


_KINDS = ("function_call", "function_call_output", "reasoning")


def kind_of_item(item: object) -> str:
    """The tag of the type that an item is read as."""
    kind = item.get("type") if isinstance(item, dict) else None
    return f"({kind})" if kind in _KINDS else "(message)"


def told_choice(choice: ToolChoice | None) -> Any:  # noqa: ANN401  # a string or an object
    """As the response repeats it."""
    if choice is None:
        return Mode.AUTO.value
    return choice.mode.value if choice.name is None else {"type": "function", "name": choice.name}


def _choice(value: object) -> ToolChoice | None:
    return None if value is None else read_tool_choice(value, nested=False)


_NAMED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"type": "string", "enum": ["function"]},
        "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
    },
    "required": ["type", "name"],
    "additionalProperties": False,
}
ResponseTools = Annotated[list[ResponseTool] | None, Field(max_length=MAX_TOOLS)]
ResponseToolChoice = Annotated[
    ToolChoice | None,
    Unlisted,
    PlainValidator(_choice),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "enum": [str(m) for m in Mode]}, _NAMED, {"type": "null"}]}
    ),
]
