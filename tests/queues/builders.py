"""Builders with defaults for the queue tests, and an engine that computes nothing."""

from __future__ import annotations

import itertools
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from service.messages import (
    Allowance,
    End,
    FinishReason,
    GenerationRequest,
    Record,
    SamplingParams,
    Submission,
    Tokens,
    child_ids,
    rolling_digest,
)
from service.queues import Claim, EngineInfo, Lease, Queue, Write, WriteReply, WriteStatus
from service.queues.observer import QueueEvent


class Counts(Counter[QueueEvent]):
    """An observer that remembers."""

    def happened(self, event: QueueEvent, count: int = 1) -> None:
        self[event] += count


def make_submission(
    num_requests: int = 1,
    *,
    identifier: str | None = None,
    tenant: str = "public",
    key: str | None = None,
    fingerprint: str = "body",
    grace: float | None = None,
    allowance: Allowance | None = None,
    **fields: Any,
) -> Submission:
    """`fields` are those of its requests."""
    identifier = identifier or f"s0-{uuid.uuid4().hex}"
    values: dict[str, Any] = {"prompt_ids": (1, 2, 3), "max_tokens": 16} | fields
    requests = tuple(
        GenerationRequest(
            id=request_id, tenant=tenant, sampling=SamplingParams(seed=7, choice=i), **values
        )
        for i, request_id in enumerate(child_ids(identifier, num_requests))
    )
    return Submission(
        id=identifier,
        tenant=tenant,
        requests=requests,
        manifest='{"endpoint":"completions"}',
        idempotency_key=key,
        fingerprint=fingerprint,
        grace=grace,
        allowance=allowance,
    )


def make_tokens(ids: Iterable[int], *, start: int = 0, before: Iterable[int] = ()) -> Tokens:
    """`before` are the ids of the answer up to `start`, for the digest."""
    ids = tuple(ids)
    digest = rolling_digest(ids, previous=rolling_digest(before))
    text = "".join(f" t{token}" for token in ids)
    return Tokens(start=start, ids=ids, text=text, digest=digest)


def make_engine(name: str = "e", *, numeric_class: str = "class-a", **fields: Any) -> EngineInfo:
    values: dict[str, Any] = {"version": "1", "features": ("grammar",)} | fields
    return EngineInfo(id=name, numeric_class=numeric_class, **values)


def oracle(request_id: str, index: int) -> int:
    """Token `index` of the only right answer to a request: one token tells loss, repetition and
    exchange.
    """
    return zlib.crc32(f"{request_id}:{index}".encode()) % 50_000


def answer_of(request_id: str, start: int, end: int) -> Tokens:
    """The right tokens `start .. end - 1` as a record."""
    ids = [oracle(request_id, i) for i in range(end)]
    return make_tokens(ids[start:], start=start, before=ids[:start])


def ids_of(records: Sequence[Record]) -> list[int]:
    return list(itertools.chain.from_iterable(r.ids for r in records if isinstance(r, Tokens)))


def stop_at(count: int, reason: FinishReason = FinishReason.STOP) -> End:
    return End(count=count, reason=reason)


async def append(queue: Queue, lease: Lease, record: Record) -> WriteReply:
    """One record, one reply."""
    (reply,) = await queue.write([Write(lease, record)])
    return reply


async def claim_one(queue: Queue, engine: EngineInfo | None = None, *, wait: float = 0.0) -> Claim:
    (claim,) = await queue.claim(engine or make_engine(), limit=1, wait=wait)
    return claim


async def finish(queue: Queue, claim: Claim, *, length: int) -> None:
    """Journals the rest of a claim's right answer and its end."""
    rid, start = claim.request.id, len(claim.tokens)
    if start < length:
        reply = await append(queue, claim.lease, answer_of(rid, start, length))
        assert reply == WriteReply(WriteStatus.OK, length)
    assert (await append(queue, claim.lease, stop_at(length))).status is WriteStatus.OK
