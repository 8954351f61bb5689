"""Collected: one choice of an answer, summed up from what its stream shows."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.api.pieces import Opening, Scored, Shown
from service.messages import End


@dataclass(slots=True)
class Collected:
    """All that was shown so far; with its `end`, the whole answer."""

    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    prompt_ids: tuple[int, ...] = ()
    scored: list[Scored] = field(default_factory=list)
    score: float = 0.0  # sum of the answer's log probabilities
    end: End | None = None

    @property
    def text(self) -> str:
        """The answer's text, an echoed prompt before it."""
        return "".join(self.texts)

    @property
    def mean_logprob(self) -> float:
        """What `best_of` chooses by."""
        return self.score / max(1, len(self.ids))

    def add(self, shown: Shown) -> None:
        """The next thing shown."""
        if isinstance(shown, End):
            self.end = shown
            return
        self.texts.append(shown.text)
        self.scored.extend(shown.scored)
        if isinstance(shown, Opening):
            self.prompt_ids = shown.prompt_ids
        else:
            self.ids.extend(shown.ids)
            self.score += sum(item.logprob.logprob for item in shown.scored if item.logprob)
