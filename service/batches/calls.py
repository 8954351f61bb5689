"""One line as a call of the API, and what its reply means for the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import orjson

from service.batches.batches import DONE, FAILED, Batch
from service.messages import Allowance

MAX_FAILURES = 5
"""Failures of the server after which a line fails."""
_CUT = frozenset({"cancelled", "deadline"})


@dataclass(slots=True)
class LineCall:
    """A call that a replica makes by itself. `state` is filled by the API: see `id`."""

    tenant: str
    allowance: Allowance | None
    path: str
    body: bytes  # JSON
    idempotency_key: str
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str | None:
        """Of the submission that it follows; None if it is not known yet."""
        return self.state.get("request_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class LineReply:
    """`headers` have names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def retry_after(self) -> float:
        """Seconds."""
        return float(self.headers.get("retry-after-ms", "1000")) / 1000


AnswerLine = Callable[[LineCall], Awaitable[LineReply]]


class Verdict(Enum):
    """FINAL: the line is answered. WAIT: the call was not accepted, make it again. AGAIN: the call
    was accepted and its answer is lost or cut; a new one is needed. FAILED: as AGAIN, but not
    forever.
    """

    FINAL = auto()
    WAIT = auto()
    AGAIN = auto()
    FAILED = auto()


def verdict(reply: LineReply) -> Verdict:
    """What a reply means."""
    if reply.status < 400:
        return Verdict.AGAIN if _is_cut(orjson.loads(reply.body)) else Verdict.FINAL
    code = orjson.loads(reply.body)["error"]["code"]
    if reply.status == 410 or code in {"stream_divergence", "journal_lost", "deadline_exceeded"}:
        return Verdict.AGAIN
    if reply.headers.get("x-should-retry") == "false":
        return Verdict.FINAL
    if reply.status in {408, 429, 503}:
        return Verdict.WAIT
    return Verdict.FAILED if reply.status >= 500 else Verdict.FINAL


def _is_cut(answer: dict[str, Any]) -> bool:
    """Whether an answer was ended from outside."""
    ends = {choice.get("finish_reason") for choice in answer.get("choices", ())}
    failure = answer.get("error") or {}
    return (
        bool(ends & _CUT)
        or answer.get("status") == "cancelled"
        or (isinstance(failure, dict) and failure.get("code") == "deadline_exceeded")
    )


def key_of(batch: Batch, custom_id: str, attempt: int) -> str:
    """The idempotency key of a line: equal at every replica."""
    return f"{batch.id}:{_digest(custom_id)}:{attempt}"


def answered(
    batch: Batch, custom_id: str, reply: LineReply, request_id: str
) -> tuple[bytes, bytes]:
    """The row of a line that has a reply."""
    response = {
        "status_code": reply.status,
        "request_id": request_id,
        "body": orjson.Fragment(reply.body),
    }
    row = _row(batch, custom_id, response=response, error=None)
    return DONE if reply.status < 400 else FAILED, row


def unanswered(batch: Batch, custom_id: str, *, code: str, message: str) -> tuple[bytes, bytes]:
    """The row of a line that got no reply."""
    error = {"code": code, "message": message}
    return FAILED, _row(batch, custom_id, response=None, error=error)


def _row(batch: Batch, custom_id: str, **fields: object) -> bytes:
    row_id = "batch_req_" + hashlib.sha256(f"{batch.id}:{custom_id}".encode()).hexdigest()[:32]
    return orjson.dumps({"id": row_id, "custom_id": custom_id, **fields})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
