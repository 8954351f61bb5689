"""Manifest: all that a replica needs besides the journal to render an answer again.

It is stored with the submission and comes back from `Queue.lookup`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

import orjson

from service.decoding import from_object
from service.errors import Unavailable


class Endpoint(StrEnum):
    """Whose shape the answer has."""

    COMPLETIONS = "completions"
    CHAT = "chat"
    RESPONSES = "responses"
    MESSAGES = "messages"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptNote:
    """One prompt. `text` and `ids` are kept only where the answer repeats them."""

    num_tokens: int
    text: str | None = None
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """How an answer is shown. Request i is choice `i % width` of prompt `i // width`."""

    endpoint: Endpoint
    model: str
    fingerprint: str  # the numeric class
    created: int  # Unix seconds
    prompts: tuple[PromptNote, ...]
    width: int = 1  # choices generated for each prompt: best_of, or n
    keep: int = 1  # choices shown of each prompt: n
    stream: bool = False
    logprobs: int | None = None  # as asked: None, or how many of the likeliest
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    echo: bool = False
    return_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    stop: tuple[str, ...] = ()  # the stop strings: text that may begin one is held back
    notation: str | None = None  # how the model writes tool calls; None: it has no tools
    grace: float | None = 0.0  # None: never; seconds without readers before it is cancelled
    given_back: dict[str, Any] = field(default_factory=dict)  # of a response: fields it repeats

    @property
    def stored(self) -> bool:
        """Whether others than the caller may read the answer. Only responses can say no."""
        return self.given_back.get("store") is not False

    @property
    def gives_prompt(self) -> bool:
        """Whether the prompt's tokens come back beside the answer."""
        return self.return_token_ids or self.prompt_logprobs is not None

    @property
    def num_choices(self) -> int:
        """Requests in the submission."""
        return len(self.prompts) * self.width

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counted once."""
        return sum(prompt.num_tokens for prompt in self.prompts)

    def prompt(self, choice: int) -> PromptNote:
        """The prompt of request `choice`."""
        return self.prompts[choice // self.width]

    def to_json(self) -> str:
        """Compact JSON; `from_json` gives back an equal object."""
        return orjson.dumps(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Also from what another version wrote: see `service.decoding`. Raises Unavailable if this
        version cannot render the answer, such as that of a new endpoint: another replica may.
        """
        try:
            return from_object(cls, orjson.loads(text))
        except (ValueError, TypeError) as error:
            raise Unavailable(
                "this answer is of another version of the server; try again",
                code="version_mismatch",
                retry_after=2.0,
            ) from error
