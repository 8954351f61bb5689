"""Queue: the Protocol between API and engines, and the journal of every answer.

              submit                claim(epoch+1, owner)           finish
    (none) ---------> QUEUED ---------------------> RUNNING ---------------> DONE
                        |                           |  | append*, renew*
          stop/deadline |        lease over/release |  +--+
                        v        -> claimed again (epoch+1; a crash counts, a release does not)
       CANCELLED / DEADLINE <------ stop/deadline (epoch+1 fences the engine)
                                   max_attempts deaths ----> ERROR (engine_crash_loop)

Terminal states absorb; each terminal edge writes exactly one `End`. The journal of a request is
`Tokens` records without holes or overlaps, then one `End`. A token that a client may see is in the
journal first. Who may append is decided by epoch *and* owner; times are the queue's own clock.
Every method may be called again after a lost reply and then answers the same or says so (DUP).

Blame. An answer is a pure function of its request, so a request that kills an engine kills the next
one at the same position. A death counts against a request if the engine that ran it has been silent
for a lease, and no longer if that engine is heard of again. A request with a death is a *suspect*:
it is isolated, which one engine of the cluster does at a time, with half of the suspects that wait
or, for its last attempt, with one. `CLEARED_AFTER` tokens past the position of the death it is
cleared and as good as any other; more suspects may join when the first are `PASSED_AFTER` past it.
A request is failed if its last attempt brings no token more than the one before. Other requests of
an engine that dies while it isolates suspects are not blamed, and requests that no engine died on
never wait for any of this.

Implementations: `memory` (embedded, one process) and `redis`; `tests/queues/contract.py` runs over
both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, Self

from service.decoding import decode
from service.messages import (
    Allowance,
    FinishReason,
    GenerationRequest,
    Record,
    Submission,
)
from service.queues.admission import Usage

CLEARED_AFTER = 8
"""Tokens past the position of an engine's death after which a request is cleared of it."""
PASSED_AFTER = 2
"""Tokens past that position after which a request has most likely not caused the death: the journal
of an engine that dies may lack the tokens of two steps.
"""
FINAL_SILENCE = 4
"""Leases of silence after which an engine counts as dead for good, and a request can be failed."""
JOIN_AFTER = 2.0
"""Seconds after which others may join even before that: a long prompt takes its time."""
BLAME_KEPT = 600.0
"""Seconds for which the death of an engine can be taken back."""
PAGE_TOKENS = 128
"""Tokens of an answer per page: what a reader of a finished answer renders at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """What the whole cluster admits, and how long things live. Times in seconds."""

    max_requests: int = 1024  # queued, not yet running
    max_tokens: int = 1_000_000  # cost of the queued
    max_per_tenant: int = 1024  # queued and running
    max_bytes: int = 512 * 2**20  # of submissions, until they are gone
    max_tenant_bytes: int = 256 * 2**20
    lease: float = 3.0
    max_attempts: int = 3  # engine deaths at one position of an answer that end it
    live_ttl: float = 3600.0  # how long a request without a deadline waits for an engine
    resume_window: float = 600.0
    idempotency_ttl: float = 86_400.0
    sweep_pause: float = 5.0  # nobody swept or attended for so long: graces begin anew
    failover_margin: float = (
        1.5  # from the end of a lease to the next token, made by another engine
    )

    @property
    def failover(self) -> float:
        """The longest silence of a running answer whose engine or store fails over: after either,
        the lease is waited for, and then another engine claims and continues the request.
        """
        return self.lease + self.failover_margin


class SubmitStatus(StrEnum):
    """OK: admitted. EXISTS: this id or key was admitted before, follow that one. CONFLICT: the key
    came with another body. The others: over a limit, nothing was stored or counted. FULL: what
    waits. TENANT: in flight of the tenant or the key. RATE: of the key, a minute. STORAGE and
    TENANT_STORAGE: bytes stored in all, and of the tenant.
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
    """`submission_id` is the one to follow: with EXISTS the earlier one's."""

    status: SubmitStatus
    submission_id: str
    queued_requests: int = 0
    queued_tokens: int = 0
    usage: Usage = field(default_factory=Usage)  # of the allowance's tokens a minute


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSubmission:
    """What any replica may look up to follow an answer again."""

    id: str
    tenant: str
    manifest: str
    num_requests: int


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to append to one request, until it runs out or another claims it."""

    request_id: str
    epoch: int
    owner: str  # "<engine>:<nonce>"

    @property
    def engine(self) -> str:
        """The id of the engine that has it."""
        return self.owner.rpartition(":")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A request handed to an engine, with what earlier engines had already journalled."""

    lease: Lease
    request: GenerationRequest
    tokens: tuple[int, ...] = ()
    attempt: int = 1  # engine deaths near its position + 1; `max_attempts` is the last one
    isolated_until: int | None = None  # tokens up to which it is isolated; None: it is not
    remaining_ms: int | None = None  # until its deadline
    waited_ms: int | None = None  # from its submission; None where it was claimed before


class WriteStatus(StrEnum):
    """OK: written. DUP: it stood there already. GAP: tokens from `count` on are missing, send them
    first. FENCED: the lease is another's or the request has ended.
    """

    OK = "ok"
    DUP = "dup"
    GAP = "gap"
    FENCED = "fenced"


