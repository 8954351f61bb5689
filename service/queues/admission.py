"""What a submission costs at admission: one formula for all queues, so a limit means one thing."""

from __future__ import annotations

import json
from dataclasses import dataclass

from service.messages import GenerationRequest, Submission

MINUTE = 60.0

ANSWER_SHARE = 4
"""One in so many of `max_tokens` counts: most answers end long before their limit."""
BODY_BYTES = 1024
"""Of a body besides lists and texts."""
ID_BYTES = 9
"""Of a token id and what parts it from the next one, in JSON."""
BIAS_BYTES = 40
"""Of a token id and its bias."""
RECORD_BYTES = 512
"""Of the state of a submission or a request besides its texts, and of an idempotency record."""


def answer_share(request: GenerationRequest) -> int:
    """What of the cost is for the answer; an ended one is settled against it."""
    return request.max_tokens // ANSWER_SHARE


def admission_cost(request: GenerationRequest) -> int:
    """Tokens that a queued request counts for against `QueueLimits.max_tokens`, and, until it has
    ended, against its key's tokens a minute.
    """
    return len(request.prompt_ids) + answer_share(request)


def request_bytes(request: GenerationRequest) -> int:
    """Bytes of a request's body, which is stored until the request has ended; no fewer than it has
    as JSON, and found without writing that.
    """
    num_ids = len(request.prompt_ids) + len(request.stop_token_ids)
    bias = BIAS_BYTES * len(request.sampling.logit_bias)
    texts = json.dumps((request.stop, request.grammar)) if request.stop or request.grammar else ""
    return BODY_BYTES + ID_BYTES * num_ids + bias + len(texts)


def kept_bytes(submission: Submission) -> int:
    """Bytes that are stored of a submission besides its bodies, until it is gone."""
    return len(submission.manifest.encode()) + RECORD_BYTES * (1 + len(submission.requests))


def idempotency_bytes(submission: Submission) -> int:
    """Bytes of the record of its idempotency key, which has a time of its own."""
    return 0 if submission.idempotency_key is None else RECORD_BYTES


def stored_bytes(submission: Submission) -> int:
    """All of them, as they are counted against `QueueLimits.max_bytes` at admission."""
    bodies = sum(map(request_bytes, submission.requests))
    return bodies + kept_bytes(submission) + idempotency_bytes(submission)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """One limit a minute of a key. `used` is in seconds at its rate; over 60 is debt."""

    limit: int
    used: float

    @property
    def remaining(self) -> int:
        """Units that may be used at once."""
        # Sums of fractions of a minute do not come out even: a millionth of a unit is none.
        return max(0, int(self.limit * (1 - self.used / MINUTE) + 1e-6))

    @property
    def reset(self) -> float:
        """Seconds until all of the limit is there again."""
        return self.used


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Where a key stands: `requests` after a call, `tokens` after a submission; None if it has no
    such limit.

    `wait` is how many seconds a refused one must wait. One over a minute's limit never fits.
    """

    requests: Meter | None = None
    tokens: Meter | None = None
    wait: float = 0.0
