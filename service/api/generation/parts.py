"""AnswerParts: separates reasoning, text and tool calls of one choice, record by record.

Special tokens of a tag have no text in the journal. Their symbols (see `service.thinking`) are
inserted into the text at their offsets; the tool-call parser gets their texts.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass

from model.text.tokenizer import Tokenizer
from service.api.generation.manifest import Manifest
from service.api.generation.reasoning import special_parts
from service.api.tools.formats import TOOL_FORMATS
from service.api.tools.parser import CallDelta, KnownTools, ToolCallParser
from service.messages import Tokens
from service.thinking import THINKING_FORMATS, Splitter, TokenScan, symbol


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
        rest = self._parser.finish()
        return Parts(
            reasoning=parts.reasoning, text=parts.text + rest.text, calls=parts.calls + rest.calls
        )

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