@dataclass(frozen=True, slots=True)
class WriteReply:
    """`count` is the number of tokens in the journal after the call."""

    status: WriteStatus
    count: int


@dataclass(frozen=True, slots=True)
class Write:
    """One record to journal; `Tokens` or, as the last, `End`."""

    lease: Lease
    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine reports of itself. Ownership is decided by leases alone."""

    id: str  # a new one for each process
    numeric_class: str
    version: str
    running: int = 0
    waiting: int = 0  # taken from the queue, not in the batch yet
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_free: int = 0
    max_model_len: int = 0  # 0: not said
    tokens_per_second: float = 0.0  # lately
    features: tuple[str, ...] = ()  # it claims only requests whose features are among them

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Also from what another version wrote: see `service.decoding`. Raises ValueError or
        TypeError if it is malformed.
        """
        return decode(cls, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueDepth:
    """What waits and what runs, over the whole cluster."""

    queued_requests: int
    queued_tokens: int
    running_requests: int
    # How long the first of the waiting ones waits; None: nobody does. It grows by itself.
    oldest_seconds: float | None = field(default=None, compare=False)
    stored_bytes: int = field(default=0, compare=False)  # of submissions that are not gone


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
        to, or cannot keep the promises.
        """
        ...

    # --- the API's side -------------------------------------------------------------------
    async def charge(self, allowance: Allowance) -> Usage:
        """Counts one call against the requests a minute of a key. If they are used up, nothing is
        counted, and `wait` is how many seconds to wait.
        """
        ...

    async def submit(self, submission: Submission) -> SubmitReply:
        """Admits all requests of a submission or none; idempotent by id and by key."""
        ...

    async def lookup(self, submission_id: str) -> StoredSubmission | None:
        """The submission, or None where there is none or its resume window is over."""
        ...

    async def read(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        """The records now in the journal that reach beyond the first `after` tokens, in order.

        The first one may begin before them. Raises NotFound for an unknown request and
        StreamDivergence if the answer has ended with fewer tokens than that.
        """
        ...

    async def read_page(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        """The first of the records that `read` returns: at most `PAGE_TOKENS` tokens, but at least
        one record, or none if the journal has none. Readers of one answer share the work. A page
        may have been read before the store lost data, and overlap with the records after it.
        """
        ...

    def follow(self, request_id: str, *, after: int = 0) -> AsyncIterator[Record]:
        """Those records and all that come, to the `End`; each once. Raises as `read` does."""
        ...

    async def stop(self, request_ids: Sequence[str], reason: FinishReason) -> None:
        """Ends requests that have not ended: CANCELLED, or DEADLINE for those really past it."""
        ...

    async def heartbeat(self, submission_ids: Sequence[str]) -> None:
        """Says that somebody reads them or comes back for them; unknown and ended ones are no
        fault. One call for all that a replica serves, well within their grace.
        """
        ...

    async def forget(self, submission_id: str) -> None:
        """Cancels what has not ended; from now on nobody can look the submission up."""
        ...

    async def sweep(self) -> int:
        """Ends what is past its deadline, and what nobody attended for its grace; any replica calls
        it each second. Returns how many. Time without sweeps, when the store or all replicas were
        away, is not held against anybody: then each grace begins anew.
        """
        ...

    async def depth(self) -> QueueDepth:
        """What waits and runs now."""
        ...

    async def engines(self) -> Sequence[EngineInfo]:
        """Engines heard of within the last ten seconds."""
        ...

    async def check(self) -> None:
        """Returns if the queue takes writes, raises `Unavailable` if it does not. A queue that is
        full takes writes.
        """
        ...

    # --- the engine's side ----------------------------------------------------------------
    async def claim(
        self, engine: EngineInfo, *, limit: int, wait: float, under_served: int = 0
    ) -> Sequence[Claim]:
        """Takes up to `limit` requests, those whose leases ran out included; waits up to `wait`
        seconds for a first one. Only requests whose features the engine has. Higher priorities
        first, and in one class tenants in turns, by tokens. Up to `under_served` more are taken of
        those whose turn it is and of whose tenant less runs than of others on average: an engine
        that is full makes way for them. A sign of life, too: with `limit` 0 and no under_served it
        does nothing else.
        """
        ...

    async def write(self, writes: Sequence[Write]) -> Sequence[WriteReply]:
        """Journals the records of one engine step in one round trip, in order; a reply for each."""
        ...

    async def renew(self, leases: Sequence[Lease]) -> Sequence[str]:
        """Extends the leases of one engine, which is thereby heard of; returns the ids of the
        requests that are no longer its own.
        """
        ...

    async def release(self, leases: Sequence[Lease], *, died: bool = False) -> None:
        """Gives requests back at once: another engine goes on with them. Without blame, unless the
        engine `died`.
        """
        ...

    def stops(self) -> AsyncIterator[str]:
        """Ids of running requests as they are stopped: a hint; `write`, `renew` are the truth."""
        ...

    async def close(self) -> None:
        """Lets connections go; the journal stays where it is."""
        ...
