"""Tools of a chat: which functions the model may call, and whether it must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.api.openai.schema import ChatBody
from service.api.tools.schema import Function, FunctionTool, Mode, ToolChoice
from service.errors import BadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a chat asks for that has tools, and does not choose none of them."""

    functions: tuple[Function, ...]  # that the model is told of
    may_call: tuple[int, ...]  # which of them it may call
    forced: bool  # it must call one, and say nothing
    parallel: bool  # it may call several; never if the choice names one function


def told_of(tools: Sequence[FunctionTool] | None) -> ToolUse | None:
    """What a prompt is made of where nothing is to be answered."""
    functions = tuple(tool.function for tool in tools or ())
    return ToolUse(functions=functions, may_call=(), forced=False, parallel=True)


def tool_use(body: ChatBody) -> ToolUse | None:
    """None where the answer is text alone. Raises BadRequest."""
    choice = body.tool_choice or ToolChoice(Mode.AUTO)
    if not body.tools:
        if body.tool_choice is not None and choice.mode is not Mode.NONE:
            raise BadRequest("tool_choice needs tools", param="tool_choice")
        return None
    functions = tuple(tool.function for tool in body.tools)
    _check_names(functions, body)
    names = [function.name for function in functions]
    if choice.name is not None and choice.name not in names:
        raise BadRequest("tool_choice names a function that is not in tools", param="tool_choice")
    if choice.mode is Mode.NONE:
        return None
    return ToolUse(
        functions=functions,
        may_call=tuple(i for i, name in enumerate(names) if choice.name in {None, name}),
        forced=choice.mode is Mode.REQUIRED,
        parallel=body.parallel_tool_calls is not False and choice.name is None,
    )


def _check_names(functions: tuple[Function, ...], body: ChatBody) -> None:
    seen: set[str] = set()
    for index, function in enumerate(functions):
        if function.name in seen:
            raise BadRequest(
                "tool names must be unique", param=f"{body.function_field.format(index)}.name"
            )
        seen.add(function.name)
