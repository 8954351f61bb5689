r"""The grammar of a custom tool's input, where the format of calls has it within a JSON string.

A grammar in Lark describes the input; `escaped_lark` returns one that describes the input as the
content of a JSON string. In strings and in regular expressions each character that JSON escapes is
replaced by its escape; everything else stays as it is:

    "a\n" /x|[^b]/      ->      "a\\n" /x|(?:\\n|\\"|...|[[^b]&&[^"\\\x00-\x1f]])/

Not supported are special tokens, and Lark's directives except imports of `common`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|\#[^\n]*)
    |(?P<string>"(?:[^"\\\n]|\\.)*"i?)
    |(?P<regex>/(?:[^/\\\n]|\\.)+/[a-z]*)
    |%import[ \t]+common\.(?P<common>\w+)(?:[ \t]*->[ \t]*(?P<renamed>\w+))?[ \t]*(?=\n|$)
    |(?P<alias>->[ \t]*\w+)
    |(?P<ignore>%ignore\b)
    |(?P<bad>[%<@$])
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
    "ESCAPED_STRING": r'"([^"\\]|\\.)*"',
}
_SPECIALS = [chr(code) for code in range(32)] + ['"', "\\"]
_PLAIN_CLASS = r'[^"\\\x00-\x1f]'
# One character of a regular expression: a class, an escape or itself. Groups, operators and
# repetitions are not characters, and stay as they are.
_UNIT = re.compile(
    r"""(?P<group>\((?:\?P?<\w+>|\?[a-zA-Z-]*:)?)
    |(?P<repeat>\{[0-9]+(?:,[0-9]*)?\})
    |(?P<class>\[\^?\]?(?:[^\]\\\[]|\\.)*\])
    |(?P<escape>\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[pP]\{\w+\}|.))
    |(?P<operator>[|)*+?])
    |(?P<bad>[\[\]{}^$])
    |(?P<char>.)""",
    re.VERBOSE | re.DOTALL,
)
_NO_CHARACTER = frozenset("AzbBGZ")  # escapes that match positions


class UnsupportedGrammarError(ValueError):
    """A grammar that cannot be escaped. The text says what is not supported."""


def escaped_lark(text: str) -> str:
    """A grammar of the same inputs as contents of JSON strings. Raises UnsupportedGrammarError."""
    return "".join(_escaped_tokens(text))


def checked_lark(text: str) -> str:
    """The grammar itself. Raises UnsupportedGrammarError for what `escaped_lark` rejects, too."""
    escaped_lark(text)
    return text


def _escaped_tokens(text: str) -> Iterator[str]:
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match[0]
        if match["common"]:
            yield _import(token, match["common"], match["renamed"])
        elif kind == "string":
            yield _string(token)
        elif kind == "regex":
            pattern, _, flags = token[1:].rpartition("/")
            yield f"/{escaped_regex(pattern, flags)}/{flags.replace('s', '')}"
        elif kind == "bad":
            raise UnsupportedGrammarError(
                "may not contain special tokens, templates and directives other than %import common"
                " and %ignore"
            )
        elif kind not in {"comment", "alias"}:
            yield token


def _import(token: str, name: str, renamed: str | None) -> str:
    if name not in _COMMON:
        return token
    return f"{renamed or name}: /{escaped_regex(_COMMON[name])}/"


def _string(token: str) -> str:
    """A string whose escapes are those of JSON."""
    literal, flag = (token[:-1], "i") if token.endswith("i") else (token, "")
    try:
        text: str = json.loads(literal)
    except ValueError:
        raise UnsupportedGrammarError("may contain only the escapes of JSON in strings") from None
    content = json.dumps(text, ensure_ascii=False)[1:-1]
    if flag and "\\" in content:
        raise UnsupportedGrammarError("may not ignore the case of strings with escapes")
    return json.dumps(content, ensure_ascii=False) + flag


def escaped_regex(pattern: str, flags: str = "") -> str:
    """The pattern of the same texts as contents of JSON strings. Raises UnsupportedGrammarError."""
    if set(flags) - {"i", "s"}:
        raise UnsupportedGrammarError("may use only the flags i and s in regular expressions")
    return "".join(_escaped_units(pattern, dotall="s" in flags, any_case="i" in flags))


def _escaped_units(pattern: str, *, dotall: bool, any_case: bool) -> Iterator[str]:
    for match in _UNIT.finditer(pattern):
        kind, unit = match.lastgroup, match[0]
        if kind == "bad" or (kind == "escape" and unit[1] in _NO_CHARACTER):
            raise UnsupportedGrammarError(
                "may not contain anchors or nested classes in regular expressions"
            )
        if kind in {"group", "repeat", "operator"}:
            if kind == "group" and ("?i" in unit or "?s" in unit or "?x" in unit):
                raise UnsupportedGrammarError("may not set flags in regular expressions")
            yield unit
        else:
            yield _escaped_unit(unit, dotall=dotall, any_case=any_case)


def _escaped_unit(unit: str, *, dotall: bool, any_case: bool) -> str:
    """One character of a set of characters."""
    found = _specials_in(unit, dotall=dotall)
    if not found:
        return unit
    escapes = [re.escape(json.dumps(char)[1:-1]) for char in found]
    if any_case:
        escapes = [f"(?-i:{escape})" for escape in escapes]
    if unit == ".":
        escapes.append(_PLAIN_CLASS)
    elif unit[0] == "[" or re.match(r"\\[dDsSwWpP]", unit):
        escapes.append(f"[{unit}&&{_PLAIN_CLASS}]")
    return f"(?:{'|'.join(escapes)})"


def _specials_in(unit: str, *, dotall: bool) -> list[str]:
    """Those of a set's characters that JSON escapes."""
    if re.search(r"&&|--|~~|\\[pP]\{[^LMN]", unit) or unit in {r"\x", r"\u"}:
        raise UnsupportedGrammarError(
            "may use only simple classes, \\p of letters, marks and numbers, and \\xHH and \\uHHHH "
            "in regular expressions"
        )
    # Python does not know the categories: letters, marks and numbers need no escape in JSON.
    pattern = re.sub(r"\\p\{\w+\}", r"\\w", re.sub(r"\\P\{\w+\}", r"\\W", unit))
    try:
        python = re.compile(pattern, re.ASCII | (re.DOTALL if dotall else re.NOFLAG))
    except re.error:
        raise UnsupportedGrammarError("has an invalid regular expression") from None
    return [char for char in _SPECIALS if python.fullmatch(char)]
