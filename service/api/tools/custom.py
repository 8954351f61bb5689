r"""The grammar of a custom tool's input, within what the model writes around the input.

A Lark grammar of a text becomes one that can be embedded: `embedded_lark`. Its terminals become
rules, and its regular expressions are spelled out character by character, because a lexer would
read on greedily into what follows the input. Many formats of calls have the input as a JSON string;
then each character that JSON escapes is replaced by its escape:

    LINE: /[^b]*/ "\n"      ->      line: /\\n|\\"|...|[[^b]&&[^"\\\x00-\x1f]]/* "\\n"

Not supported are special tokens, and Lark's directives except imports of `common` and `%ignore`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

MAX_CHARS = 32_768  # of a grammar, before and after
_MAX_IGNORED = 16
_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|\#[^\n]*)
    |(?P<string>"(?:[^"\\\n]|\\.)*"i?)
    |(?P<regex>/(?:[^/\\\n]|\\.)+/[a-z]*)
    |%import[ \t]+common\.(?P<common>\w+)(?:[ \t]*->[ \t]*(?P<renamed>\w+))?[ \t]*(?=\n|$)
    |(?P<alias>->[ \t]*\w+)
    |(?P<ignore>%ignore\b)
    |(?P<name>\w+)
    |(?P<bad>[%<@$~&])
    |(?P<unclosed>["/])
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
# The terminals of Lark's `common` that contain characters which JSON escapes.
_COMMON = {
    "LF": r"\n",
    "CR": r"\r",
    "NEWLINE": r"(?:\r?\n)+",
    "WS": r"[ \t\f\r\n]+",
    "WS_INLINE": r"[ \t]+",
    "ESCAPED_STRING": r'"(?:[^"\\]|\\.)*"',
}
_SPECIALS = [chr(code) for code in range(32)] + ['"', "\\"]
_PLAIN_CLASS = r'[^"\\\x00-\x1f]'
# A unit of a regular expression stands for one character: a class, an escape or itself.
_UNIT = re.compile(
    r"""(?P<bad>\(\?(?!P?<\w+>|:)|\\[AzbBGZ]|\\x(?![0-9a-fA-F]{2})|\\u(?![0-9a-fA-F]{4}))
    |(?P<group>\((?:\?P?<\w+>|\?:)?)
    |(?P<repeat>(?:[*+?]|\{[0-9]+(?:,[0-9]*)?\})\??)
    |(?P<class>\[\^?\]?(?:[^\]\\\[]|\\.)*\])
    |(?P<escape>\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[pP]\{\w+\}|.))
    |(?P<operator>[|)])
    |(?P<unclosed>[\[\]{}^$])
    |(?P<char>.)""",
    re.VERBOSE | re.DOTALL,
)


class UnsupportedGrammarError(ValueError):
    """A grammar that cannot be embedded. The text says what is not supported."""


def embedded_lark(text: str, *, escaped: bool) -> str:
    """A grammar of the same texts or, if `escaped`, of them as contents of JSON strings. Raises
    UnsupportedGrammarError.
    """
    if len(text) > MAX_CHARS:
        raise _too_long()
    tokens = list(_tokens(text))
    if any(kind == "ignore" for kind, _ in tokens):
        return _with_ignored(text, tokens, escaped=escaped)
    return _joined(_Embedding(text, tokens, escaped=escaped).parts())


def _tokens(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or ""
        if kind == "unclosed":
            raise UnsupportedGrammarError("has a string or a regular expression without an end")
        if kind == "bad":
            raise UnsupportedGrammarError(
                "may not contain special tokens, the operators & and ~, and directives other than "
                "%import common and %ignore"
            )
        yield kind, match


def _joined(parts: Iterable[str]) -> str:
    """Stops at the limit: a short grammar may stand for a long one."""
    joined, size = [], 0
    for part in parts:
        size += len(part)
        if size > MAX_CHARS:
            raise _too_long()
        joined.append(part)
    return "".join(joined)


def _too_long() -> UnsupportedGrammarError:
    return UnsupportedGrammarError(
        f"is too long: spelled out for each character, it may have at most {MAX_CHARS} characters"
    )


def _with_ignored(text: str, tokens: list[tuple[str, re.Match[str]]], *, escaped: bool) -> str:
    """Blanks are ignored between terminals, which therefore stay terminals: so they may not contain
    what JSON escapes. The ignored blanks become a terminal per character.
    """
    if not escaped:
        return text
    blanks, lines = set[str](), text
    ignored = re.findall(r"%ignore[ \t]+\S[^\n]*", text)
    if len(ignored) > _MAX_IGNORED:
        raise UnsupportedGrammarError(f"may have %ignore at most {_MAX_IGNORED} times")
    for line in ignored:
        operand = line.removeprefix("%ignore").strip()
        definition = re.search(rf"^{re.escape(operand)}[ \t]*:([^\n]*)$", text, re.MULTILINE)
        pattern = _COMMON.get(operand, operand) if definition is None else definition[1].strip()
        blanks.update(_characters(pattern))
        lines = lines.replace(line, "")
        if definition is not None and len(re.findall(rf"\b{re.escape(operand)}\b", lines)) == 1:
            lines = lines.replace(definition[0], "")
    for kind, match in tokens:
        needs = (kind == "regex" and _needs_escapes(match[0])) or (
            kind == "string" and "\\" in _content(match[0])
        )
        if needs and match[0] in lines:
            raise UnsupportedGrammarError(
                "may not combine %ignore with terminals that contain line breaks, tabs, quotes, "
                "backslashes or the complement of characters"
            )
    imported = "|".join(_COMMON)
    lines = re.sub(rf"%import[ \t]+common\.({imported})[ \t]*(?=\n|$)", "", lines)
    return lines + "".join(f"\n%ignore {json.dumps(_escape(blank))}" for blank in sorted(blanks))


def _characters(pattern: str) -> Iterator[str]:
    """The characters of a terminal that is one of a set of them, or several."""
    if pattern.startswith('"') and len(text := _text_of(pattern)) == 1:
        return iter(text)
    match = re.fullmatch(r"/?(\[(?:[^\]\\\[^]|\\.)+\]|\\?.)[*+]?/?[*+]?", pattern)
    if match is None:
        raise UnsupportedGrammarError("may ignore only single characters, and sets of them")
    units = re.compile(match[1], re.ASCII)
    return (chr(code) for code in range(128) if units.fullmatch(chr(code)))


def _needs_escapes(token: str) -> bool:
    pattern, _, flags = token[1:].rpartition("/")
    return any(
        match.lastgroup in {"class", "escape", "char"} and _specials_in(match[0], flags)
        for match in _UNIT.finditer(pattern)
    )


class _Embedding:
    """One grammar on its way."""

    def __init__(
        self, text: str, tokens: list[tuple[str, re.Match[str]]], *, escaped: bool
    ) -> None:
        self._tokens = tokens
        self._escaped = escaped
        self._prefix = "terminal"
        while self._prefix in text:
            self._prefix += "l"
        # Terminals that the compiler defines keep their names.
        self._known = {
            match["renamed"] or match["common"]
            for kind, match in tokens
            if match["common"] and match["common"] not in _COMMON
        }

    def parts(self) -> Iterator[str]:
        for kind, match in self._tokens:
            token = match[0]
            if match["common"]:
                yield self._import(token, match["common"], match["renamed"])
            elif kind == "string":
                yield self._string(token)
            elif kind == "regex":
                pattern, _, flags = token[1:].rpartition("/")
                yield spelled_out(pattern, flags, escaped=self._escaped)
            elif kind == "name":
                yield self._name(token)
            elif kind not in {"comment", "alias"}:
                yield token

    def _import(self, token: str, name: str, renamed: str | None) -> str:
        if name not in _COMMON:
            return token
        spelled = spelled_out(_COMMON[name], escaped=self._escaped)
        return f"{self._name(renamed or name)}: {spelled}"

    def _name(self, name: str) -> str:
        is_terminal = name.lstrip("_")[:1].isupper() and name not in self._known
        return f"{self._prefix}_{name.lower()}" if is_terminal else name

    def _string(self, token: str) -> str:
        """A string whose escapes are those of JSON."""
        flag = "i" if token.endswith("i") else ""
        content = _content(token) if self._escaped else _text_of(token)
        if flag and self._escaped and "\\" in content:
            raise UnsupportedGrammarError("may not ignore the case of strings with escapes")
        return json.dumps(content, ensure_ascii=False) + flag


def _text_of(token: str) -> str:
    try:
        text: str = json.loads(token.removesuffix("i"))
    except ValueError:
        raise UnsupportedGrammarError("may contain only the escapes of JSON in strings") from None
    return text


def _content(token: str) -> str:
    """The text of a string as the content of a JSON string."""
    return _escape(_text_of(token))


def _escape(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def spelled_out(pattern: str, flags: str = "", *, escaped: bool) -> str:
    """A regular expression as an expression of Lark, of a terminal per character. Raises
    UnsupportedGrammarError.
    """
    return f"({_joined(_spelled(pattern, flags, escaped=escaped))})"


def _spelled(pattern: str, flags: str, *, escaped: bool) -> Iterator[str]:
    kept = flags.replace("s", "") if escaped else flags
    empty = True  # Lark has no empty alternatives
    for kind, unit in _units(pattern, flags):
        if kind == "operator" and empty:
            yield '""'
        match kind:
            case "group":
                yield "("
            case "operator":
                yield unit
            case "repeat":  # also without the sign of a lazy one
                yield unit if len(unit) == 1 else unit.removesuffix("?")
            case _:
                yield f" /{_escaped_unit(unit, flags) if escaped else unit}/{kept}"
        empty = kind == "group" or unit == "|"
    if empty:
        yield '""'


def escaped_regex(pattern: str) -> str:
    """The pattern of the same texts as contents of JSON strings. Raises UnsupportedGrammarError."""
    return _joined(
        unit if kind in {"group", "operator", "repeat"} else f"(?:{_escaped_unit(unit, '')})"
        for kind, unit in _units(pattern, "")
    )


def _units(pattern: str, flags: str) -> Iterator[tuple[str, str]]:
    if set(flags) - {"i", "s"}:
        raise UnsupportedGrammarError("may use only the flags i and s in regular expressions")
    depth = 0
    for match in _UNIT.finditer(pattern):
        kind = match.lastgroup or ""
        depth += (kind == "group") - (match[0] == ")")
        if kind in {"bad", "unclosed"} or depth < 0:
            raise UnsupportedGrammarError(
                "may not contain anchors, flags within the pattern and nested classes in regular "
                "expressions"
            )
        yield kind, match[0]
    if depth:
        raise UnsupportedGrammarError("has an invalid regular expression")


@lru_cache(maxsize=512)
def _escaped_unit(unit: str, flags: str) -> str:
    """One character of a set of characters, as a regular expression."""
    found = _specials_in(unit, flags)
    if not found:
        return unit
    parts = [re.escape(_escape(char)) for char in found]
    if "i" in flags:
        parts = [f"(?-i:{part})" for part in parts]
    if unit == ".":
        parts.append(_PLAIN_CLASS)
    elif unit[0] == "[" or re.match(r"\\[dDsSwWpP]", unit):
        parts.append(f"[{unit}&&{_PLAIN_CLASS}]")
    return "|".join(parts)


def _specials_in(unit: str, flags: str) -> list[str]:
    """Those of a set's characters that JSON escapes."""
    if re.search(r"&&|--|~~|\\[pP]\{[^LMN]", unit):
        raise UnsupportedGrammarError(
            "may use only simple classes, and \\p of letters, marks and numbers, in regular "
            "expressions"
        )
    # Python does not know the categories: letters, marks and numbers need no escape in JSON.
    pattern = re.sub(r"\\p\{\w+\}", r"\\w", re.sub(r"\\P\{\w+\}", r"\\W", unit))
    try:
        python = re.compile(pattern, re.ASCII | (re.DOTALL if "s" in flags else re.NOFLAG))
    except re.error:
        raise UnsupportedGrammarError("has an invalid regular expression") from None
    return [char for char in _SPECIALS if python.fullmatch(char)]
