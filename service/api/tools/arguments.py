r"""The arguments of a call, from what the model writes to what the client gets.

    JsonObject    a JSON object                      -> the same text
    InputText     {"input": "..."} of a custom tool  -> the text of its input
    TaggedObject  <parameter=NAME>\nVALUE\n</parameter>\n ... -> a JSON object
    TaggedInput   the same of a custom tool          -> the text of its input

Each reads chunks, and returns how many characters it has read and what they add to the result. The
sum of the results depends on the text alone. Characters that it has not read come again with the
next chunk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from service.thinking import prefix_at_end

PARAMETER, VALUE, PARAMETER_END = "<parameter=", ">\n", "\n</parameter>\n"
_END = "</function>"  # the beginning of the tail of a call
INPUT = "input"  # the parameter of a custom tool
BEFORE_INPUT = f'{{"{INPUT}": "'
JSON_TYPES: Mapping[type, Sequence[str]] = MappingProxyType({
    type(None): ("null",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    list: ("array",),
    dict: ("object",),
})  # fmt: skip
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

Types = Mapping[str, Sequence[str]]
"""Parameter -> the JSON types of its value; missing or empty: any."""


class ArgumentsReader(Protocol):
    """State of the arguments of one call."""

    complete: bool  # all of them were read

    def read(self, text: str) -> tuple[int, str]:
        """Reads the beginning of a text: the number of characters, and what they add."""


class JsonObject:
    """Finds the end of the JSON object that begins with the first character read."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.complete = False

    def read(self, text: str) -> tuple[int, str]:
        for position, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.complete = True
                    return position + 1, text[: position + 1]
        return len(text), text


class InputText:
    """Decodes the only string of a JSON object."""

    def __init__(self) -> None:
        self._num_before = len(BEFORE_INPUT)  # characters still to be skipped
        self._in_string = True
        self.complete = False

    def read(self, text: str) -> tuple[int, str]:
        at = min(len(text), self._num_before)
        self._num_before -= at
        decoded: list[str] = []
        while self._in_string and at < len(text):
            char, size = _decoded(text[at : at + 12])
            if not size:
                return at, "".join(decoded)
            if char is None:
                self._in_string = False
            else:
                decoded.append(char)
            at += size
        if not self._in_string and at < len(text):  # the brace
            self.complete = True
            at += 1
        return at, "".join(decoded)


def _decoded(text: str) -> tuple[str | None, int]:
    """The first character of a JSON string's content, and the length of its escape: 0 if more must
    be read. None: the string ends here.
    """
    if text[0] == '"':
        return None, 1
    if text[0] != "\\":
        return text[0], 1
    if text[1:2] == "u":
        return _decoded_unit(text)
    return _ESCAPES.get(text[1:2], text[1:2]), min(2, 2 * (len(text) - 1))


def _decoded_unit(text: str) -> tuple[str, int]:
    r"""The same of an escape \uXXXX, or of two for one character. U+FFFD stands for half of one."""
    first, second = _code(text[2:6]), _code(text[8:12])
    is_high = 0xD800 <= first < 0xDC00
    may_continue = is_high and "\\u".startswith(text[6:8])
    if len(text) < 6 or (may_continue and len(text) < 12):
        return "", 0
    if may_continue and 0xDC00 <= second < 0xE000:
        return chr(0x10000 + ((first - 0xD800) << 10) + second - 0xDC00), 12
    return "\ufffd" if 0xD800 <= first < 0xE000 else chr(first), 6


def _code(digits: str) -> int:
    try:
        return int(digits, 16)
    except ValueError:
        return 0xFFFD


class _Tagged:
    """Reads elements up to the tail of the call."""

    def __init__(self) -> None:
        self._name: str | None = None  # of the open element
        self.complete = False

    def read(self, text: str) -> tuple[int, str]:
        at, added = 0, ""
        while not self.complete:
            step = self._read_head if self._name is None else self._read_value
            size, new = step(text[at:])
            added += new
            if not size:
                break
            at += size
        return at, added

    def _read_head(self, text: str) -> tuple[int, str]:
        if text.startswith(_END):
            self.complete = True
            return 0, self._close()
        end = text.find(VALUE)
        if not text.startswith(PARAMETER) or end < 0:
            return 0, ""
        self._name = text[len(PARAMETER) : end]
        return end + len(VALUE), self._open(self._name)

    def _read_value(self, text: str) -> tuple[int, str]:
        at = text.find(PARAMETER_END)
        if at >= 0:
            value = self._value(text[:at], ended=True)
            self._name = None
            return at + len(PARAMETER_END), value
        size = len(text) - len(prefix_at_end(text, PARAMETER_END))
        return size, self._value(text[:size], ended=False)

    def _open(self, name: str) -> str:
        """What the beginning of an element adds."""
        raise NotImplementedError

    def _value(self, text: str, *, ended: bool) -> str:
        """What more of the open element's value adds."""
        raise NotImplementedError

    def _close(self) -> str:
        """What the end of the arguments adds."""
        raise NotImplementedError


class TaggedInput(_Tagged):
    """The text of the first element."""

    def __init__(self) -> None:
        super().__init__()
        self._num = 0

    def _open(self, name: str) -> str:  # noqa: ARG002
        self._num += 1
        return ""

    def _value(self, text: str, *, ended: bool) -> str:  # noqa: ARG002
        return text if self._num == 1 else ""

    def _close(self) -> str:
        return ""


class TaggedObject(_Tagged):
    """A member of a JSON object per element. Of several with one name the first one counts."""

    def __init__(self, types: Types) -> None:
        super().__init__()
        self._types = types
        self._names: set[str] = set()
        self._is_text: bool | None = None  # of the open element; None: its value decides
        self._repeated = False
        self._held = ""

    def _open(self, name: str) -> str:
        types = self._types.get(name, ())
        self._is_text = None
        if types and ("string" not in types or len(types) == 1):
            self._is_text = "string" in types
        self._repeated = name in self._names
        if self._repeated:
            return ""
        before = ", " if self._names else "{"
        self._names.add(name)
        return f"{before}{json.dumps(name, ensure_ascii=False)}: " + ('"' if self._is_text else "")

    def _value(self, text: str, *, ended: bool) -> str:
        if self._repeated:
            return ""
        if self._is_text:
            return json.dumps(text, ensure_ascii=False)[1:-1] + ('"' if ended else "")
        if self._is_text is False:
            return text
        self._held += text
        if not ended:
            return ""
        text, self._held = self._held, ""
        return json_of(text, self._types.get(self._name or "", ()))

    def _close(self) -> str:
        return "}" if self._names else "{}"


def json_of(text: str, types: Sequence[str]) -> str:
    """The JSON of a value that may be text or of another type."""
    try:
        kind = _json_type(json.loads(text, parse_constant=_reject))
    except (ValueError, RecursionError):
        kind = frozenset()
    is_json = bool(kind & set(types)) if types else bool(kind)
    return text if is_json else _json(text)


def _reject(constant: str) -> None:
    raise ValueError(constant)


def _json_type(value: object) -> frozenset[str]:
    """The types of JSON schema that a value has; none for a string."""
    return frozenset(JSON_TYPES.get(type(value), ()))


def with_tags(arguments: str) -> str:
    """The elements of the text of a JSON object."""
    given: dict[str, Any] = json.loads(arguments)
    elements = [
        f"{PARAMETER}{name}{VALUE}{value if isinstance(value, str) else _json(value)}"
        for name, value in given.items()
    ]
    return "".join(element + PARAMETER_END for element in elements)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
