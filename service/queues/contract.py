"""The contract of the queue between API and engines, which is also the journal of every answer.

              submit                claim(epoch+1, owner)           finish
    (none) ---------> QUEUED ---------------------> RUNNING ---------------> DONE
                        |                           |  | append*, renew*
          stop/deadline |  lease expired / released |  +--+
                        v        -> claimed again (epoch+1; a crash counts, a release does not)
       CANCELLED / DEADLINE <------ stop/deadline (epoch+1 fences the engine)
                                   max_attempts deaths ----> ERROR (engine_crash_loop)

Terminal states are final; each transition to one writes exactly one `End`. The journal of a request
is `Tokens` records without gaps or overlaps, then one `End`. Tokens are in the journal before a
client can see them. Only the lease with the present epoch *and* owner may append; others are
*fenced*. Times are from the queue's own clock. Every method may be called again after a lost reply,
and then returns the same, or DUP or EXISTS.

Blame. An answer is a pure function of its request, so a request that kills an engine kills the next
one at the same position. A death counts against a request if the engine that ran it has sent no
heartbeat for a lease, until that engine sends one again. Terms:

suspect     a request with a counted death; it is claimed only to be isolated
isolated    running in the *lane*, which one engine of the cluster uses at a time, with half of the
            waiting suspects or, for its last attempt, as a single-request probe. Others may join
            once all are `PASSED_AFTER` tokens past the position of the death
cleared     `CLEARED_AFTER` tokens past that position: no longer a suspect
failed      ended, because its last attempt brought no token more than the one before
bystander   another request of an engine that died while it isolated suspects: not blamed

Requests without a counted death never wait for any of this.

Affinity. Engines announce the prefixes that they hold (`hold`), and a submission names those of its
prompts. If several engines are there, a new request is *reserved* for those that hold its longest
prefix, for `RESERVED_FOR` seconds, unless all of them run far more requests than the engine that
asks (`OVERLOADED`). Others pass it over; the order of priorities and turns stays the same.

Implementations: `memory` (embedded, one process) and `redis`; `tests/queues/contract.py` runs
against both. If the store is several shards, the order of claims and evictions and the lane are
those of each shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol, Self

from service.decoding import decode
from service.messages import (
    Allowance,
    FinishReason,
    GenerationRequest,
    ModelCard,
    Record,
    Submission,
    model_feature,
)
from service.queues.admission import RateUsage
from service.queues.usage import Usage

CLEARED_AFTER = 8
"""Tokens past the position of an engine's death after which a request is cleared of it."""
PASSED_AFTER = 2
"""Tokens past that position after which a request most likely did not cause the death: the journal
of an engine that dies may lack the tokens of two steps.
"""
FINAL_SILENCE = 4
"""Leases without a heartbeat after which a death is final, and can fail a request."""
JOIN_AFTER = 2.0
"""Seconds after which more suspects may be isolated even before that: long prompts take time."""
BLAME_KEPT = 600.0
"""Seconds for which the death of an engine can be taken back."""
CRASH_LOOP = "engine_crash_loop"
"""Error code of a request that is failed for the deaths of its engines."""
MAX_EVICTED = 64
"""Kept submissions that one call may evict to make room."""
RESERVED_FOR = 0.05
"""Seconds for which a request waits for an engine that holds its prefix."""
OVERLOADED = 4
"""Requests that the holder of a prefix may run beyond twice those of the engine that asks."""
HELD_FOR = 300.0
"""Seconds after which what an engine holds is forgotten unless it announces it again."""
MAX_HOLDERS = 8
"""Engines that hold a prefix beyond which it reserves nothing: it is found almost anywhere."""
ENGINE_SILENCE = 10.0
"""Seconds since its last heartbeat after which an engine is no longer listed."""
PAGE_TOKENS = 128
"""Tokens per page: what a reader of a finished answer renders at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """Limits of the whole cluster, and lifetimes in seconds."""

    max_requests: int = 1024  # queued, not yet running
    max_tokens: int = 1_000_000  # admission cost of the queued requests
    max_per_tenant: int = 1024  # queued and running
    max_bytes: int = 512 * 2**20  # of submissions, until they are gone
    max_tenant_bytes: int = 256 * 2**20
    lease: float = 3.0
    max_attempts: int = 3  # engine deaths at one position of an answer that end it
    live_ttl: float = 3600.0  # how long a request without a deadline waits for an engine
    resume_window: float = 600.0
    idempotency_ttl: float = 86_400.0
    sweep_pause: float = 5.0  # without sweeps; all grace periods start again after it
    failover_margin: float = 1.5  # from the end of a lease to the next token, by another engine

    @property
    def failover(self) -> float:
        """The longest gap in a running answer when its engine or store fails over: the lease
        expires, then another engine claims and continues the request.
        """
        return self.lease + self.failover_margin


def slot_of(key: str) -> int:
    """The slot of an idempotency key, 0 .. 65535. A queue of several shards finds a submission by
    its slot, the last four hex digits of its id; so submissions with one key must have the key's.
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:2])


