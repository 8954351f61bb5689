"""Collected: one choice of an answer, summed up from what its stream shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from service.api.generation.deltas import Ending, Opening, Scored, Shown
from service.messages import End, TokenLogprob


@dataclass(slots=True)
class Said:
    """Text between calls; an answer without tools has nothing else."""

    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)


@dataclass(slots=True)
class Call:
    """One tool call."""

    id: str
    name: str
    texts: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        """Its arguments so far."""
        return "".join(self.texts)


Run = Said | Call


@dataclass(slots=True)
class Collected:
    """All that was shown so far; with its `end`, the whole answer."""

    runs: list[Run] = field(default_factory=list)  # in order
    ids: list[int] = field(default_factory=list)
    prompt_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    scored: list[Scored] = field(default_factory=list)
    score: float = 0.0  # sum of the answer's log probabilities
    end: End | None = None
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        """The answer's text, an echoed prompt before it."""
        return "".join(run.text for run in self.runs if isinstance(run, Said))

    @property
    def calls(self) -> list[Call]:
        """The answer's tool calls."""
        return [run for run in self.runs if isinstance(run, Call)]

    @property
    def mean_logprob(self) -> float:
        """What `best_of` chooses by."""
        return self.score / max(1, len(self.ids))

    def add(self, shown: Shown) -> None:
        """The next thing shown."""
        if isinstance(shown, Ending):
            self._say(shown.text)
            self.end, self.finish_reason = shown.end, shown.finish_reason
            return
        self.scored.extend(shown.scored)
        if isinstance(shown, Opening):
            self.prompt_ids = shown.prompt_ids
            self.prompt_logprobs = shown.prompt_logprobs
            self._say(shown.text)
        else:
            self.ids.extend(shown.ids)
            self.score += sum(item.logprob.logprob for item in shown.scored if item.logprob)
            for delta in shown.going_on:
                self.calls[delta.index].texts.append(delta.arguments)
            self._say(shown.text)
            for delta in shown.opened:
                self.runs.append(Call(delta.id or "", delta.name or "", [delta.arguments]))

    def _say(self, text: str) -> None:
        if not text:
            return
        if not self.runs or not isinstance(last := self.runs[-1], Said):
            self.runs.append(last := Said())
        last.texts.append(text)


@dataclass(frozen=True, slots=True)
class News:
    """What is new of one run: it may open, and it may grow."""

    index: int
    run: Run
    opens: bool
    text: str


class Follower:
    """Tells what is new of an answer's runs, each thing once, in order."""

    def __init__(self) -> None:
        self.open: int | None = None  # the run that may still grow
        self._told = 0  # pieces of it

    def news(self, runs: Sequence[Run]) -> Iterator[News]:
        """All that was not told yet."""
        for index in range(self.open or 0, len(runs)):
            opens = index != self.open
            if opens:
                self.open, self._told = index, 0
            texts = runs[index].texts
            text = "".join(texts[self._told :])
            self._told = len(texts)
            if opens or text:
                yield News(index, runs[index], opens, text)
