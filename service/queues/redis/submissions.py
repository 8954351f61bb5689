"""Submissions as `submit.lua` expects them, and its reply."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any

from service.messages import GenerationRequest, Submission
from service.queues.admission import (
    Meter,
    RateUsage,
    admission_cost,
    answer_share,
    base_bytes,
    idempotency_bytes,
    kept_bytes,
    request_bytes,
    token_bytes,
)
from service.queues.contract import QueueLimits, SubmitReply, SubmitStatus
from service.queues.redis.connection import Command, RedisClient, present
from service.queues.redis.keys import ShardKeys, idempotency_name, milliseconds
from service.queues.usage import account_of, counted_prompt, counts_output


def submit_command(
    client: RedisClient,
    keys: ShardKeys,
    submission: Submission,
    limits: QueueLimits,
    *,
    evict: bool | None,
    prepaid: float,
    debt: float,
) -> Command:
    """In a sharded queue: `evict`, whether kept submissions may make room; `prepaid`, tokens that
    other shards have counted for it; `debt`, tokens that they have counted beyond their shares.
    """
    allowance, key = submission.allowance, submission.idempotency_key
    return client.script(
        "submit",
        keys.admission,
        submission.manifest,
        submission.input,
        *(request.to_json() for request in submission.requests),
        id=submission.id,
        tenant=submission.tenant,
        # Identifies this call: the script recognises it if it is sent again.
        nonce=secrets.token_hex(6),
        fingerprint=submission.fingerprint,
        idempotency=None if key is None else idempotency_name(submission.tenant, key),
        idempotency_ttl=milliseconds(limits.idempotency_ttl),
        live_ttl=milliseconds(limits.live_ttl),
        grace=None if submission.grace is None else milliseconds(submission.grace),
        max_requests=limits.max_requests,
        max_tokens=limits.max_tokens,
        max_per_tenant=limits.max_per_tenant,
        max_bytes=limits.max_bytes,
        max_tenant_bytes=limits.max_tenant_bytes,
        kept_bytes=kept_bytes(submission),
        base_bytes=base_bytes(submission),
        token_bytes=token_bytes(submission),
        keep=None if submission.keep is None else milliseconds(submission.keep),
        idempotency_bytes=idempotency_bytes(submission),
        key=None if allowance is None else allowance.key,
        tokens_per_minute=None if allowance is None else allowance.tokens_per_minute,
        max_in_flight=None if allowance is None else allowance.max_in_flight,
        account=account_of(submission),
        evict=evict,
        prepaid=prepaid or None,
        debt=debt or None,
        requests=[*map(_admitted, submission.requests, chain(submission.prefixes, repeat(())))],
    )


def decode_submit(reply: list[Any], submission: Submission) -> SubmitReply:
    """The reply of `submit.lua`."""
    status, followed, queued, tokens, *times = reply
    wait, used = (float(ms) / 1000 for ms in times)
    usage, allowance = RateUsage(), submission.allowance
    if allowance is not None and allowance.tokens_per_minute is not None:
        meter = Meter(limit=allowance.tokens_per_minute, used=used)
        usage = RateUsage(tokens=meter, wait=wait)
    return SubmitReply(
        status=SubmitStatus(status.decode()),
        submission_id=followed.decode(),
        queued_requests=queued,
        queued_tokens=tokens,
        usage=usage,
    )


def _admitted(request: GenerationRequest, prefixes: Sequence[str]) -> dict[str, Any]:
    """A request as `submit.lua` expects it."""
    return present(
        id=request.id,
        cost=admission_cost(request),
        timeout=request.timeout_ms or None,
        priority=request.priority,
        share=answer_share(request),
        prompt=counted_prompt(request),
        encodes=None if counts_output(request) else 1,
        bytes=request_bytes(request),
        features=" ".join(request.features),
        prefixes=prefixes,
    )
