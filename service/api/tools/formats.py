"""Tool-call formats: how a model writes calls.

    text [opening][head]NAME[between]ARGUMENTS[tail] [joint]NAME[between]ARGUMENTS[tail] ... [end]

Everything except the names and the arguments is a fixed string: a grammar makes the model write
exactly these (`tools_grammar`), and `ToolCallParser` reads exactly these. A string that is one of
the model's special tokens has no text in the journal, which stores its id. `between` begins with a
character that no name contains. If a format has an `id_mark`, the model may write a call's id too:
NAME[id_mark]ID[between]ARGUMENTS. Arguments are a JSON object or, with `tags`, an element per
argument: see `service.api.tools.arguments`.

The format of a model is the one whose `sign` its chat template writes for a call (`CallRendering`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from model.text.template_calls import PROBE_KEY, PROBE_NAME, CallRendering
from model.text.tokenizer import Tokenizer
from service.api.tools.arguments import with_tags


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    sign: str  # a pattern of what a template with this format writes for a call: NAME and KEY
    opening: str  # before the first call
    heads: tuple[str, ...] = ("",)  # between the opening and the name: any of these
    between: str  # between the name and the arguments
    tail: str  # after the arguments of each call
    joint: str | None  # from one call's tail to the next one's name; None: at most one call
    end: str = ""  # after the last call
    tags: bool = False  # the arguments are elements; else a JSON object
    markers: tuple[str, ...] = ()  # parts of the above that may be special tokens
    only_first: bool = False  # the opening counts at the beginning of the answer only
    prefix: str = ""  # a special token that may come before the opening
    frames: tuple[str, ...] = ()  # before a text, of which they are no part: any of these
    closing: str = ""  # after a text that has a frame, if more follows
    native: bool = True  # the template renders calls; else the prompt fallback
    id_length: int = 24  # hexadecimal digits of a call's id
    id_prefix: str = "call_"
    id_mark: str | None = None  # between a name and the call's id, which is letters and digits

    def render(self, calls: Iterable[tuple[str, str]]) -> str:
        """The text of one or more (name, arguments), as the model writes them without ids."""
        spell = with_tags if self.tags else str
        rendered = [f"{name}{self.between}{spell(given)}{self.tail}" for name, given in calls]
        return self.opening + self.heads[0] + (self.joint or "").join(rendered) + self.end

    def marker_ids(self, tokenizer: Tokenizer) -> dict[str, int]:
        """Marker -> token id, for the markers that are special tokens of the model."""
        found = {text: tokenizer.special_id(text) for text in self.markers if self.native}
        return {text: id_ for text, id_ in found.items() if id_ is not None}


_HERMES = ToolFormat(
    sign=r'<tool_call>\s*\{\s*"name": "NAME",\s*"arguments": ',
    opening="<tool_call>",
    heads=('\n{"name": "',),
    between='", "arguments": ',
    tail="}\n</tool_call>",
    joint='\n<tool_call>\n{"name": "',
    markers=("<tool_call>", "</tool_call>"),
)


def _deepseek(name: str) -> str:
    """A special token of DeepSeek's: full-width bars, and a block between the words."""
    return f"<\uff5c{name.replace(' ', chr(0x2581))}\uff5c>"


_DEEPSEEK = ToolFormat(  # V3.1
    sign=_deepseek("tool call begin") + "NAME" + _deepseek("tool sep"),
    opening=_deepseek("tool calls begin"),
    heads=(_deepseek("tool call begin"),),
    between=_deepseek("tool sep"),
    tail=_deepseek("tool call end"),
    joint=_deepseek("tool call begin"),
    end=_deepseek("tool calls end"),
    markers=tuple(
        _deepseek(f"tool {name}")
        for name in ("calls begin", "call begin", "sep", "call end", "calls end")
    ),
)
_DEEPSEEK_HEAD = f"{_DEEPSEEK.heads[0]}function{_DEEPSEEK.between}"
PLAIN = "plain"
TOOL_FORMATS: Mapping[str, ToolFormat] = MappingProxyType({
    "hermes": _HERMES,  # Hermes, Qwen 2.5 and 3
    "qwen3-coder": ToolFormat(  # Qwen 3 Coder, Qwen 3.5, Nemotron 3
        sign=r"<tool_call>\s*<function=NAME>\s*<parameter=KEY>",
        opening="<tool_call>",
        heads=("\n<function=",),
        between=">\n",
        tail="</function>\n</tool_call>",
        joint="\n<tool_call>\n<function=",
        tags=True,
        markers=("<tool_call>", "</tool_call>"),
    ),
    "mistral-v11": ToolFormat(  # Mistral Small 3.2, Magistral, Devstral, Ministral 3
        sign=r"\[TOOL_CALLS\]\s*NAME\s*(\[CALL_ID\]\s*\w+\s*)?\[ARGS\]",
        opening="[TOOL_CALLS]",
        between="[ARGS]",
        tail="",
        joint="[TOOL_CALLS]",
        markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        id_prefix="",
        id_length=9,
        id_mark="[CALL_ID]",  # tokenizer version 11; version 13 writes no ids
    ),
    "mistral": ToolFormat(  # tokenizer versions 3 and 7
        sign=r'\[TOOL_CALLS\]\s*\[\{"name": "NAME", "arguments": ',
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
    "llama": ToolFormat(  # Llama 3.1, 3.2 and 3.3
        sign=r'\{"name": "NAME", "parameters": ',
        opening='{"name": "',
        between='", "parameters": ',
        tail="}",
        joint=None,  # its template takes one call at a time
        markers=("<|python_tag|>",),
        only_first=True,
        prefix="<|python_tag|>",
    ),
    "deepseek": replace(  # V3 and R1
        _DEEPSEEK,
        sign=f"{_DEEPSEEK_HEAD}NAME\n```json\n",
        heads=(_DEEPSEEK_HEAD,),
        between="\n```json\n",
        tail=f"\n```{_DEEPSEEK.tail}",
        joint=f"\n{_DEEPSEEK_HEAD}",
    ),
    "deepseek-v3.1": _DEEPSEEK,
    "gpt-oss": ToolFormat(
        sign=r"to=functions\.NAME<\|channel\|>commentary ",
        opening="<|channel|>commentary to=functions.",
        between=" <|constrain|>json<|message|>",
        tail="",
        joint=None,  # a call ends the answer
        markers=("<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|start|>"),
        frames=("<|channel|>final<|message|>", "<|channel|>commentary<|message|>"),
        closing="<|end|><|start|>assistant",
    ),
    PLAIN: replace(_HERMES, sign="", native=False),
})  # fmt: skip
"""Name -> format; `plain` is the prompt fallback, for templates without a known format."""


def tool_format_name(rendering: CallRendering) -> str:
    """The name, in `TOOL_FORMATS`, of the format of a model's chat template."""
    for name, tool_format in TOOL_FORMATS.items():
        sign = tool_format.sign.replace("NAME", PROBE_NAME).replace("KEY", PROBE_KEY)
        if tool_format.native and re.search(sign, rendering.text):
            return name
    return PLAIN
