"""What a request costs at admission: one formula for all queues, so a limit means one thing."""

from __future__ import annotations

from service.messages import GenerationRequest

ANSWER_SHARE = 4
"""One in so many of `max_tokens` counts: most answers end long before their limit."""


def answer_share(request: GenerationRequest) -> int:
    """What of the cost is for the answer; an ended one is settled against it."""
    return request.max_tokens // ANSWER_SHARE


def admission_cost(request: GenerationRequest) -> int:
    """Tokens that a queued request counts for against `QueueLimits.max_tokens`, and, until it has
    ended, against its key's tokens a minute.
    """
    return len(request.prompt_ids) + answer_share(request)
