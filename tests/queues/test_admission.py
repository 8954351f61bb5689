"""Stored bytes: the formula against what is really written."""

from __future__ import annotations

import random

import pytest

from service.messages import Allowance, GenerationRequest, SamplingParams
from service.queues.admission import BODY_BYTES, request_bytes, stored_bytes
from tests.queues.builders import make_submission

TEXTS = ("", "a", "\n", "é", "😀", "\x00", '"', "x" * 300)


@pytest.mark.slow
def test_a_body_is_never_larger_than_it_is_counted() -> None:
    """And not much smaller: lists and texts are counted by their length."""
    draw = random.Random(5)
    for _ in range(300):
        sampling = SamplingParams(
            seed=2**64 - 1,
            choice=63,
            temperature=draw.random(),
            top_k=draw.choice((None, 2**31 - 1)),
            top_p=draw.random(),
            min_p=draw.random(),
            presence_penalty=-draw.random(),
            frequency_penalty=-draw.random(),
            repetition_penalty=draw.random(),
            logit_bias=tuple((2**20 - 1, -draw.random()) for _ in range(draw.choice((0, 1024)))),
            top_logprobs=draw.choice((None, 20)),
        )
        request = GenerationRequest(
            id="s9999-" + "f" * 32 + ".63",
            prompt_ids=(2**20 - 1,) * draw.choice((0, 1, 5000)),
            sampling=sampling,
            max_tokens=2**20,
            min_tokens=2**20,
            stop=tuple(draw.choices(TEXTS, k=draw.choice((0, 16)))),
            stop_token_ids=(2**20 - 1,) * draw.choice((0, 256)),
            prompt_logprobs=20,
            grammar=draw.choice((None, "".join(draw.choices(TEXTS, k=99)))),
            tenant="t" * 64,
            timeout_ms=86_400_000,
            trace="00-" + "f" * 32 + "-" + "f" * 16 + "-01",
        )
        size = len(request.to_json())
        assert size <= request_bytes(request) <= BODY_BYTES + 2.5 * size


def test_a_submission_counts_all_that_is_kept_of_it() -> None:
    plain = make_submission(2)
    assert stored_bytes(plain) > 2 * request_bytes(plain.requests[0]) + len(plain.manifest)
    manifest = make_submission(2, manifest=plain.manifest + "é" * 50)
    assert stored_bytes(manifest) == stored_bytes(plain) + 100
    keyed = make_submission(2, key="k", allowance=Allowance(key="a"))
    assert stored_bytes(keyed) > stored_bytes(plain)
