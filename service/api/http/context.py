"""What handlers have access to: the parts of the application, its limits, the caller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, Protocol, Self

from fastapi import Depends, Request
from pydantic import BaseModel

from model.text.encoder_tokenizer import EncoderTokenizer
from model.text.tokenizer import Tokenizer
from service.api.http.auth import Tenant
from service.api.http.call import Readers
from service.api.http.observer import BUSY, ApiObserver
from service.errors import BadRequest, NotFound, Unavailable
from service.fair_pool import FairPool
from service.messages import ModelCard
from service.queues.contract import Queue, QueueLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiLimits:
    """Caps on one call. Times are in seconds. What is over a cap is refused, never cut short."""

    # --- the body -------------------------------------------------------------------------
    max_body_bytes: int = 4 * 2**20
    max_json_depth: int = 64
    body_timeout: float = 20.0  # from the first read of a body to its last byte
    inline_body_bytes: int = 65_536  # longer bodies are parsed in a thread

    # --- work that waits for a thread, in each pool ------------------------------------------
    text_threads: int = 2
    max_waiting_bytes: int = 128 * 2**20
    max_tenant_waiting_bytes: int = 32 * 2**20
    max_waiting_maps: int = 32  # attention
    max_tenant_waiting_maps: int = 4

    # --- what a body may ask for ----------------------------------------------------------
    max_choices: int = 16  # n, best_of
    max_prompts: int = 64
    max_work_units: int = 64  # prompts times choices
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_stop_token_ids: int = 256
    max_bad_words: int = 64
    max_bad_word_chars: int = 64
    max_allowed_token_ids: int = 1024
    max_logprobs: int = 5  # completions
    max_top_logprobs: int = 20  # chat
    max_prediction_tokens: int = 16_384  # the rest of a prediction is cut off: it is only a hint
    max_echo_tokens: int = 8192  # echo or prompt log probabilities, over all prompts
    max_attention_tokens: int = 512  # a map has half the square of them, and is a second of work
    max_timeout_ms: int = 86_400_000
    max_key_chars: int = 255  # Idempotency-Key
    max_echoed_bytes: int = 2**20  # of a field that a response repeats
    max_chain: int = 256  # stored responses that an input refers to
    template_kwargs: frozenset[str] = frozenset({"enable_thinking", "thinking"})
    inline_text_chars: int = 8192  # longer prompts are tokenised in a thread

    # --- streams --------------------------------------------------------------------------
    keep_alive: float = 15.0  # silence after which a comment or a ping is sent
    stall_timeout: float = 60.0  # a reader that takes nothing for so long is dropped
    grace: float = 30.0  # an answer that its reader may come back for is kept so long
    replica_grace: float = 30.0  # any other, where the replica that serves its reader is gone
    backend_patience: float = 30.0  # an open stream waits so long for an absent queue
    backend_retry: float = 0.25
    keep_responses: float = 3600.0  # stored responses and their input are kept so long
    resume_window: float = 600.0  # as the queue's: after it an id is "expired", not "unknown"
    max_event_id_chars: int = 4096
    sweep_interval: float = 1.0  # between two searches for requests past their deadline

    @property
    def attend_interval(self) -> float:
        """Seconds between two times of telling the queue who is read here."""
        return min(grace for grace in (self.grace, self.replica_grace) if grace > 0) / 3

    @property
    def sweep_pause(self) -> float:
        """Seconds without a sweep after which graces begin anew.

        Readers are attended as often, so nobody's grace runs out within a shorter absence of the
        queue.
        """
        return min(QueueLimits().sweep_pause, max(0.2, self.attend_interval))


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """The state of the process. None of these may block."""

    started: Callable[[], bool] = lambda: True  # the weights are loaded
    live: Callable[[], bool] = lambda: True  # the engine makes progress or has nothing to do
    draining: Callable[[], bool] = lambda: False  # shutting down: accepts no new calls


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkPools:
    """Threads for work that clients cause, in one pool per kind. In each of them tenants take
    turns, and the waiting work is bounded in bytes.
    """

    bodies: FairPool  # parsing and validating JSON
    templates: FairPool  # chats to token ids, by the model's chat template
    tokens: FairPool  # text to token ids and back

    @classmethod
    def of(cls, limits: ApiLimits, observer: ApiObserver) -> Self:
        """Pools that start a thread when they first need one."""

        def pool(work: str, threads: int) -> FairPool:
            return FairPool(
                work,
                threads=threads,
                max_weight=limits.max_waiting_bytes,
                max_tenant_weight=limits.max_tenant_waiting_bytes,
                refused=partial(observer.call_refused, BUSY),
            )

        return cls(
            bodies=pool("parsing", 1),  # the interpreter lock allows no more
            templates=pool("the chat template", limits.text_threads),
            tokens=pool("tokenising", limits.text_threads),
        )

    def close(self) -> None:
        """Cancels waiting work; running work continues to its end."""
        for pool in (self.bodies, self.templates, self.tokens):
            pool.close()


class AttentionReads(Protocol):
    """Reads attention maps of one network, see `system.attention`."""

    num_layers: int
    num_heads: int

    async def read(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        *,
        tenant: str,
        layer: int | None,
        head: int | None,
    ) -> list[list[float]]: ...

    def close(self) -> None: ...


class GrammarErrors(Protocol):
    """Finds grammars that do not compile, see `structured.validator`."""

    async def error(self, grammar: str, *, tenant: str) -> str | None:
        """The error of a grammar, as the end of a sentence; None if it is valid."""
        ...

    def close(self) -> None: ...


class ModelKind(StrEnum):
    """What a model does."""

    GENERATE = "generate"  # continues a text, token by token
    EMBED = "embed"  # a vector per text
    SCORE = "score"  # a score per pair of texts: a cross-encoder
    CLASSIFY = "classify"  # a probability per label


ENDPOINTS: Mapping[ModelKind, tuple[str, ...]] = MappingProxyType({
    ModelKind.GENERATE: (
        "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages",
        "/v1/decisions",
    ),
    ModelKind.EMBED: ("/v1/embeddings", "/v1/rerank", "/v2/rerank", "/v1/score"),
    ModelKind.SCORE: ("/v1/rerank", "/v2/rerank", "/v1/score", "/v1/classify"),
    ModelKind.CLASSIFY: ("/v1/classify",),
})  # fmt: skip
"""The endpoints that compute something with a model."""


class EncoderFacts(Protocol):
    """What a model computes from an input; `model.runners.encoding` has the units."""

    @property
    def width(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def prompts(self) -> Mapping[str, str]: ...
    @property
    def default_prompt(self) -> str | None: ...
    @property
    def labels(self) -> Sequence[str]: ...
    @property
    def problem(self) -> str | None: ...
    @property
    def sigmoid(self) -> bool: ...
    @property
    def has_head(self) -> bool: ...
    @property
    def scores_pairs(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedEncoder:
    """The part of an encoder that a replica of the API has."""

    tokenizer: EncoderTokenizer
    info: EncoderFacts

    @property
    def kind(self) -> ModelKind:
        if self.info.scores_pairs:
            return ModelKind.SCORE
        return ModelKind.CLASSIFY if self.info.has_head else ModelKind.EMBED


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model that this replica takes requests for; engines, here or elsewhere, compute it. It
    has a tokenizer and grammars if it generates, and else an encoder.
    """

    tokenizer: Tokenizer | None = None
    grammars: GrammarErrors | None = None
    encoder: ServedEncoder | None = None
    read_card: Callable[[], ModelCard]  # an API replica learns from engines at run time
    served: Callable[[], bool] = lambda: True  # an engine sent a heartbeat lately
    tokens_per_second: Callable[[], float] = lambda: 0.0  # of its engines; 0: unknown
    attention: AttentionReads | None = None  # None: its network is not in this process

    @property
    def card(self) -> ModelCard:
        return self.read_card()

    @property
    def kind(self) -> ModelKind:
        return ModelKind.GENERATE if self.encoder is None else self.encoder.kind

    @property
    def does_not(self) -> BadRequest:
        """The error of a request for what it does not do."""
        paths = ", ".join(ENDPOINTS[self.kind])
        return BadRequest(
            f"this model does not do that; it is for {paths}",
            code="unsupported_model",
            param="model",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The models by their names in the API. The first one gets requests that need not name one."""

    table: Mapping[str, ServedModel]  # never empty
    aliases: Mapping[str, str] = field(default_factory=dict)  # further name -> name

    @classmethod
    def of(cls, *models: ServedModel, aliases: Mapping[str, str] | None = None) -> Self:
        return cls(table={model.card.id: model for model in models}, aliases=aliases or {})

    @property
    def first(self) -> ServedModel:
        return next(iter(self.table.values()))

    def states(self) -> dict[str, str]:
        """Of each model: `ready`, or `no engine` if none serves it now."""
        return {
            name: "ready" if model.served() else "no engine" for name, model in self.table.items()
        }

    def named(self) -> Iterator[tuple[str, ServedModel]]:
        """Every name, aliases included, with its model."""
        yield from self.table.items()
        yield from ((alias, self.table[name]) for alias, name in self.aliases.items())

    def find(self, name: str | None) -> ServedModel | None:
        """The model of a name or an alias; None if it is unknown."""
        return self.first if name is None else self.table.get(self.aliases.get(name, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiContext:
    """The parts that the endpoints work with."""

    queue: Queue
    models: Models
    limits: ApiLimits
    observer: ApiObserver
    probes: Probes
    pools: WorkPools
    readers: Readers
    version: str
    replay_turns: asyncio.Lock = field(default_factory=asyncio.Lock)  # see `generation.follow`
    closing: asyncio.Event = field(default_factory=asyncio.Event)  # open connections end now

    def model(self, name: str | None) -> ModelContext:
        """The context of a request that names this model. Raises NotFound if it is unknown."""
        model = self.models.find(name)
        if model is None:
            raise NotFound(
                "unknown model; /v1/models lists the models of this server",
                code="model_not_found",
                param="model",
            )
        return self.with_model(model)

    def of_answer(self, name: str, *, key: str) -> ModelContext:
        """The context of an answer by the model of this name and key. Raises Unavailable if this
        replica has not its tokenizer; another replica may.
        """
        model = self.models.table.get(name)
        if model is None or key not in {"", model.card.key}:
            raise Unavailable(
                "the model of this answer is not served here; try again",
                code="model_not_loaded",
                retry_after=2.0,
            )
        return self.with_model(model)

    def with_model(self, model: ServedModel) -> ModelContext:
        shared = {each.name: getattr(self, each.name) for each in fields(ApiContext)}
        return ModelContext(**shared, served=model)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelContext(ApiContext):
    """The context of a request whose model is chosen."""

    served: ServedModel

    @property
    def card(self) -> ModelCard:
        """The card of the model, as it is known now."""
        return self.served.card

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises BadRequest if the model does not generate."""
        if self.served.tokenizer is None:
            raise self.served.does_not
        return self.served.tokenizer

    @property
    def vocabulary(self) -> Tokenizer | EncoderTokenizer:
        """The tokenizer of the model, whatever it does."""
        return self.served.tokenizer or self.encoder.tokenizer

    @property
    def grammars(self) -> GrammarErrors:
        """Raises BadRequest if the model does not generate."""
        if self.served.grammars is None:
            raise self.served.does_not
        return self.served.grammars

    @property
    def encoder(self) -> ServedEncoder:
        """Raises BadRequest if the model generates."""
        if self.served.encoder is None:
            raise self.served.does_not
        return self.served.encoder

    def ensure_kind(self, *kinds: ModelKind) -> None:
        """Raises BadRequest, with the endpoints to use, if the model is of none of these kinds."""
        if self.served.kind not in kinds:
            raise self.served.does_not

    def ensure_served(self) -> None:
        """Raises Unavailable if no engine serves the model now."""
        if not self.served.served():
            self.observer.call_unserved(self.card.id)
            raise Unavailable("no engine of this model is available", code="backend_unavailable")


class JsonRequest(Request):
    """A request whose body is already read and parsed; a long one is validated, too."""

    raw: bytes
    parsed: dict[str, Any] | BaseModel

    async def body(self) -> bytes:
        return self.raw

    async def json(self) -> dict[str, Any] | BaseModel:
        """The parsed object, or the validated model, which FastAPI accepts, too."""
        return self.parsed


def get_context(request: Request) -> ApiContext:
    """The context of the app that serves this request."""
    context = request.app.state.context
    assert isinstance(context, ApiContext)  # noqa: S101  # set by build_app
    return context


def get_tenant(request: Request) -> Tenant:
    """The tenant, as `middleware` authenticated it."""
    tenant = request.state.tenant
    assert isinstance(tenant, Tenant)  # noqa: S101  # set by the middleware
    return tenant


def from_app(name: str) -> Any:  # noqa: ANN401  # of any type
    """A dependency: what `build_app` has stored in `app.state` under this name."""

    # FastAPI calls a dependency that is no coroutine in a thread of a pool that all calls share.
    async def provide(request: Request) -> Any:  # noqa: ANN401
        return getattr(request.app.state, name)

    return Depends(provide)


async def _provide_tenant(request: Request) -> Tenant:
    return get_tenant(request)


Context = Annotated[ApiContext, from_app("context")]
Caller = Annotated[Tenant, Depends(_provide_tenant)]
