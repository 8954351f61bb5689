"""Stream deltas: from journal records to what is new of one choice, for any dialect; and their sum.

    Tokens, End  --ChoiceReader-->  Start, Delta, Finish  --dialect-->  SSE events or one JSON body

`ChoiceReader` is a state machine over the records from the first one on. A resumed stream replays
them, so the bytes after any event are the same as before. It also ensures that a client gets one
token sequence: a record that does not continue the last one raises StreamDivergence. `Accumulator`
puts a choice together from its deltas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from model.text.tokenizer import Tokenizer
from service.api.generation.manifest import Manifest
from service.api.generation.parts import AnswerParts, Parts, TextOffsets
from service.api.tools.parser import CallDelta
from service.errors import StreamDivergence
from service.messages import End, FinishReason, Record, TokenLogprob, Tokens, rolling_digest


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log probability, None for the first token of a prompt."""

    token: int
    logprob: TokenLogprob | None
    offset: int  # in characters from the start of the choice's text


@dataclass(frozen=True, slots=True)
class Start:
    """Comes before a choice's first token: the echoed prompt, its ids and log probabilities."""

    text: str
    prompt_ids: tuple[int, ...]
    scored: tuple[ScoredToken, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """The text, tokens and tool calls that one record adds. Reasoning comes before all of them."""

    text: str
    ids: tuple[int, ...]
    scored: tuple[ScoredToken, ...] = ()
    calls: tuple[CallDelta, ...] = ()
    reasoning: str = ""

    @property
    def continued(self) -> list[CallDelta]:
        """More of the call that was open before. It comes before the text."""
        return [call for call in self.calls if call.id is None]

    @property
    def opened(self) -> list[CallDelta]:
        """Calls that begin with this record, each at its place in the text."""
        return [call for call in self.calls if call.id is not None]


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a choice, and text that was held back because it could begin a tag or a call."""

    end: End
    text: str = ""
    called: bool = False  # there are tool calls, all of them complete
    reasoning: str = ""

    @property
    def finish_reason(self) -> str:
        """The reason in OpenAI's terms."""
        called = self.called and self.end.reason is FinishReason.STOP
        return "tool_calls" if called else self.end.reason.value


StreamDelta = Start | Delta | Finish


class ChoiceReader:
    """One choice up to the last record read. `count` and `digest` are of the tokens so far."""

    def __init__(
        self, manifest: Manifest, choice: int, tokenizer: Tokenizer | None, *, request_id: str
    ) -> None:
        """`tokenizer`: None if the model encodes; its answers have no text."""
        self._manifest = manifest
        self._parts: AnswerParts | None = None
        separate = manifest.notation is not None or manifest.reasoning is not None
        if separate and tokenizer is not None:
            self._parts = AnswerParts(manifest, tokenizer, request_id=request_id)
        self._prompt = manifest.prompt(choice)
        self._tokenizer = tokenizer
        self._offsets: TextOffsets | None = None
        self._started = False
        self.count = 0
        self.digest = 0
        self.num_chars = 0  # of the answer's text, without an echoed prompt
        self.end: End | None = None
        self.numeric_class = ""  # of the engines that generate it; known from its first record on

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of the reasoning so far."""
        return 0 if self._parts is None else self._parts.reasoning_tokens

    @property
    def position(self) -> str:
        """The choice's part of an event id: tokens so far, and 24 bits of their digest."""
        return f"{self.count}.{self.digest & 0xFFFFFF:06x}"

    def read(self, record: Record) -> Iterator[StreamDelta]:
        """The deltas of the next record. Raises StreamDivergence if it does not continue the last
        one.
        """
        if not self._started:
            self._started = True
            self.numeric_class = "" if isinstance(record, End) else record.numeric_class
            yield self._start(record)
        if isinstance(record, End):
            if record.count != self.count:
                raise divergence()
            self.end = record
            yield self._finish(record)
            return
        digest = rolling_digest(record.ids, previous=self.digest)
        if record.start != self.count or digest != record.digest:
            raise divergence()
        self.count, self.digest = record.end, digest
        self.num_chars += len(record.text)
        if self._manifest.prompt_only:
            return
        scored = self._score(record.ids, record.logprobs)
        new = Parts(text=record.text) if self._parts is None else self._parts.read(record)
        yield Delta(new.text, record.ids, scored, new.calls, new.reasoning)

    def _finish(self, end: End) -> Finish:
        if self._manifest.prompt_only:
            if end.reason is FinishReason.STOP:  # by the token that is not shown
                end = replace(end, reason=FinishReason.LENGTH, stopped_by=None)
            return Finish(end)
        if self._parts is None:
            return Finish(end)
        rest = self._parts.finish()
        return Finish(end, rest.text, self._parts.called, rest.reasoning)

    def _start(self, record: Record) -> Start:
        manifest = self._manifest
        scores = manifest.logprobs is not None or manifest.width > manifest.keep
        if scores and self._tokenizer is not None:
            skip = manifest.skip_special_tokens
            self._offsets = TextOffsets(self._tokenizer, skip_special=skip)
        known = record.prompt_logprobs if isinstance(record, Tokens) else ()
        scored: tuple[ScoredToken, ...] = ()
        text = ""
        if manifest.echo:
            text = self._prompt.text or ""
            scored = self._score(self._prompt.ids, _cut(known, manifest.logprobs), text=text)
            if self._offsets is not None:
                self._offsets.restart(len(text))
        return Start(text, self._prompt.ids, scored, _cut(known, manifest.prompt_logprobs))

    def _score(
        self, ids: tuple[int, ...], logprobs: tuple[TokenLogprob | None, ...], *, text: str = ""
    ) -> tuple[ScoredToken, ...]:
        if self._offsets is None:
            return ()
        return tuple(map(ScoredToken, ids, logprobs, self._offsets.of(ids, text=text)))


def _cut(
    logprobs: tuple[TokenLogprob | None, ...], num_top: int | None
) -> tuple[TokenLogprob | None, ...]:
    """With the top `num_top` each: the engine returned as many as the largest use needs."""
    if num_top is None:
        return ()
    return tuple(
        logprob and TokenLogprob(logprob.logprob, logprob.top[:num_top]) for logprob in logprobs
    )


def divergence() -> StreamDivergence:
    """The error of a stream whose journal was rewritten with other tokens."""
    return StreamDivergence("the journal no longer continues what was sent", retryable=False)


@dataclass(slots=True)
class _Growing:
    texts: list[str] = field(default_factory=list, kw_only=True)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)


