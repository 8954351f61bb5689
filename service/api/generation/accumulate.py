"""Accumulator: one choice of an answer, put together from the deltas of its stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from service.api.generation.deltas import Finish, ScoredToken, Start, StreamDelta
from service.api.tools.parser import CallDelta
from service.messages import End, TokenLogprob


@dataclass(slots=True)
class TextSegment:
    """Text between tool calls. An answer without tools has at most one."""

    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)


@dataclass(slots=True)
class ToolCallSegment:
    """One tool call."""

    id: str
    name: str
    texts: list[str] = field(default_factory=list)
    custom: bool = False  # a custom tool: the arguments are its input
    complete: bool = False  # the arguments have ended

    @property
    def arguments(self) -> str:
        """The text of the arguments so far."""
        return "".join(self.texts)

    def add(self, delta: CallDelta) -> None:
        """Adds the next delta of the call."""
        self.texts.append(delta.arguments)
        self.complete |= delta.complete


@dataclass(slots=True)
class ReasoningSegment:
    """The reasoning. An answer has at most one, before all other segments."""

    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)


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
        return "".join(
            segment.text for segment in self.segments if isinstance(segment, TextSegment)
        )

    @property
    def reasoning(self) -> str:
        """The text of the reasoning so far."""
        return "".join(
            segment.text for segment in self.segments if isinstance(segment, ReasoningSegment)
        )

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
            self._add_reasoning(delta.reasoning)
            self._add_text(delta.text)
            self.end, self.finish_reason = delta.end, delta.finish_reason
            return
        self.scored.extend(delta.scored)
        if isinstance(delta, Start):
            self.prompt_ids = delta.prompt_ids
            self.prompt_logprobs = delta.prompt_logprobs
            self._add_text(delta.text)
        else:
            self.ids.extend(delta.ids)
            self.score += sum(item.logprob.logprob for item in delta.scored if item.logprob)
            for call in delta.continued:
                self.calls[call.index].add(call)
            self._add_reasoning(delta.reasoning)
            self._add_text(delta.text)
            for call in delta.opened:
                new = ToolCallSegment(call.id or "", call.name or "", custom=call.custom)
                new.add(call)
                self.segments.append(new)

    def _add_reasoning(self, text: str) -> None:
        if not text:
            return
        if not self.segments or not isinstance(last := self.segments[-1], ReasoningSegment):
            self.segments.append(last := ReasoningSegment())
        last.texts.append(text)

    def _add_text(self, text: str) -> None:
        if not text:
            return
        if not self.segments or not isinstance(last := self.segments[-1], TextSegment):
            self.segments.append(last := TextSegment())
        last.texts.append(text)


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
