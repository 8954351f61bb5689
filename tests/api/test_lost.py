"""A store that loses what it had accepted: the call is submitted again, under the same ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from service.messages import Submission
from service.queues.contract import QueueLimits, SubmitReply
from service.queues.memory.queue import MemoryQueue

StartService = Callable[..., Any]


class PowerLoss(MemoryQueue):
    """Accepts `losses` submissions and forgets them at once, as a store without power does."""

    def __init__(self, losses: int) -> None:
        super().__init__(QueueLimits())
        self.losses = losses
        self.submitted: list[str] = []

    async def submit(self, submission: Submission) -> SubmitReply:
        """Says OK, and keeps it only where nothing is left to lose."""
        self.submitted.append(submission.id)
        if self.losses:
            self.losses -= 1
            return await MemoryQueue(QueueLimits()).submit(submission)
        return await super().submit(submission)


BODY = {"model": "tiny-model", "prompt": "one two", "max_tokens": 12, "seed": 4, "n": 2}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_lost_call_is_answered_all_the_same(
    start_service: StartService,
    read_events: Callable[[bytes], list[dict[str, Any]]],
    stream: bool,
) -> None:
    async with start_service() as undisturbed:
        expected = (await undisturbed.post("/v1/completions", BODY)).json()["choices"]
    queue = PowerLoss(losses=1)
    async with start_service(queue=queue) as service:
        answer = await service.post("/v1/completions", BODY | {"stream": stream})
        assert answer.status_code == 200
    assert len(queue.submitted) == 2
    assert len(set(queue.submitted)) == 1
    if stream:
        texts = {0: "", 1: ""}
        for event in read_events(answer.content):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == {choice["index"]: choice["text"] for choice in expected}
    else:
        assert answer.json()["choices"] == expected


async def test_what_is_lost_again_is_an_error(start_service: StartService) -> None:
    queue = PowerLoss(losses=2)
    async with start_service(queue=queue) as service:
        answer = await service.post("/v1/completions", BODY)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "journal_lost"
    assert len(queue.submitted) == 2
