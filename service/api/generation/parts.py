"""AnswerParts: separates reasoning, text and tool calls of one choice, record by record.

Special tokens of a tag have no text in the journal. Their symbols (see `service.thinking`) are
inserted into the text at their offsets; the tool-call parser gets their texts. How the model of a
request delimits its reasoning is found by the chat template and the prompt:

template's source     the format: which tags separate reasoning and content
end of the prompt     whether the answer begins within the reasoning, or can have none
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from model.text.tokenizer import Tokenizer
from service.api.generation.manifest import Manifest, ReasoningNote
from service.api.generation.request import Chat, Effort, Generation
from service.api.tools.formats import TOOL_FORMATS
from service.api.tools.parser import CallDelta, KnownTools, ToolCallParser
from service.messages import Thinking, Tokens
from service.thinking import (
    BLANKS,
    THINKING_FORMATS,
    Phase,
    Splitter,
    ThinkingFormat,
    TokenScan,
    symbol,
    token_text,
)

_GRADES: Mapping[Effort, str] = MappingProxyType({
    "none": "none", "minimal": "low", "low": "low", "medium": "medium", "high": "high",
    "xhigh": "high", "max": "high",
})  # fmt: skip


def thinking_options(template: str, chat: Chat) -> Mapping[str, Any]:
    """Variables with which chat templates switch thinking. One that has no such variable ignores
    them.
    """
    options: dict[str, Any] = {}
    if chat.thinks is not None:
        options = {"enable_thinking": chat.thinks, "thinking": chat.thinks}
    if chat.thinks is False or chat.effort is not None:
        grade = "none" if chat.thinks is False else _GRADES[chat.effort or "medium"]
        if not _quotes(template, "none"):  # gpt-oss: low, medium, high
            grade = "low" if grade == "none" else grade
        elif grade != "none":  # Mistral: none, high
            grade = "high"
        options["reasoning_effort"] = grade
    return options


def _quotes(template: str, word: str) -> bool:
    """Whether the template compares its effort with a word."""
    return f'"{word}"' in template or f"'{word}'" in template


def thinking_format_name(tokenizer: Tokenizer) -> str | None:
    """The name, in `THINKING_FORMATS`, of the format of the model's chat template."""
    template = tokenizer.chat_template or ""
    for name, tags in THINKING_FORMATS.items():
        if all(sign in template for sign in tags.signs):
            return name
    return None


def special_parts(tags: ThinkingFormat, tokenizer: Tokenizer) -> dict[str, int]:
    """Part of a tag -> token id, for the parts that are special tokens of the model."""
    found = {part: tokenizer.special_id(part) for part in tags.parts}
    return {part: id_ for part, id_ in found.items() if id_ is not None}


def reasoning_note(
    generation: Generation, prompt_ids: Sequence[int], tokenizer: Tokenizer
) -> ReasoningNote | None:
    """None if the model does not think, or not after this prompt."""
    chat = generation.prompt
    name = thinking_format_name(tokenizer)
    if not isinstance(chat, Chat) or name is None:
        return None
    continued = chat.continue_final_message
    phase = _phase(THINKING_FORMATS[name], prompt_ids, tokenizer, continued=continued)
    if phase is Phase.CONTENT:
        return None
    return ReasoningNote(
        format=name,
        opened=phase is Phase.THINKING,
        verbatim=generation.output is not None and generation.tools is None,
        included=generation.include_reasoning,
    )


def _phase(
    tags: ThinkingFormat, ids: Sequence[int], tokenizer: Tokenizer, *, continued: bool
) -> Phase:
    """The phase at the end of a prompt, by its text since the last special token that is no tag.

    A client's text counts only if it is the beginning of the answer.
    """
    parts = special_parts(tags, tokenizer)
    symbols = {text: symbol(index) for index, text in enumerate(parts)}
    by_id = {parts[text]: symbol for text, symbol in symbols.items()}
    tags = tags.spelled(symbols)
    pieces: list[str] = []
    for id_ in reversed(ids):
        if tokenizer.is_special(id_) and id_ not in by_id:
            break
        pieces.append(token_text(id_, token_bytes=tokenizer.token_bytes, symbols=by_id))
    text = "".join(reversed(pieces)).rstrip(BLANKS)
    if not continued:
        if text.endswith(tags.opening):
            return Phase.THINKING
        return Phase.CONTENT if text.endswith((tags.closing, *tags.heads)) else Phase.START
    opened, closed = text.rfind(tags.opening), text.rfind(tags.closing)
    return Phase.THINKING if opened > closed else Phase.CONTENT


