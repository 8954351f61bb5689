"""Chat templates: messages -> the model's prompt text.

A template is code from a checkpoint, so it runs in jinja2's immutable sandbox. `disguise` keeps
special tokens out of what users wrote. Works on text only, without token ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE = 256 * 1024  # characters; the longest published ones have about 20,000
MAX_OUTPUT = 16 * 1024**2  # characters
MAX_RANGE = 10_000  # elements of all range() calls of one rendering
MAX_INDENT = 16

Messages = Sequence[Mapping[str, Any]]


class ChatTemplateError(ValueError):
    """A template that is missing, refused, or that fails on these messages."""


class ChatTemplateLimitError(ChatTemplateError):
    """A template that exceeds a limit on these messages; the text names the limit."""


class ChatTemplate:
    """One compiled template. Compiled on first use, safe to share between threads afterwards.

    Renders in the caller's process: the sandbox restricts what a template may call, but not how
    much time and memory it takes. `template_renderer` adds those limits.
    """

    def __init__(self, source: str) -> None:
        self._source = source

    @cached_property
    def _template(self) -> Template:
        if len(self._source) > MAX_TEMPLATE:
            raise ChatTemplateLimitError(
                f"the chat template is longer than {MAX_TEMPLATE} characters"
            )
        try:
            return _environment().from_string(self._source)
        except (TemplateError, RecursionError, ValueError) as error:
            raise ChatTemplateError(f"the chat template is malformed: {error}") from None

    def render(self, variables: Mapping[str, Any], *, max_output: int = MAX_OUTPUT) -> str:
        """The text of a conversation, of at most `max_output` characters.

        Raises ChatTemplateError.
        """
        template = self._template
        try:
            pieces = template.generate({**variables, "range": _bounded_range()})
            return "".join(_bounded_output(pieces, max_output))
        except ChatTemplateError:
            raise
        except (
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise ChatTemplateError(f"the chat template failed: {str(error)[:200]}") from None


def with_plain_content(messages: Messages) -> list[dict[str, Any]]:
    """Messages whose content is a string: text parts are joined. Raises ChatTemplateError."""
    plain = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list | tuple):
            content = "".join(_part_text(part) for part in content)
        plain.append({**message, "content": content})
    return plain


def _part_text(part: object) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise ChatTemplateError("a content part is not of type text")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, without operators and methods that multiply the size of their input."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise SecurityError(f"{operator} is for numbers only")
        if operator == "**":
            raise SecurityError("** is not available")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is not None:
            raise SecurityError("str.format is not available")
        return None

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        if isinstance(obj, str) and attr in _WIDENING:
            return False
        return super().is_safe_attribute(obj, attr, value)


_WIDENING = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})
_WIDENING_FILTERS = ("center", "format", "indent", "wordwrap")


class _Generation(Extension):
    """`{% generation %}`: training marks an assistant's text with it; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # prompts are not HTML
        extensions=[loopcontrols, _Generation],
    )
    for name in _WIDENING_FILTERS:
        del environment.filters[name]
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  (templates pass them in this order)
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    if indent is not None and not 0 <= indent <= MAX_INDENT:
        raise ChatTemplateError(f"tojson indents by 0 to {MAX_INDENT}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: object) -> str:
    raise ChatTemplateError(str(message)[:500])


def _strftime_now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)


def _bounded_output(pieces: Iterator[str], max_output: int) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > max_output:
            raise ChatTemplateLimitError(
                f"the chat template writes more than {max_output} characters for these messages"
            )
        yield piece


def _bounded_range() -> Callable[..., range]:
    left = MAX_RANGE

    def bounded(*arguments: int) -> range:
        nonlocal left
        numbers = range(*arguments)
        left -= len(numbers)
        if left < 0:
            raise ChatTemplateLimitError(f"the chat template counts further than {MAX_RANGE}")
        return numbers

    return bounded
