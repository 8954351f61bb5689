"""What a chat template writes for tools and for calls, found out by rendering short probes.

    CallRendering.text         a chat in which the assistant calls PROBE_NAME
    .lists_tools               the template describes the tools that it is given
    .takes_objects, takes_text arguments may be an object, or its JSON text
    .takes_content             a message with calls may have a text, too

Templates differ in what they accept: arguments as an object or as text, and no content as an empty
string or as none. The first combination whose call appears in the output is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from model.text.chat_template import ChatTemplateError, ChatTemplateLimitError

PROBE_NAME = "probe_function"
PROBE_KEY, PROBE_VALUE = "probe_key", "probe value"
_ARGUMENTS = {PROBE_KEY: PROBE_VALUE}
_TEXT = json.dumps(_ARGUMENTS)
_CONTENT = "probe content"
_ID = "probe0001"  # nine letters and digits, as Mistral's templates require
_TOOL = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {PROBE_KEY: {"type": "string"}}},
    },
}

Render = Callable[..., str]
"""Renders messages, with more variables by name. Raises ChatTemplateError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRendering:
    """What one template does with tools and calls. The default: it renders neither."""

    text: str = ""  # empty: it renders no calls
    lists_tools: bool = False
    takes_objects: bool = False
    takes_text: bool = False  # and writes it as it is
    takes_content: bool = True  # in a message with calls; else a message of its own has it
    empty: str | None = ""  # the content of a message that has calls and no text


def probe_calls(render: Render) -> CallRendering:
    """Renders the probes. Raises ChatTemplateLimitError if one of them exceeds a limit."""
    question = {"role": "user", "content": "question"}
    listed = PROBE_NAME in _rendered(render, [question], tools=[_TOOL])
    contents: tuple[str | None, ...] = ("", None)
    for empty in contents:
        of_object = _called(render, empty, _ARGUMENTS)
        of_text = _called(render, empty, _TEXT)
        if not of_object and not of_text:
            continue
        with_content = _called(render, _CONTENT, _ARGUMENTS if of_object else _TEXT)
        return CallRendering(
            text=of_object or of_text,
            lists_tools=listed,
            takes_objects=bool(of_object),
            takes_text=_TEXT in of_text,
            takes_content=_CONTENT in with_content,
            empty=empty,
        )
    return CallRendering(lists_tools=listed)


def _called(render: Render, content: str | None, arguments: dict[str, str] | str) -> str:
    """A chat with a call and its result; empty if the template refuses it or drops the call."""
    function = {"name": PROBE_NAME, "arguments": arguments}
    call = {"id": _ID, "type": "function", "function": function}
    rendered = _rendered(
        render,
        [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": _ID, "content": "result"},
        ],
    )
    called = PROBE_NAME in rendered and PROBE_KEY in rendered and PROBE_VALUE in rendered
    return rendered if called else ""


def _rendered(render: Render, messages: list[dict[str, Any]], **variables: object) -> str:
    try:
        return render(messages, **variables)
    except ChatTemplateLimitError:
        raise
    except ChatTemplateError:
        return ""