class SubmitStatus(StrEnum):
    """OK: admitted. EXISTS: this id or key was admitted before, follow that one. CONFLICT: the key
    came with another body. The others are over a limit, nothing was stored or counted. FULL: queued
    requests. TENANT: requests in flight of the tenant or the key. RATE: the key's tokens per
    minute. STORAGE and TENANT_STORAGE: bytes stored in all, and of the tenant.
    """

    OK = "ok"
    EXISTS = "exists"
    CONFLICT = "conflict"
    FULL = "full"
    TENANT = "tenant"
    RATE = "rate"
    STORAGE = "storage"
    TENANT_STORAGE = "tenant_storage"


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitReply:
    """`submission_id` is the one to follow: the earlier one if EXISTS."""

    status: SubmitStatus
    submission_id: str
    queued_requests: int = 0
    queued_tokens: int = 0
    usage: RateUsage = field(default_factory=RateUsage)  # of the allowance's tokens per minute


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSubmission:
    """What any replica looks up to follow an answer again."""

    id: str
    tenant: str
    manifest: str
    num_requests: int


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to append to one request, until it expires or another engine claims the request."""

    request_id: str
    epoch: int
    owner: str  # "<engine>:<nonce>"

    @property
    def engine(self) -> str:
        return self.owner.rpartition(":")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A request handed to an engine, with the tokens that earlier engines journalled."""

    lease: Lease
    request: GenerationRequest
    tokens: tuple[int, ...] = ()
    attempt: int = 1  # engine deaths near its position + 1; `max_attempts` is the last one
    isolated_until: int | None = None  # tokens up to which it is isolated; None: not isolated
    remaining_ms: int | None = None  # until its deadline
    waited_ms: int | None = None  # from its submission; None if it was claimed before


class WriteStatus(StrEnum):
    """OK: written. DUP: it was there already. GAP: tokens from `count` on are missing, send them
    first. FENCED: the lease is lost or the request has ended. The part of the store that has the
    request's journal does not answer (AWAY) or is full (STORAGE): send it again.
    """

    OK = "ok"
    DUP = "dup"
    GAP = "gap"
    FENCED = "fenced"
    AWAY = "away"
    STORAGE = "storage"


@dataclass(frozen=True, slots=True)
class WriteReply:
    """`count` is the number of tokens in the journal after the call."""

    status: WriteStatus
    count: int


