"""The plain dataclasses that cross boundaries: API -> queue -> engine -> journal -> API.

Everything here is immutable, made of the standard library alone and goes to JSON and back
(`to_json`, `from_json`), because a request may be written by one process and answered by another.
Validation is not done here: whatever reaches these types was already checked in `service/api`.

    GenerationRequest   one choice of one prompt: all that an answer is a function of
    Allowance           how much the key of a call may ask for
    Submission          what one HTTP call asks for: its requests, accepted or refused together
    Tokens, End         the journal's two kinds of record; `End` comes once, last
    Event               a record on its way from the engine to the journal
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Self

from service.decoding import decode

_PACK_ID = struct.Struct("<I").pack


class FinishReason(StrEnum):
    """Why an answer ended. (`tool_calls` is the API's reading of a `stop`.)"""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen.

    `seed` is always set: where the client gave none, one was drawn at admission, so that a second
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
    top_logprobs: int | None = None  # None: no log probabilities; k: the chosen one's and the top k

    @property
    def penalises(self) -> bool:
        """Whether tokens that came before count against a token."""
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One choice of one prompt, complete: the answer is a pure function of this and the weights."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    min_tokens: int = 0
    stop: tuple[str, ...] = ()  # stop strings; never part of the answer's text
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    prompt_logprobs: int | None = None  # None: no; k: each prompt token's and the top k
    grammar: str | None = None  # what the answer must match, in the notation of `model.grammar`
    tenant: str = "public"
    priority: int = 1  # 0 before 1 before 2
    timeout_ms: int | None = None  # from submission; the queue's clock decides, no host's
    trace: str | None = None  # the call's `traceparent`; None: it is not traced

    @property
    def features(self) -> tuple[str, ...]:
        """What an engine must support to answer this: names out of `FEATURES`, sorted."""
        return tuple(name for name, needed in FEATURES.items() if needed(self))

    @property
    def max_total_tokens(self) -> int:
        """The most tokens this request can come to hold in the KV cache."""
        return len(self.prompt_ids) + self.max_tokens

    def to_json(self) -> str:
        """Compact JSON; `from_json` gives back an equal object."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Also from what another version wrote: see `service.decoding`. Raises ValueError or
        TypeError if it is malformed.
        """
        return decode(cls, text)


FEATURES: Mapping[str, Callable[[GenerationRequest], bool]] = {
    "grammar": lambda request: request.grammar is not None,
}
"""Name -> whether a request depends on it. A new field that changes answers needs a new name here:
engines of an older version, which ignore the field, then leave such requests to others.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """How much one key may ask for over the whole cluster; None: no limit of its own."""

    key: str  # the key's name, never its secret
    requests_per_minute: int | None = None  # calls, refused ones too
    tokens_per_minute: int | None = None  # as admission counts them, settled when answers end
    max_in_flight: int | None = None  # requests, waiting and running


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What one HTTP call asks for. Its requests are admitted all together or not at all.

    Request i has the id `<id>.<i>`. `manifest` is the API's own note (endpoint, options) that any
    replica needs to render the answer again; the queue keeps it and never reads it. `grace` is how
    many seconds it goes on unattended before the queue cancels it; None: to its end.
    """

    id: str
    tenant: str
    requests: tuple[GenerationRequest, ...]
    manifest: str = "{}"
    idempotency_key: str | None = None
    fingerprint: str = ""  # SHA-256 of the canonical body; compared when a key comes again
    grace: float | None = None
    allowance: Allowance | None = None  # None: nobody's in particular


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability (natural, of the unmodified distribution) of a token and of the likeliest."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, log probability), likeliest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Journal record: tokens `start .. start + len(ids) - 1` of the answer and the text they add.

    `text` is what became certain with these tokens: bytes of an unfinished character and what may
    begin a stop string are held back until a later record; the record with the last token holds
    all that remains.
    """

    start: int
    ids: tuple[int, ...]
    text: str
    digest: int  # rolling_digest of all ids up to and with these
    logprobs: tuple[TokenLogprob, ...] = ()  # one per id where asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()  # first record only; [0] is None

    @property
    def end(self) -> int:
        """Tokens of the answer after this record."""
        return self.start + len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Journal record: the one terminal record of a request. Nothing comes after it."""

    count: int  # tokens of the answer in all
    reason: FinishReason
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    stopped_by: str | int | None = None  # the stop string or the token id that ended it
    error: str | None = None  # the code of an error, where reason is ERROR


Record = Tokens | End


@dataclass(frozen=True, slots=True)
class Event:
    """A record on its way from the engine to the journal."""

    request_id: str
    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a client may know of the model that answers."""

    id: str
    max_model_len: int
    vocab_size: int
    numeric_class: str  # weights digest, kernel family, dtype, version: equal means equal bits
    created: int  # Unix seconds


def rolling_digest(ids: Iterable[int], *, previous: int = 0) -> int:
    """CRC-32 over token ids, chained: of a + b it is `rolling_digest(b, previous=that of a)`."""
    digest = previous
    for token in ids:
        digest = zlib.crc32(_PACK_ID(token), digest)
    return digest


def child_ids(submission_id: str, count: int) -> Sequence[str]:
    """The ids of the requests of a submission."""
    return [f"{submission_id}.{index}" for index in range(count)]
