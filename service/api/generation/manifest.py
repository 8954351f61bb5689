"""Manifest: everything that a replica needs besides the journal to render an answer again.

It is stored with the submission and comes back from `Queue.lookup`. Names of fields are a format
that other versions read: `given_back` holds the echoed request fields, `notation` the name of the
tool-call format.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

import orjson

from service.decoding import from_object
from service.errors import Unavailable


class Endpoint(StrEnum):
    """The dialect of an answer."""

    COMPLETIONS = "completions"
    CHAT = "chat"
    RESPONSES = "responses"
    MESSAGES = "messages"
    EMBEDDINGS = "embeddings"
    RERANK = "rerank"
    SCORE = "score"
    CLASSIFY = "classify"
    DECISIONS = "decisions"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptNote:
    """One prompt. `text` and `ids` are stored only if the answer repeats them."""

    num_tokens: int
    text: str | None = None
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningNote:
    """How reasoning is found in the answer."""

    format: str  # a name in `THINKING_FORMATS`
    opened: bool  # the prompt ends within it
    verbatim: bool = False  # blanks after it are part of the content
    included: bool = True  # whether the answer has it


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolNote:
    """What the parser of calls must know of a tool."""

    name: str
    custom: bool = False  # takes a text
    types: tuple[tuple[str, tuple[str, ...]], ...] = ()  # parameter, and its JSON types


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingNote:
    """What an answer says of the results of encoding; they are those of all requests, in order."""

    num_inputs: int
    base64: bool = False  # embeddings as text
    dimensions: int | None = None  # of embeddings; None: all
    num_queries: int = 0  # embeddings to compare those after them with; 0: pairs were encoded
    top_n: int | None = None  # of the documents, the best; None: all
    documents: tuple[str, ...] = ()  # that the answer repeats
    activation: bool = True  # scores and probabilities; false: logits
    background: bool = False  # the client gets the id at once, and the answer later by it


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionNote:
    """One question of a decision. Per option, the numbers of the scored tokens that it has, and of
    those of which any one ends it; empty: no option needs an end.
    """

    type: str  # predicate, choice, score
    name: str | None
    options: tuple[str | bool, ...]  # of a predicate: that it is true, and that it is not
    paths: tuple[tuple[int, ...], ...]
    ends: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionNote:
    """What an answer says of a decision. Each request scores the tokens of a question's options."""

    questions: tuple[QuestionNote, ...]
    num_inputs: int  # scored tokens
    background: bool = False  # the client gets the id at once, and the answer later by it


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """How an answer is rendered. Request i is choice `i % width` of prompt `i // width`."""

    endpoint: Endpoint
    model: str
    model_key: str = ""  # `ModelCard.key`; empty: unknown
    fingerprint: str  # the numeric class that the replica knew when it admitted the request
    created: int  # Unix seconds
    prompts: tuple[PromptNote, ...]
    width: int = 1  # choices generated per prompt: best_of, or n
    keep: int = 1  # choices returned per prompt: n
    stream: bool = False
    logprobs: int | None = None  # as requested: None, or how many top log probabilities
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    tokens_as_ids: bool = False  # log probabilities name tokens by their ids
    echo: bool = False
    prompt_only: bool = False  # the one token that was generated is not part of the answer
    skip_special_tokens: bool = True  # whether special tokens have no text
    return_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    stop: tuple[str, ...] = ()  # stop strings: text that may begin one is held back
    obfuscation: bool = False  # pad the chunks of the stream
    service_tier: str | None = None  # that was used, if one was requested
    notation: str | None = None  # the tool-call format; None: no tools
    tools: tuple[ToolNote, ...] = ()  # custom ones, and those with types
    reasoning: ReasoningNote | None = None  # None: all text is content
    sealed_reasoning: bool = False  # the answer also has the reasoning as text to be sent back
    grace: float | None = 0.0  # seconds without readers until it is cancelled; None: never
    encoding: EncodingNote | None = None  # None: the answer is generated
    decision: DecisionNote | None = None
    given_back: dict[str, Any] = field(default_factory=dict)  # `Generation.echoed`

    @property
    def has_status(self) -> bool:
        """Whether the answer is an object with a status: then a failure is a status, too."""
        return bool(self.given_back)

    @property
    def result_note(self) -> EncodingNote | DecisionNote | None:
        """Of an answer that is one result and never a stream."""
        return self.encoding or self.decision

    @property
    def background(self) -> bool:
        """Whether the client gets the object at once and not the answer."""
        return bool(self.given_back.get("background"))

    @property
    def stored(self) -> bool:
        """Whether the answer can be read again under its id."""
        return self.given_back.get("store") is not False

    @property
    def gives_prompt(self) -> bool:
        """Whether the answer has fields about the prompt's tokens."""
        return self.return_token_ids or self.prompt_logprobs is not None

    @property
    def num_choices(self) -> int:
        """Requests in the submission."""
        return len(self.prompts) * self.width

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts; a prompt counts once for all of its choices."""
        return sum(prompt.num_tokens for prompt in self.prompts)

    def prompt(self, choice: int) -> PromptNote:
        """The prompt of request `choice`."""
        return self.prompts[choice // self.width]

    def to_json(self) -> str:
        """Compact JSON; `from_json` returns an equal object."""
        return orjson.dumps(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads records of other versions too: see `service.decoding`. Raises Unavailable if this
        version cannot render the answer, such as one of a new endpoint: another replica may.
        """
        try:
            return from_object(cls, orjson.loads(text))
        except (ValueError, TypeError) as error:
            raise Unavailable(
                "this answer is of another version of the server; try again",
                code="version_mismatch",
                retry_after=2.0,
            ) from error
