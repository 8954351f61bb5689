"""Admission: what a submission costs, and rate meters. One formula for all queues, so that a limit
means the same in each of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from service.messages import GenerationRequest, Submission

MINUTE = 60.0
ANSWER_SHARE = 4
"""One in so many of `max_tokens` counts: most answers end long before their limit."""
BODY_BYTES = 1024
"""Of a body without lists and texts."""
ID_BYTES = 9
"""Of a token id and its separator in JSON."""
BIAS_BYTES = 40
"""Of a token id and its bias."""
RECORD_BYTES = 512
"""Of the state of a submission or a request without its texts, and of an idempotency record."""
TOKEN_BYTES = 256
"""Of a journalled token, as a record of its own."""
LOGPROB_BYTES = 32
"""Of a log probability in it."""
VALUE_BYTES = 6
"""Of a value of an encoding, a float32 in base64."""


def answer_share(request: GenerationRequest) -> int:
    """The part of the cost that is for the answer; corrected by its real length when it ends."""
    known = request.encoding is not None or request.scored  # one per input or continuation
    return request.max_tokens // (1 if known else ANSWER_SHARE)


def submission_cost(submission: Submission) -> int:
    """Tokens that all requests of a submission count for."""
    return sum(map(admission_cost, submission.requests))


def admission_cost(request: GenerationRequest) -> int:
    """Tokens that a queued request counts against `QueueLimits.max_tokens` and, until it has ended,
    against its key's tokens per minute.
    """
    continued = sum(len(each) - 1 for each in request.scored)
    return len(request.prompt_ids) + continued + answer_share(request)


def request_bytes(request: GenerationRequest) -> int:
    """Bytes of a request's body, which is stored until the request has ended: an upper bound of its
    JSON, computed without writing that.
    """
    sampling = request.sampling
    num_ids = len(request.prompt_ids) + len(request.stop_token_ids) + len(sampling.allowed)
    if request.encoding is not None:
        num_ids += len(request.encoding.lengths) + len(request.encoding.firsts)
    lists = (*sampling.banned, *request.scored)
    num_ids += len(request.prediction) + sum(1 + len(each) for each in lists)
    bias = BIAS_BYTES * len(sampling.logit_bias)
    texts = json.dumps((request.stop, request.grammar)) if request.stop or request.grammar else ""
    return BODY_BYTES + ID_BYTES * num_ids + bias + len(texts)


def base_bytes(submission: Submission) -> int:
    """Bytes of a submission without its bodies and its input, which are stored until it is gone."""
    results = sum(map(_result_bytes, submission.requests))
    manifest = len(submission.manifest.encode())
    return manifest + results + RECORD_BYTES * (1 + len(submission.requests))


def _result_bytes(request: GenerationRequest) -> int:
    """Bytes of the results of an encoding request. They are known before, and far larger than those
    of as many tokens.
    """
    inputs = request.encoding
    return 0 if inputs is None else VALUE_BYTES * inputs.width * len(inputs.lengths)


def kept_bytes(submission: Submission) -> int:
    """Those and its input, if it is kept."""
    return base_bytes(submission) + len(submission.input.encode()) * (submission.keep is not None)


def token_bytes(submission: Submission) -> int:
    """Bytes of each journalled token, which count while the submission is kept after its end."""
    asked = [request.sampling.top_logprobs for request in submission.requests]
    most = max((1 + top for top in asked if top is not None), default=0)
    return TOKEN_BYTES + LOGPROB_BYTES * most


def idempotency_bytes(submission: Submission) -> int:
    """Bytes of the record of its idempotency key, which expires on its own."""
    return 0 if submission.idempotency_key is None else RECORD_BYTES


def stored_bytes(submission: Submission) -> int:
    """All of them, as they count against `QueueLimits.max_bytes` at admission."""
    bodies = sum(map(request_bytes, submission.requests))
    return bodies + kept_bytes(submission) + idempotency_bytes(submission)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """One limit per minute of a key, metered by GCRA (the leaky bucket of ATM networks).

    The queue stores one number: the time at which `used` is back to zero, at the steady rate of
    `limit` units per minute; after that it stores nothing. `used` is in seconds at that rate; over
    60 is debt. The whole limit may be used at once after a minute of rest.
    """

    limit: int
    used: float

    @property
    def remaining(self) -> int:
        """Units that may be used at once."""
        # The tolerance, a millionth of a unit, is for rounding errors.
        return max(0, int(self.limit * (1 - self.used / MINUTE) + 1e-6))

    @property
    def reset(self) -> float:
        """Seconds until the whole limit is available again."""
        return self.used


@dataclass(frozen=True, slots=True, kw_only=True)
class RateUsage:
    """A key's meters: `requests` after a call, `tokens` after a submission; None without a limit.

    `wait`: seconds that a refused call must wait. One over a minute's limit never fits.
    """

    requests: Meter | None = None
    tokens: Meter | None = None
    wait: float = 0.0
