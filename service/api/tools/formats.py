"""Tool-call formats: how a model writes calls, detected from its chat template.

    text before [opening][head]NAME[between]{...}[tail] [joint]NAME[between]{...}[tail] ... [end]

Everything except the names and the `{...}`, the arguments as a JSON object, is a fixed string: a
grammar makes the model write exactly these (`tools_grammar`), and `ToolCallParser` reads exactly
these. A string that is one of the model's special tokens has no text in the journal, which stores
its id. `between` begins with a character that no name contains. If a format has an `id_mark`, the
model may write a call's id too: NAME[id_mark]ID[between]{...}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from model.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    signs: tuple[str, ...]  # a chat template that contains all of these has this format
    opening: str  # before the first call
    heads: tuple[str, ...]  # between the opening and the name: any of these
    between: str  # between the name and the arguments
    tail: str  # after the arguments of each call
    joint: str | None  # from one call's tail to the next one's name; None: at most one call
    end: str = ""  # after the last call
    markers: tuple[str, ...] = ()  # parts of the above that may be special tokens
    only_first: bool = False  # the opening counts at the beginning of the answer only
    native: bool = True  # the template renders tools and calls; else the prompt fallback
    id_length: int = 24  # hexadecimal digits of a call's id
    id_prefix: str = "call_"
    id_mark: str | None = None  # between a name and the call's id, which is letters and digits

    def render(self, calls: Iterable[tuple[str, str]]) -> str:
        """The text of one or more (name, arguments), as the model writes them without ids."""
        rendered = [f"{name}{self.between}{arguments}{self.tail}" for name, arguments in calls]
        return self.opening + self.heads[0] + (self.joint or "").join(rendered) + self.end

    def marker_ids(self, tokenizer: Tokenizer) -> dict[str, int]:
        """Marker -> token id, for the markers that are special tokens of the model."""
        found = {text: tokenizer.special_id(text) for text in self.markers if self.native}
        return {text: id_ for text, id_ in found.items() if id_ is not None}


_HERMES = ToolFormat(
    signs=("tools", "<tool_call>", '"arguments"'),
    opening="<tool_call>",
    heads=('\n{"name": "',),
    between='", "arguments": ',
    tail="}\n</tool_call>",
    joint='\n<tool_call>\n{"name": "',
    markers=("<tool_call>", "</tool_call>"),
)
PLAIN = "plain"
TOOL_FORMATS: Mapping[str, ToolFormat] = MappingProxyType({
    "hermes": _HERMES,  # Hermes, Qwen 2.5 and 3
    "mistral-v11": ToolFormat(  # Mistral Small 3.2, Magistral, Devstral, Ministral 3
        signs=("tools", "[TOOL_CALLS]", "[ARGS]"),
        opening="[TOOL_CALLS]",
        heads=("",),
        between="[ARGS]",
        tail="",
        joint="[TOOL_CALLS]",
        markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        id_prefix="",
        id_length=9,
        id_mark="[CALL_ID]",  # tokenizer version 11; version 13 writes no ids
    ),
    "mistral": ToolFormat(  # tokenizer versions 3 and 7
        signs=("tools", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
        opening="[TOOL_CALLS]",
        heads=('[{"name": "', ' [{"name": "'),
        between='", "arguments": ',
        tail="}",
        joint=', {"name": "',
        end="]",
        markers=("[TOOL_CALLS]",),
        id_prefix="",  # its template takes nine letters or digits
        id_length=9,
    ),
    "llama": ToolFormat(
        signs=("tools", "ipython", '"parameters": '),
        opening='{"name": "',
        heads=("",),
        between='", "parameters": ',
        tail="}",
        joint=None,  # its template takes one call at a time
        only_first=True,
    ),
    PLAIN: replace(_HERMES, signs=(), native=False),
})  # fmt: skip
"""Name -> format; `plain` is the prompt fallback, for templates without a known format."""


def tool_format_name(tokenizer: Tokenizer) -> str:
    """The name, in `TOOL_FORMATS`, of the format of the model's chat template."""
    template = tokenizer.chat_template or ""
    for name, tool_format in TOOL_FORMATS.items():
        if tool_format.native and all(sign in template for sign in tool_format.signs):
            return name
    return PLAIN
