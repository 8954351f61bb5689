"""The plain dataclasses that cross boundaries: API -> queue -> engine -> journal -> API.

Everything here is immutable, made of the standard library alone and goes to JSON and back
(`to_json`, `from_json`), because one process may write a request and another one answer it.
Nothing is validated here: `service/api` has done that before.

    GenerationRequest   one choice of one prompt, or inputs to encode: all that an answer depends on
    Allowance           limits of a key
    Submission          the requests of one HTTP call, admitted or refused together
    Tokens, End         the journal's two kinds of record; `End` comes once, last
    Event               a record on its way from the engine to the journal
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from itertools import chain
from typing import Self

from service.decoding import decode

_PACK_ID = struct.Struct("<I").pack


class FinishReason(StrEnum):
    """Why an answer ended. (The API turns some `stop` into `tool_calls`.)"""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen.

    `seed` is always set: if the client gave none, one was drawn at admission, so that another
    engine draws the same random numbers. They are keyed by (seed, choice, index of the token).
    """

    seed: int  # 0 .. 2**64 - 1
    choice: int = 0  # index among the `n` choices of one prompt
    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # None: no cut
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    banned: tuple[tuple[int, ...], ...] = ()  # token sequences that the output must not contain
    allowed: tuple[int, ...] = ()  # the only tokens that it may contain; empty: all
    top_logprobs: int | None = (
        None  # None: no log probabilities; k: the sampled token's and the top k
    )

    @property
    def penalises(self) -> bool:
        """Whether earlier tokens change the logits."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or any(len(sequence) > 1 for sequence in self.banned)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """What an engine must know of the thinking before an answer's content (`service.thinking`)."""

    format: str  # a name in `THINKING_FORMATS`
    opened: bool  # the prompt ends within it
    verbatim: bool = False  # blanks after it are part of the content
    openings: tuple[tuple[int, ...], ...] = ()  # tokens of the tags that an output may begin with
    joint: tuple[int, ...] = ()  # tokens between its end and the next of these
    closing: tuple[int, ...] = ()  # tokens from its end to the content
    symbols: tuple[tuple[str, int], ...] = ()  # parts of tags that are special tokens, their ids
    budget: int | None = None  # tokens, after which `closing` is forced; None: no limit


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingInputs:
    """The inputs of an encoding request: consecutive parts of its `prompt_ids`.

    Each input counts as one token of the answer, in order: its id is the CRC-32 of its result, and
    its text the result itself (`service.vectors`).
    """

    lengths: tuple[int, ...]  # tokens of each input
    firsts: tuple[int, ...] = ()  # tokens of type 0 at its beginning; empty: all are
    width: int = 0  # float32 values of a result


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One choice of one prompt, or with `encoding` inputs to encode, of which `max_tokens` is the
    number. The answer is a pure function of this and the weights.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    min_tokens: int = 0
    stop: tuple[str, ...] = ()  # stop strings
    include_stop: bool = False  # the stop string or token is part of the text
    skip_special_tokens: bool = True  # false: their names are part of the text
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    prompt_logprobs: int | None = None  # None: no; k: each prompt token's and the top k
    grammar: str | None = None  # that the content must match; syntax: `model.grammar`
    thinking: Thinking | None = None  # if it is limited, or precedes content with a grammar
    prediction: tuple[int, ...] = ()  # that the output may contain: a hint, never a condition
    encoding: EncodingInputs | None = None  # None: generate
    source: int = 0  # of an encoder-decoder: the prompt's first tokens, which the encoder reads
    # Continuations of the prompt, `max_tokens` of them: the last tokens are the output, and
    # `sampling` asks for their log probabilities. Such an output has no text.
    scored: tuple[tuple[int, ...], ...] = ()
    tenant: str = "public"
    priority: int = 1  # 0 before 1 before 2
    timeout_ms: int | None = None  # from submission, by the queue's clock
    trace: str | None = None  # `traceparent` of the call; None: not traced
    model: str = ""  # `ModelCard.key`; empty: any engine may answer

    @property
    def features(self) -> tuple[str, ...]:
        """What an engine must have to answer this: names from `FEATURES`, then the model."""
        needed = [name for name, is_needed in FEATURES.items() if is_needed(self)]
        return (*needed, model_feature(self.model)) if self.model else tuple(needed)

    @property
    def max_total_tokens(self) -> int:
        """Maximum number of tokens of this request in the KV cache, a source among them."""
        return len(self.prompt_ids) + self.max_tokens

    def to_json(self) -> str:
        """Compact JSON; `from_json` returns an equal object."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Also reads JSON of other versions: see `service.decoding`. Raises ValueError or TypeError
        if it is malformed.
        """
        return decode(cls, text)


