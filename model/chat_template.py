"""Chat templates: messages -> the model's prompt text, with what users wrote kept apart.

A template is code from a checkpoint, so it runs in jinja2's immutable sandbox. A user's text is
data: if it spells one of the model's special tokens, `Disguise` keeps it from being read as one.
Works on text only, without token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import chain
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
Json = Any  # strings, numbers, lists and mappings of them


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

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of a conversation. Raises ChatTemplateError."""
        template = self._template
        try:
            pieces = template.generate({**variables, "range": _bounded_range()})
            return "".join(_bounded_output(pieces))
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


class Disguise:
    """Keeps special tokens out of users' text, through any template, without changing it.

    The first character of every special token's text that a user wrote is exchanged for a private
    stand-in, also where only the beginning of one stands at the end of a string, which the next
    string might complete. `remove` undoes it in what the template made. A stand-in is a code point
    that occurs in none of the strings, so nothing a user writes can be mistaken for one.
    """

    def __init__(self, specials: Collection[str], strings: Iterable[str]) -> None:
        self._specials = tuple(specials)
        self._longest = max(map(len, specials), default=0)
        used = set().union(*strings, *specials)
        unused = (chr(code) for code in _PRIVATE if chr(code) not in used)
        try:
            self.end = next(unused)  # marks where a message ends
            self._stand_ins = {first: next(unused) for first in {text[0] for text in specials}}
        except StopIteration:
            raise ChatTemplateError("the messages use every private code point") from None
        self._originals = {ord(self.end): None} | {
            ord(stand_in): first for first, stand_in in self._stand_ins.items()
        }
        self._pattern = _beginnings(specials) if specials else None

    def put_on(self, value: Json) -> Json:
        """A copy of a JSON-like value with every string disguised."""
        if isinstance(value, str):
            return self._disguised(value)
        if isinstance(value, Mapping):
            return {self.put_on(key): self.put_on(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.put_on(item) for item in value]
        return value

    def remove(self, text: str) -> str:
        """The text as the user wrote it."""
        return text.translate(self._originals)

    def _disguised(self, text: str) -> str:
        if self._pattern is None:
            return text
        tail = max(0, len(text) - self._longest + 1)
        starts = [
            at
            for at in range(tail, len(text))
            if any(special.startswith(text[at:]) for special in self._specials)
        ]
        for at in starts:
            text = f"{text[:at]}{self._stand_ins[text[at]]}{text[at + 1 :]}"
        return self._pattern.sub(lambda match: self._stand_ins[match[0]], text)


# Private use in the basic plane, planes 4 to 13 (unassigned), 15 and 16 (private use).
_PRIVATE = tuple(chain(range(0xE000, 0xF900), range(0xF0000, 0x10FFFE), range(0x40000, 0xE0000)))


def _beginnings(specials: Collection[str]) -> re.Pattern[str]:
    """Matches one character wherever a special token's text begins, overlaps included."""
    rests: dict[str, list[str]] = {}
    for special in specials:
        rests.setdefault(special[0], []).append(re.escape(special[1:]))
    return re.compile(
        "|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())
    )


def strings_of(value: object) -> Iterable[str]:
    """Every string in a JSON-like value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from strings_of(list(value))
        yield from strings_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_of(item)


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
    """The sandbox, without the operators and methods that make much out of little."""

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


def _bounded_output(pieces: Iterator[str]) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_OUTPUT:
            raise ChatTemplateLimitError(f"the prompt is longer than {MAX_OUTPUT} characters")
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
