"""The grammar of an answer that calls functions, in llguidance's dialect of Lark.

Forced, the answer is one call or several and nothing else. Otherwise it is text, in which the
notation's opening begins calls: from there on the answer is bound as if forced. Arguments follow
their function's schema; names and fixed strings come exactly as `tool_calls` reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from model.grammar import lark_grammar
from service.api.structured.json_schema import binding, uncounted
from service.api.tools.formats import ToolFormat
from service.api.tools.plan import ToolUse
from service.api.tools.schema import Function

MAX_CALLS = 32  # of one answer: a model that goes on calling ends there

# As models are trained to write JSON, and without the blanks in which a small one may lose itself.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def tools_grammar(
    use: ToolUse, notation: ToolFormat, marker_ids: Mapping[str, int], *, text: str | None = None
) -> str:
    """In `model.grammar`'s notation. `marker_ids`: of the markers that are special tokens; `text`:
    the right side of a rule for what may be said instead of calls, where that is not any text.
    """
    spell = _Speller(notation, marker_ids)
    heads = " | ".join(spell(head) for head in notation.heads if head)
    first = f"({heads}) call" if heads else "call"
    rules = [
        *(_start(use, notation, spell) if text is None else _formatted(text, notation, spell)),
        f"calls: {first}{_more(use, notation, spell)} {spell(notation.end)}".rstrip(),
        f"call: function {spell(notation.tail)}",
        "function: " + " | ".join(f"function_{index}" for index in use.may_call),
    ]
    if notation.id_mark is not None:
        pattern = f"/[a-zA-Z0-9]{{{notation.id_length}}}/"
        rules += [f"id: {spell(notation.id_mark)} ID", f"ID: {pattern}"]
    for index in use.may_call:
        function = use.functions[index]
        rules += [
            f"function_{index}: {_named(function.name, notation, spell)} arguments_{index}",
            f"arguments_{index}: {arguments_rule(function)}",
        ]
    return lark_grammar("\n".join(rules))


def _named(name: str, notation: ToolFormat, spell: _Speller) -> str:
    """From a call's name to its arguments."""
    if notation.id_mark is None:
        return spell(name + notation.between)
    return f"{spell(name)} id? {spell(notation.between)}"


def arguments_rule(function: Function) -> str:
    """The right side of a rule for a function's arguments."""
    schema = _NO_ARGUMENTS if function.parameters is None else binding(function.parameters)
    options: dict[str, Any] = _SPACING
    if not function.strict:  # what a grammar cannot express is left to the model
        schema, options = uncounted(schema), _SPACING | {"lenient": True}
    bound = {"type": "object", **schema, "x-guidance": options}
    return f"%json {json.dumps(bound, separators=(',', ':'))}"


def _start(use: ToolUse, notation: ToolFormat, spell: _Speller) -> list[str]:
    opening = spell(notation.opening)
    if use.forced:
        return [f"start: {opening} calls"]
    if notation.only_first:
        pattern = re.escape(notation.opening).replace("/", r"\/").replace(r"\ ", " ")
        return [f"start: TEXT | {opening} calls", rf"TEXT: /(.|\n)*/ & ~/{pattern}(.|\n)*/"]
    text = r"TEXT: /(.|\n)*/"
    if opening.startswith("<["):
        return [f"start: TEXT | opened calls\nopened: TEXT {opening}", text]
    return [f"start: TEXT | opened calls\nopened[lazy]: TEXT {opening}", text]


def _formatted(text: str, notation: ToolFormat, spell: _Speller) -> list[str]:
    return [f"start: formatted | {spell(notation.opening)} calls", f"formatted: {text}"]


def _more(use: ToolUse, notation: ToolFormat, spell: _Speller) -> str:
    if notation.joint is None or not use.parallel:
        return ""
    return f" ({spell(notation.joint)} call){{0,{MAX_CALLS - 1}}}"


class _Speller:
    """A fixed string in Lark: quoted, but for the special tokens in it, which go by their ids."""

    def __init__(self, notation: ToolFormat, marker_ids: Mapping[str, int]) -> None:
        self._ids = marker_ids
        markers = [marker for marker in notation.markers if marker in marker_ids]
        self._markers = re.compile(f"({'|'.join(map(re.escape, markers))})") if markers else None

    def __call__(self, fixed: str) -> str:
        pieces = self._markers.split(fixed) if self._markers else [fixed]
        return " ".join(
            f"<[{self._ids[piece]}]>" if piece in self._ids else json.dumps(piece)
            for piece in pieces
            if piece
        )