ENCODING = "encoding"
"""The feature of engines that encode; they have no other, and those that generate lack it."""
FEATURES: Mapping[str, Callable[[GenerationRequest], bool]] = {
    "grammar": lambda request: request.grammar is not None,
    "thinking": lambda request: request.thinking is not None,
    "bans": lambda request: bool(request.sampling.banned or request.sampling.allowed),
    "source": lambda request: request.source > 0,
    "scored": lambda request: bool(request.scored),
    "text": lambda request: request.include_stop or not request.skip_special_tokens,
    ENCODING: lambda request: request.encoding is not None,
}
"""Name -> whether a request depends on it. A new field that changes answers needs a new name here:
engines of an older version, which ignore the field, then do not claim such requests.
"""
GENERATING = tuple(name for name in FEATURES if name != ENCODING)
"""The features of engines that generate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """Limits of one key over the whole cluster; None: no limit of its own."""

    key: str  # the key's name, never its secret
    requests_per_minute: int | None = None  # calls, including refused ones
    tokens_per_minute: int | None = None  # as admission counts them, corrected when answers end
    max_in_flight: int | None = None  # requests, queued and running


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """The requests of one HTTP call. All of them are admitted, or none.

    Request i has the id `<id>.<i>`. `manifest` is what any replica of the API needs to render the
    answer again (endpoint, options); the queue stores it and never reads it. `grace` is the
    reconnect grace period: seconds without a heartbeat of readers after which the queue cancels it;
    None: never. `keep`: seconds for which it and its `input` can be read after its end, if that is
    longer than the resume window.
    """

    id: str
    tenant: str
    requests: tuple[GenerationRequest, ...]
    manifest: str = "{}"
    idempotency_key: str | None = None
    fingerprint: str = ""  # SHA-256 of the canonical body; compared if a key is used again
    grace: float | None = None
    allowance: Allowance | None = None  # None: the key has no limits
    keep: float | None = None  # None: the resume window, without `input`
    # Per request, names of prefixes of its prompt, longest first: see `service.prefixes`. A hint.
    prefixes: tuple[tuple[str, ...], ...] = ()
    input: str = ""  # what later calls need of this one; the queue never reads it
    model: str = ""  # its name in the API, for the usage


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability (natural, of the unmodified distribution) of a token and of the top k."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, log probability), descending


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Journal record: tokens `start .. start + len(ids) - 1` of the answer and the text they add.

    `text` is the text that these tokens complete: bytes of an incomplete character and a possible
    prefix of a stop string are held back until a later record; the record with the last token has
    all that remains.
    """

    start: int
    ids: tuple[int, ...]
    text: str
    digest: int  # rolling_digest of all ids up to and including these
    logprobs: tuple[TokenLogprob, ...] = ()  # one per id if requested
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()  # first record only; [0] is None
    numeric_class: str = ""  # of the engines that generate the answer; first record only

    @property
    def end(self) -> int:
        """Tokens of the answer up to and including this record."""
        return self.start + len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Journal record: the one terminal record of a request, its last."""

    count: int  # tokens of the answer
    reason: FinishReason
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    stopped_by: str | int | None = None  # the stop string or token id that ended it
    error: str | None = None  # error code, if reason is ERROR
    # Unix seconds by the engine's clock; None if the queue ended the request.
    ended_at: int | None = field(default=None, compare=False)


Record = Tokens | End


@dataclass(frozen=True, slots=True)
class Event:
    """A record on its way from the engine to the journal."""

    request_id: str
    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """Public facts about the model that is served."""

    id: str
    max_model_len: int
    vocab_size: int
    numeric_class: str  # weights digest, kernel family, dtype, version: if equal, equal bits
    created: int  # Unix seconds
    block_size: int = 0  # of the engines' prefix caches, tokens; 0: not worth choosing an engine
    vocabulary: str = ""  # digest of the tokenizer's vocabulary; empty: unknown
    start_ids: tuple[int, ...] = ()  # of an encoder-decoder: the decoder's text begins with them
    source_end: int = 0  # of an encoder-decoder: the token that ends a source
    parent: str = ""  # of an adapter: the id of the model that it changes
    adapter: str = ""  # its digest

    @property
    def key(self) -> str:
        """Names the model in requests and engines: equal ids with equal vocabularies are one model,
        if they are adapters with equal digests of the same model. Empty if the vocabulary is
        unknown; without spaces, whatever the id.
        """
        if not self.vocabulary:
            return ""
        parts = [self.id, self.vocabulary, *([self.parent, self.adapter] if self.adapter else [])]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def of_class(self, numeric_class: str) -> Self:
        """The card with the class of its answers by engines of this class."""
        return replace(self, numeric_class=adapted_class(numeric_class, self.adapter))


def adapted_class(numeric_class: str, adapter: str) -> str:
    """The class of answers with an adapter of this digest; empty: without one."""
    return f"{numeric_class}+{adapter[:16]}" if adapter else numeric_class


def model_feature(key: str) -> str:
    """The feature of engines that serve the model of this key."""
    return f"model:{key}"


def merge_tokens(records: Sequence[Tokens]) -> Tokens:
    """Consecutive records as one."""
    first, last = records[0], records[-1]
    if first is last:
        return first
    return replace(
        first,
        ids=tuple(chain.from_iterable(record.ids for record in records)),
        text="".join(record.text for record in records),
        digest=last.digest,
        logprobs=tuple(chain.from_iterable(record.logprobs for record in records)),
    )


def rolling_digest(ids: Iterable[int], *, previous: int = 0) -> int:
    """CRC-32 over token ids; of a + b it is `rolling_digest(b, previous=rolling_digest(a))`."""
    digest = previous
    for token in ids:
        digest = zlib.crc32(_PACK_ID(token), digest)
    return digest


def child_ids(submission_id: str, count: int) -> Sequence[str]:
    """The ids of the requests of a submission."""
    return [f"{submission_id}.{index}" for index in range(count)]
