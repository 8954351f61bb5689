"""Fits messages to what a chat template renders, so that no instruction vanishes.

Templates ignore roles that they do not know, and many render a system message only if it is the
first one. `TemplateFit` renders short probes to find out what a template does with instructions
(messages of the roles system and developer), with an answer that was empty, and with a message of
the user after another one or after the result of a call, as agents send them:

    the template does not know `developer`           the role becomes `system`
    it drops or refuses later instruction messages   all become one, the first message
    it drops or refuses the first one, too           its text begins the first user message
    it refuses an empty assistant message            a space becomes its text
    it refuses two messages of the user in a row     they become one
    it refuses the user after a result               the result gets the user's text

A template echoes an unknown role if it renders `developer` as it renders a role that does not
exist; that does not count as knowing it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from model.text.chat_template import ChatTemplateError, ChatTemplateLimitError

Message = dict[str, Any]
Render = Callable[[list[Message]], str]

_INSTRUCTIONS = frozenset({"system", "developer"})
_UNKNOWN = "nonesuch"  # a role of no template
_BEFORE_USER = frozenset({"user", "tool"})
_CALL_ID = "a1b2c3d4e"  # Mistral's have nine characters
_CALLING: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": _CALL_ID, "type": "function", "function": {"name": "call", "arguments": {}}}
    ],
}
_FIRST, _SECOND, _THIRD = "instruction one", "instruction two", "instruction three"


class TemplateFit:
    """What one template does with messages. Probes each property at most once."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._known: dict[tuple[str, ...], bool] = {}

    def fit(self, messages: list[Message]) -> list[Message]:
        """The messages as the template renders them.

        Raises ChatTemplateLimitError if a probe exceeds a limit.
        """
        if any(map(_is_empty, messages)) and not self._empty:
            messages = [_with_space(message) for message in messages]
        return self._in_turns(self._with_instructions(messages))

    def _in_turns(self, messages: list[Message]) -> list[Message]:
        """A message of the user joins the one before if the template wants another role there."""
        joined: list[Message] = []
        for message in messages:
            before = joined[-1].get("role") if joined and message.get("role") == "user" else None
            if before not in _BEFORE_USER or self._takes_user_after(before):
                joined.append(message)
            else:
                joined[-1] = _joined(joined[-1], message)
        return joined

    def _with_instructions(self, messages: list[Message]) -> list[Message]:
        """All instructions at the positions that the template renders."""
        if not any(map(_instructs, messages)):
            return messages
        if any(message.get("role") == "developer" for message in messages) and not self._developer:
            messages = [_as_system(message) for message in messages]
        first, *later = [message["role"] for message in messages if _instructs(message)]
        if not _instructs(messages[0]):
            later.append(first)
        if not all(self._keeps_later(first, role) for role in set(later)):
            messages = _with_one_instruction(messages)
        if _instructs(messages[0]) and not self._keeps_first(messages[0]["role"]):
            messages = _without_instruction(messages)
        return messages

    @property
    def _developer(self) -> bool:
        return self._once("developer", probe=self._probe_developer)

    @property
    def _empty(self) -> bool:
        return self._once("empty", probe=self._probe_empty)

    def _keeps_first(self, role: str) -> bool:
        return self._once("first", role, probe=lambda: self._probe_first(role))

    def _keeps_later(self, first: str, later: str) -> bool:
        return self._once("later", first, later, probe=lambda: self._probe_later(first, later))

    def _takes_user_after(self, role: str) -> bool:
        return self._once("after", role, probe=lambda: self._probe_user_after(role))

    def _once(self, *key: str, probe: Callable[[], bool]) -> bool:
        if key not in self._known:
            self._known[key] = probe()
        return self._known[key]

    def _probe_developer(self) -> bool:
        rendered = self._rendered(_said("developer", _FIRST), _said("user", "question"))
        other = self._rendered(_said(_UNKNOWN, _FIRST), _said("user", "question"))
        if rendered is None or _FIRST not in rendered:
            return False
        return other is None or _without_role(rendered) != _without_role(other)

    def _probe_empty(self) -> bool:
        turns = [_said("user", "question"), _said("assistant", ""), _said("user", "question")]
        return self._rendered(*turns) is not None

    def _probe_first(self, role: str) -> bool:
        rendered = self._rendered(_said(role, _FIRST), _said("user", "question"))
        return rendered is not None and _FIRST in rendered

    def _probe_later(self, first: str, later: str) -> bool:
        rendered = self._rendered(
            _said(first, _FIRST),
            _said(later, _SECOND),
            _said("user", "question"),
            _said("assistant", "answer"),
            _said(later, _THIRD),
            _said("user", "question"),
        )
        return rendered is not None and all(text in rendered for text in (_FIRST, _SECOND, _THIRD))

    def _probe_user_after(self, role: str) -> bool:
        """A template that refuses what comes before decides nothing."""
        before = [_said("user", "question")]
        if role == "tool":
            before += [_CALLING, _said("tool", "result") | {"tool_call_id": _CALL_ID}]
        taken = self._rendered(*before, _said("user", "question")) is not None
        return taken or self._rendered(*before) is None

    def _rendered(self, *messages: Message) -> str | None:
        """None if the template refuses the messages."""
        try:
            return self._render(list(messages))
        except ChatTemplateLimitError:
            raise
        except ChatTemplateError:
            return None


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _instructs(message: Message) -> bool:
    return message.get("role") in _INSTRUCTIONS


def _is_empty(message: Message) -> bool:
    if message.get("role") != "assistant" or message.get("tool_calls"):
        return False
    return not message.get("content")


def _with_space(message: Message) -> Message:
    return message | {"content": " "} if _is_empty(message) else message


def _as_system(message: Message) -> Message:
    return message | {"role": "system"} if _instructs(message) else message


def _without_role(rendered: str) -> str:
    """The text with the roles of `_probe_developer` made equal, also if they are capitalised."""
    return rendered.casefold().replace("developer", _UNKNOWN)


def _with_one_instruction(messages: list[Message]) -> list[Message]:
    """All instructions in the first message, a paragraph each."""
    instructions = [message for message in messages if _instructs(message)]
    content = "\n\n".join(message["content"] or "" for message in instructions)
    others = [message for message in messages if not _instructs(message)]
    return [instructions[0] | {"content": content}, *others]


def _without_instruction(messages: list[Message]) -> list[Message]:
    """The first message's text is prepended to the first user message, if there is one."""
    instruction, *others = messages
    for index, message in enumerate(others):
        if message.get("role") == "user":
            content = f"{instruction['content']}\n\n{message['content']}"
            return [*others[:index], message | {"content": content}, *others[index + 1 :]]
    return messages


def _joined(first: Message, second: Message) -> Message:
    """The first message with the text of both, a paragraph each."""
    return first | {"content": f"{first['content']}\n\n{second['content']}"}
