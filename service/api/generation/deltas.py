"""Pieces: from journal records to what a client is shown of one choice, in any shape.

    Tokens, End  --ChoiceReader-->  Start, Delta, Finish  --render-->  SSE events or one JSON body

The reader is a state machine over the records from the first one on: a resumed stream replays them,
so that the bytes after any event are the same as they were. It also guards the promise that a
client is shown one token sequence: a record that does not continue the last one raises
StreamDivergence.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from model.text.tokenizer import Tokenizer
from service.api.generation.manifest import Endpoint, Manifest
from service.api.tools.formats import TOOL_FORMATS, ToolFormat
from service.api.tools.parser import CallDelta, ParsedText, ToolCallParser
from service.errors import StreamDivergence
from service.messages import End, FinishReason, Record, TokenLogprob, Tokens, rolling_digest


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log probability (None: the first of a prompt has none) and text offset."""

    token: int
    logprob: TokenLogprob | None
    offset: int  # in characters from the start of the choice's text


@dataclass(frozen=True, slots=True)
class Start:
    """Before a choice's first token: a chat's role, a response's item, an echoed prompt, ids, the
    prompt's log probabilities.
    """

    text: str
    prompt_ids: tuple[int, ...]
    scored: tuple[ScoredToken, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one record adds."""

    text: str
    ids: tuple[int, ...]
    scored: tuple[ScoredToken, ...] = ()
    calls: tuple[CallDelta, ...] = ()

    @property
    def continued(self) -> list[CallDelta]:
        """SegmentDelta of the call that was open before: it comes before the text."""
        return [call for call in self.calls if call.id is None]

    @property
    def opened(self) -> list[CallDelta]:
        """Calls that begin here, behind the text."""
        return [call for call in self.calls if call.id is not None]


@dataclass(frozen=True, slots=True)
class Finish:
    """A choice's end, and the text that was held back in case it began a tool call."""

    end: End
    text: str = ""
    called: bool = False  # it has tool calls, all of them whole

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for it."""
        called = self.called and self.end.reason is FinishReason.STOP
        return "tool_calls" if called else self.end.reason.value


StreamDelta = Start | Delta | Finish


class ChoiceReader:
    """One choice, up to the last record read. `count` and `digest` are of the tokens so far."""

    def __init__(
        self, manifest: Manifest, choice: int, tokenizer: Tokenizer, *, request_id: str
    ) -> None:
        self._manifest = manifest
        self._calls: _Calls | None = None
        if manifest.notation is not None:
            self._calls = _Calls(TOOL_FORMATS[manifest.notation], tokenizer, request_id=request_id)
        self._prompt = manifest.prompt(choice)
        self._tokenizer = tokenizer
        self._offsets: _Offsets | None = None
        self._opened = False
        self.count = 0
        self.digest = 0
        self.num_chars = 0  # of the answer's text, what is echoed aside
        self.end: End | None = None

    @property
    def position(self) -> str:
        """The choice's part of an event id: tokens so far, and 24 bits of their digest."""
        return f"{self.count}.{self.digest & 0xFFFFFF:06x}"

    def read(self, record: Record) -> Iterator[StreamDelta]:
        """What the record adds. Raises StreamDivergence where it does not continue the last."""
        if not self._opened:
            self._opened = True
            yield from self._open(record)
        if isinstance(record, End):
            if record.count != self.count:
                raise divergence()
            self.end = record
            yield Finish(record) if self._calls is None else self._calls.ending(record)
            return
        digest = rolling_digest(record.ids, previous=self.digest)
        if record.start != self.count or digest != record.digest:
            raise divergence()
        self.count, self.digest = record.end, digest
        self.num_chars += len(record.text)
        scored = self._score(record.ids, record.logprobs)
        if self._calls is None:
            yield Delta(record.text, record.ids, scored)
        else:
            told = self._calls.read(record)
            yield Delta(told.text, record.ids, scored, told.calls)

    def _open(self, record: Record) -> Iterator[Start]:
        manifest = self._manifest
        if manifest.logprobs is not None or manifest.width > manifest.keep:
            self._offsets = _Offsets(self._tokenizer)
        known = record.prompt_logprobs if isinstance(record, Tokens) else ()
        scored: tuple[ScoredToken, ...] = ()
        if manifest.echo:
            scored = self._score(self._prompt.ids, _cut(known, manifest.logprobs))
            if self._offsets is not None:
                self._offsets.restart(len(self._prompt.text or ""))
        opens = manifest.endpoint is not Endpoint.COMPLETIONS
        if opens or manifest.echo or manifest.gives_prompt:
            text = self._prompt.text if manifest.echo else None
            yield Start(text or "", self._prompt.ids, scored, _cut(known, manifest.prompt_logprobs))

    def _score(
        self, ids: tuple[int, ...], logprobs: tuple[TokenLogprob | None, ...]
    ) -> tuple[ScoredToken, ...]:
        if self._offsets is None:
            return ()
        return tuple(map(ScoredToken, ids, logprobs, self._offsets.of(ids)))


def _cut(
    logprobs: tuple[TokenLogprob | None, ...], num_top: int | None
) -> tuple[TokenLogprob | None, ...]:
    """With `num_top` of the likeliest each: the engine gave as many as the greediest use needs."""
    if num_top is None:
        return ()
    return tuple(
        logprob and TokenLogprob(logprob.logprob, logprob.top[:num_top]) for logprob in logprobs
    )


class _Offsets:
    """Where in the text each token begins: the characters that the bytes before it complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.restart(0)

    def restart(self, offset: int) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = offset

    def of(self, ids: Iterable[int]) -> list[int]:
        offsets = []
        for token in ids:
            offsets.append(self._offset)
            if not self._tokenizer.is_special(token):
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes[token]))
        return offsets


class _Calls:
    """Tells text and tool calls apart. Special tokens of the notation are put back into the text,
    each where it stood.
    """

    def __init__(self, notation: ToolFormat, tokenizer: Tokenizer, *, request_id: str) -> None:
        self._reader = ToolCallParser(notation, request_id=request_id)
        self._markers = {id_: text for text, id_ in notation.marker_ids(tokenizer).items()}
        self._offsets = _Offsets(tokenizer)
        self._waiting: list[tuple[int, str]] = []  # (offset, marker): the text is not there yet
        self._num_chars = 0

    def read(self, record: Tokens) -> ParsedText:
        text = record.text
        if self._markers:
            pairs = zip(record.ids, self._offsets.of(record.ids), strict=True)
            self._waiting += [(at, self._markers[id_]) for id_, at in pairs if id_ in self._markers]
            text = self._with_markers(text)
        return self._reader.push(text)

    def ending(self, end: End) -> Finish:
        return Finish(end, self._reader.finish().text, self._reader.called)

    def _with_markers(self, text: str) -> str:
        start, end = self._num_chars, self._num_chars + len(text)
        self._num_chars = end
        pieces = []
        while self._waiting and self._waiting[0][0] <= end:
            at, marker = self._waiting.pop(0)
            pieces += [text[: at - start], marker]
            text, start = text[at - start :], at
        return "".join([*pieces, text])


def divergence() -> StreamDivergence:
    """The end of a stream whose journal was rewritten."""
    return StreamDivergence("the journal no longer continues what was sent", retryable=False)