def _ids_of(tag: str, tags: ThinkingFormat, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a tag."""
    parts = special_parts(tags, tokenizer)
    pattern = "|".join(map(re.escape, parts))
    texts = re.split(f"({pattern})", tag) if parts else [tag]
    return [
        id_
        for text in texts
        for id_ in ([parts[text]] if text in parts else tokenizer.encode(text, add_bos=False))
    ]


def thinking(
    note: ReasoningNote | None, tokenizer: Tokenizer, *, grammar: bool, budget: int | None
) -> Thinking | None:
    """What an engine must know of the reasoning; None: nothing, it has no limit and no grammar
    follows.
    """
    if note is None or not (grammar or budget is not None):
        return None
    tags = THINKING_FORMATS[note.format]

    def ids(*texts: str) -> tuple[int, ...]:
        return tuple(id_ for text in texts for id_ in _ids_of(text, tags, tokenizer))

    return Thinking(
        format=note.format,
        opened=note.opened,
        verbatim=note.verbatim,
        openings=tuple(ids(tag) for tag in (tags.opening, *tags.heads)),
        joint=ids(tags.joint),
        closing=ids(tags.closing, tags.joint, *tags.heads[:1]),
        symbols=tuple(sorted(special_parts(tags, tokenizer).items())),
        budget=budget,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a record adds."""

    reasoning: str = ""
    text: str = ""
    calls: tuple[CallDelta, ...] = ()


class TextOffsets:
    """Text offsets of tokens: the number of characters that the bytes before each complete."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._bytes = tokenizer.token_bytes if skip_special else tokenizer.visible_bytes
        self.restart(0)

    def restart(self, offset: int) -> None:
        """Continues with a token at `offset`."""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = offset

    def of(self, ids: Iterable[int], *, text: str = "") -> list[int]:
        """The offsets of the next tokens. `text`, if it is known, may spell special tokens."""
        offsets = []
        for token in ids:
            offsets.append(self._offset)
            if self._bytes[token]:
                self._offset += len(self._decoder.decode(self._bytes[token]))
            elif text.startswith(name := self._tokenizer.token_text(token), self._offset):
                self._offset += len(name)
        return offsets


class AnswerParts:
    """State of one choice, up to the position read."""

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, *, request_id: str) -> None:
        note, markers = manifest.reasoning, dict[str, int]()
        self._parser: ToolCallParser | None = None
        if manifest.notation is not None:
            tool_format = TOOL_FORMATS[manifest.notation]
            tools = KnownTools(
                custom=frozenset(tool.name for tool in manifest.tools if tool.custom),
                types={tool.name: dict(tool.types) for tool in manifest.tools},
            )
            self._parser = ToolCallParser(tool_format, request_id=request_id, tools=tools)
            markers |= tool_format.marker_ids(tokenizer)
        if note is not None:
            tags = THINKING_FORMATS[note.format]
            markers |= special_parts(tags, tokenizer)
        symbols = {text: symbol(index) for index, text in enumerate(markers)}
        self._symbols = {markers[text]: symbol for text, symbol in symbols.items()}
        self._texts = str.maketrans({symbol: text for text, symbol in symbols.items()})
        self._nothing = dict.fromkeys(self._texts)
        self._note = note
        self._splitter: Splitter | None = None
        if note is not None:
            self._splitter = Splitter(
                THINKING_FORMATS[note.format].spelled(symbols),
                opened=note.opened,
                verbatim=note.verbatim,
            )
            self._scan = TokenScan(
                self._splitter.copy(), token_bytes=tokenizer.token_bytes, symbols=self._symbols
            )
        self._offsets = TextOffsets(tokenizer)
        self._pending: list[tuple[int, str]] = []  # (offset, symbol): beyond the text so far
        self._num_chars = 0

    @property
    def called(self) -> bool:
        """Whether there is a tool call, and all of them are complete."""
        return self._parser is not None and self._parser.called

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of the reasoning so far, tags aside."""
        return 0 if self._splitter is None else self._scan.num_thinking

    def read(self, record: Tokens) -> Parts:
        """What the record makes certain."""
        text = self._with_symbols(record) if self._symbols else record.text
        if self._splitter is None:
            return self._parsed("", text)
        for token in record.ids:
            self._scan.read(token)
        return self._parsed(*self._splitter.push(text))

    def finish(self) -> Parts:
        """What was held back; the answer has ended."""
        reasoning, text = ("", "") if self._splitter is None else self._splitter.finish()
        parts = self._parsed(reasoning, text)
        if self._parser is None:
            return parts
        return replace(parts, text=parts.text + self._parser.finish().text)

    def _parsed(self, reasoning: str, text: str) -> Parts:
        if self._note is None or not self._note.included:
            reasoning = ""
        reasoning = self._without_symbols(reasoning)
        if self._parser is None:
            return Parts(reasoning=reasoning, text=self._without_symbols(text))
        parsed = self._parser.push(text.translate(self._texts))
        return Parts(reasoning=reasoning, text=parsed.text, calls=parsed.calls)

    def _without_symbols(self, text: str) -> str:
        return text.translate(self._nothing) if self._symbols else text

    def _with_symbols(self, record: Tokens) -> str:
        """The record's text with the symbols of its special tokens."""
        pairs = zip(record.ids, self._offsets.of(record.ids), strict=True)
        self._pending += [(at, self._symbols[id_]) for id_, at in pairs if id_ in self._symbols]
        text, start = record.text, self._num_chars
        self._num_chars = end = start + len(text)
        parts = []
        while self._pending and self._pending[0][0] <= end:
            at, marker = self._pending.pop(0)
            parts += [text[: at - start], marker]
            text, start = text[at - start :], at
        return "".join([*parts, text])