class TextSegment(_Growing):
    """Text between tool calls. An answer without tools has at most one."""


class ReasoningSegment(_Growing):
    """The reasoning. An answer has at most one, before all other segments."""


@dataclass(slots=True)
class ToolCallSegment(_Growing):
    """One tool call; its text is the arguments, or the input of a custom tool."""

    id: str
    name: str
    custom: bool = False
    complete: bool = False  # the text has ended

    def add(self, delta: CallDelta) -> None:
        """Adds the next delta of the call."""
        self.texts.append(delta.arguments)
        self.complete |= delta.complete


Segment = TextSegment | ToolCallSegment | ReasoningSegment


@dataclass(slots=True)
class Accumulator:
    """The sum of all deltas so far. The answer is complete if it has an `end`."""

    segments: list[Segment] = field(default_factory=list)  # in order
    ids: list[int] = field(default_factory=list)
    prompt_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    scored: list[ScoredToken] = field(default_factory=list)
    score: float = 0.0  # sum of the answer's log probabilities
    end: End | None = None
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        """The text of the answer, after the echoed prompt if there is one."""
        return self._text_of(TextSegment)

    @property
    def num_chars(self) -> int:
        """The length of all texts so far."""
        return sum(len(text) for segment in self.segments for text in segment.texts)

    @property
    def reasoning(self) -> str:
        """The text of the reasoning so far."""
        return self._text_of(ReasoningSegment)

    @property
    def calls(self) -> list[ToolCallSegment]:
        """The tool calls of the answer."""
        return [segment for segment in self.segments if isinstance(segment, ToolCallSegment)]

    @property
    def mean_logprob(self) -> float:
        """The order of `best_of`."""
        return self.score / max(1, len(self.ids))

    def add(self, delta: StreamDelta) -> None:
        """Adds the next delta of the choice."""
        if isinstance(delta, Finish):
            self._grow(ReasoningSegment, delta.reasoning)
            self._grow(TextSegment, delta.text)
            self.end, self.finish_reason = delta.end, delta.finish_reason
            return
        self.scored.extend(delta.scored)
        if isinstance(delta, Start):
            self.prompt_ids = delta.prompt_ids
            self.prompt_logprobs = delta.prompt_logprobs
            self._grow(TextSegment, delta.text)
        else:
            self.ids.extend(delta.ids)
            self.score += sum(item.logprob.logprob for item in delta.scored if item.logprob)
            for call in delta.continued:
                self.calls[call.index].add(call)
            self._grow(ReasoningSegment, delta.reasoning)
            end = 0
            for call in delta.opened:
                start, end = end, call.at
                self._grow(TextSegment, delta.text[start:end])
                new = ToolCallSegment(call.id or "", call.name or "", custom=call.custom)
                new.add(call)
                self.segments.append(new)
            self._grow(TextSegment, delta.text[end:])

    def _text_of(self, kind: type[Segment]) -> str:
        return "".join(segment.text for segment in self.segments if isinstance(segment, kind))

    def _grow(self, kind: type[TextSegment | ReasoningSegment], text: str) -> None:
        if not text:
            return
        if not self.segments or not isinstance(self.segments[-1], kind):
            self.segments.append(kind())
        self.segments[-1].texts.append(text)


@dataclass(frozen=True, slots=True)
class SegmentDelta:
    """The change of one segment: it may begin (`opens`), and it may grow by `text`."""

    index: int
    segment: Segment
    opens: bool
    text: str


class DeltaTracker:
    """Yields each change of an answer's segments once, in order."""

    def __init__(self) -> None:
        self.open: int | None = None  # index of the segment that may still grow
        self._num_texts = 0  # those of the open segment that were yielded

    def changes(self, segments: Sequence[Segment]) -> Iterator[SegmentDelta]:
        """The changes since the last call."""
        for index in range(self.open or 0, len(segments)):
            opens = index != self.open
            if opens:
                self.open, self._num_texts = index, 0
            texts = segments[index].texts
            text = "".join(texts[self._num_texts :])
            self._num_texts = len(texts)
            if opens or text:
                yield SegmentDelta(index, segments[index], opens, text)