@dataclass(frozen=True, slots=True)
class Write:
    """One record to journal: `Tokens` or, as the last one, `End`."""

    lease: Lease
    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """An engine's report of itself. Leases alone decide ownership."""

    id: str  # a new one for each process
    numeric_class: str
    version: str
    running: int = 0
    waiting: int = 0  # claimed, not in the batch yet
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_free: int = 0
    max_model_len: int = 0  # 0: unknown
    tokens_per_second: float = 0.0  # recently
    features: tuple[str, ...] = ()  # it claims only requests whose features are among them
    model: str = ""  # `ModelCard.id`, for people: its features decide what it claims
    block_size: int = 0  # of its prefix cache, tokens; 0: unknown

    def serves(self, card: ModelCard) -> bool:
        """Whether it answers requests for this model."""
        return not card.key or model_feature(card.key) in self.features

    def without_load(self) -> EngineInfo:
        """What engines of one group have in common: all but the name and the figures of now."""
        return replace(
            self,
            id="",
            running=0,
            waiting=0,
            blocks_used=0,
            blocks_cached=0,
            blocks_free=0,
            tokens_per_second=0.0,
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Also reads reports of other versions: see `service.decoding`. Raises ValueError or
        TypeError if it is malformed.
        """
        return decode(cls, text)


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """Engines whose reports differ in their load alone. `info` is what they have in common."""

    info: EngineInfo
    engines: int
    tokens_per_second: float  # their sum


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDepth:
    """Queued and running requests of one model."""

    queued_requests: int = 0
    queued_tokens: int = 0  # admission cost of the queued requests
    running_requests: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueDepth:
    """Queued and running requests of the whole cluster."""

    queued_requests: int
    queued_tokens: int
    running_requests: int
    # Age of the oldest queued request; None: none is queued. It grows by itself.
    oldest_seconds: float | None = field(default=None, compare=False)
    stored_bytes: int = field(default=0, compare=False)  # of submissions that are not gone
    # By `ModelCard.key`; a model without requests may be missing.
    by_model: Mapping[str, ModelDepth] = field(default_factory=dict, compare=False)


class Queue(Protocol):
    """Every method may raise `Unavailable` if the queue's store cannot be reached.

    Handlers of the API let it propagate: it is their 503. `follow` and `stops` wait for the store
    themselves. Background loops (sweeps, heartbeats of readers, the list of engines) and the worker
    repeat the call; see `service.worker.worker`.
    """

    limits: QueueLimits
    shared: bool  # whether other processes can read the answers, also after this one ends

    async def open(self) -> None:
        """Called once at the start. Raises StartupError if the store cannot be reached or written
        to, or cannot give the guarantees.
        """

    # --- the API's side -------------------------------------------------------------------
    async def charge(self, allowance: Allowance) -> RateUsage:
        """Counts one call against a key's requests per minute. If they are used up, it counts
        nothing and sets `wait`.
        """

    async def submit(self, submission: Submission) -> SubmitReply:
        """Admits all requests of a submission or none; idempotent by id and by key.

        If it lacks room, kept submissions that have ended are evicted, oldest first: of its tenant
        for that tenant's limit, else of the tenant that keeps the most bytes. Evicted is deleted
        or, within its resume window, kept until then without its input.
        """

    async def lookup(self, submission_id: str) -> StoredSubmission | None:
        """Returns None if the submission is unknown or its resume window is over."""

    async def read_input(self, submission_id: str) -> str | None:
        """The input of a kept submission; None if it is unknown or not kept."""

    async def touch(self, submission_ids: Sequence[str]) -> None:
        """Starts the time for which ended submissions are kept again; ignores all others."""

    async def read(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        """The records now in the journal that reach beyond the first `after` tokens, in order.

        The first one may begin before them. Raises NotFound if the request is unknown, and
        StreamDivergence if the answer has ended with fewer tokens than that.
        """

    async def read_page(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        """The first of the records that `read` returns: at most `PAGE_TOKENS` tokens, but at least
        one record, or none if the journal has none. Readers of one answer share the work. A page
        may be from before a data loss of the store, and overlap with the records after it.
        """

    def follow(self, request_id: str, *, after: int = 0) -> AsyncIterator[Record]:
        """Yields those records and all later ones, each once, up to the `End`. Raises as `read`."""

    async def stop(self, request_ids: Sequence[str], reason: FinishReason) -> None:
        """Ends requests that have not ended: CANCELLED, or DEADLINE if they are overdue."""

    async def heartbeat(self, submission_ids: Sequence[str]) -> None:
        """Reports that submissions have readers, or will have again; ignores unknown and ended
        ones. A replica makes one call for all that it serves, well within their grace periods.
        """

    async def forget(self, submission_id: str) -> None:
        """Cancels what has not ended, and removes the submission from lookup."""

    async def sweep(self) -> int:
        """Ends what is past its deadline, and what had no heartbeat for its grace period; called by
        every replica each second. Returns how many. After a time without sweeps, because the store
        or all replicas were down, each grace period starts again.
        """

    async def take_lease(self, name: str, owner: str, *, seconds: float) -> bool:
        """Takes a lease that is free, or extends the owner's; returns whether the owner has it for
        so many seconds from now. It is advice: a store that loses data may give it twice.
        """

    async def drop_lease(self, name: str, owner: str) -> None:
        """Frees a lease if the owner has it."""

    async def usage(self, days: Sequence[int]) -> Sequence[Usage]:
        """What ended on these days (since 1970, UTC), by day, tenant, key and model; kept for
        `USAGE_KEPT` days.
        """

    async def depth(self) -> QueueDepth: ...

    async def engines(self) -> Sequence[EngineInfo]:
        """Engines that sent a heartbeat in the last `ENGINE_SILENCE` seconds."""

    async def engine_groups(self) -> Sequence[EngineGroup]:
        """Those engines, summed up; a shared queue may return what was true a second ago."""

    async def check(self) -> None:
        """Raises `Unavailable` if the queue does not accept writes; a full queue does."""

    # --- the engine's side ----------------------------------------------------------------
    async def hold(self, engine: str, prefixes: Collection[str]) -> None:
        """Replaces the names of the prefixes that an engine holds; a hint, for requests that are
        submitted from now on. It is forgotten after `HELD_FOR` seconds, or with the store's data.
        """

    async def claim(
        self, engine: EngineInfo, *, limit: int, wait: float, under_served: int = 0
    ) -> Sequence[Claim]:
        """Claims up to `limit` requests whose features the engine has, expired leases included;
        waits up to `wait` seconds for the first one. Higher priorities first, and in one priority
        tenants in turns, by tokens. Claims up to `under_served` more, of tenants whose turn it is
        and that have fewer running requests than the average: a full engine preempts others for
        them. Also a heartbeat of the engine, and nothing else if both limits are 0: then it waits
        no longer, and what is submitted next wakes other engines.
        """

    async def write(self, writes: Sequence[Write]) -> Sequence[WriteReply]:
        """Journals the records of one engine step in one round trip, in order; a reply for each.

        A queue whose store is in several parts replies AWAY or STORAGE instead of `Unavailable`.
        """

    async def renew(self, leases: Sequence[Lease]) -> Sequence[str]:
        """Extends the leases of one engine, and is its heartbeat. Returns the ids of the requests
        whose leases are lost.
        """

    async def release(self, leases: Sequence[Lease], *, died: bool = False) -> None:
        """Releases requests at once, so that another engine continues them; no death is counted,
        unless the engine `died`.
        """

    def stops(self) -> AsyncIterator[str]:
        """Ids of running requests as they are stopped: a hint; `write` and `renew` are
        authoritative.
        """

    async def close(self) -> None:
        """Closes connections; the journal is kept."""
