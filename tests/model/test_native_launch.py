"""Steps of the native runner that are launched before earlier ones are read: the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from model.batch import Batch, StepOutput, mask_of
from model.config import ModelConfig
from model.runners.native import NativeRunner
from tests.support.builders import Piece, make_batch, tiny_weights

UNKNOWN = 0  # where the runner has the token
VOCAB_SIZE = 97
PENALTIES = {"frequency_penalty": 3.0, "presence_penalty": 0.5, "repetition_penalty": 1.3}
WAYS: list[dict[str, Any]] = [
    PENALTIES,
    {"temperature": 0.9, "seed": 5, **PENALTIES},
    {"temperature": 1.3, "seed": 6},
]
PROMPTS = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11, 12, 13]]
Build = Callable[..., NativeRunner]


def step(
    texts: list[list[int]], counts: list[int], order: list[int], *, index: int, scored: bool = True
) -> Batch:
    """The next tokens of some sequences, each in the slot and the block of its number. `scored`:
    one of each prompt is.
    """
    pieces = [
        Piece(
            tokens=texts[number],
            blocks=[10 + number],
            count=counts[number],
            seat=number,
            sampling=WAYS[number] | {"index": index, "top_logprobs": 2},
            scores={0: 3} if scored and index == 0 and counts[number] > 1 else {},
        )
        for number in order
    ]
    return make_batch(pieces, num_top=2)


@pytest.fixture
def build(native_config: Callable[..., ModelConfig], native: Build) -> Callable[[], NativeRunner]:
    config = native_config(vocab_size=VOCAB_SIZE)
    weights = tiny_weights(config)
    return lambda: native(config, weights, num_threads=2)


def same(left: StepOutput, right: StepOutput) -> bool:
    """All arrays, bit by bit."""
    arrays = [name for name in StepOutput.__dataclass_fields__ if name != "seconds"]
    return all(np.array_equal(getattr(left, n), getattr(right, n)) for n in arrays)


def test_unread_tokens_are_those_of_the_step_before(build: Callable[[], NativeRunner]) -> None:
    """Sequences come in another order in each step, and one of them pauses."""
    orders = [[0, 1, 2], [2, 0, 1], [2, 0, 1], [1, 2], [2, 1]]
    alone, ahead = build(), build()
    texts = [list(prompt) for prompt in PROMPTS]
    expected = []
    for index, order in enumerate(orders):
        counts = [len(text) if index == 0 else 1 for text in texts]
        output = alone.run(step(texts, counts, order, index=index))
        expected.append(output)
        for number, token in zip(order, output.tokens_R.tolist(), strict=True):
            texts[number].append(token)
    texts = [list(prompt) for prompt in PROMPTS]
    flights, outputs = [], []
    for index, order in enumerate(orders):
        counts = [len(text) if index == 0 else 1 for text in texts]
        batch = step(texts, counts, order, index=index)
        unread_T = None if index == 0 else np.ones(batch.num_tokens, np.bool_)
        flights.append(ahead.launch(batch, unread_T=unread_T))
        for number in order:
            texts[number].append(UNKNOWN)
        if len(flights) == 2:
            outputs.append(ahead.collect(flights.pop(0)))
    outputs.append(ahead.collect(flights.pop()))
    assert all(map(same, outputs, expected))
    assert expected[0].score_logprobs_Q.size == 3
    assert all(output.seconds is not None and output.seconds > 0 for output in outputs)


@pytest.mark.parametrize("scored", [False, True])
def test_sampling_that_comes_later_is_that_of_the_step(
    build: Callable[[], NativeRunner], scored: bool
) -> None:
    """With masks and penalties that depend on the token before, which was read meanwhile."""
    alone, ahead = build(), build()
    the_step = partial(step, order=[0, 1, 2], scored=scored)
    expected = []
    texts = [list(prompt) for prompt in PROMPTS]
    for index in range(5):
        batch = masked(the_step(texts, counts(texts, index), index=index), texts)
        expected.append(alone.run(batch))
        for text, token in zip(texts, expected[-1].tokens_R.tolist(), strict=True):
            text.append(token)
    texts = [list(prompt) for prompt in PROMPTS]
    outputs, earlier = [], None
    for index in range(5):
        unread = [[*text, UNKNOWN] for text in texts] if index else texts
        batch = the_step(unread, counts(texts, index), index=index)
        unread_T = np.ones(batch.num_tokens, np.bool_) if index else None
        handle = ahead.launch(batch, unread_T=unread_T, deferred=True)
        if earlier is not None:
            outputs.append(ahead.collect(earlier))
            for text, token in zip(texts, outputs[-1].tokens_R.tolist(), strict=True):
                text.append(token)
        known = the_step(texts, counts(texts, index), index=index)
        ahead.sample(handle, masked(known, texts).sampling)
        earlier = handle
    assert earlier is not None
    outputs.append(ahead.collect(earlier))
    assert all(map(same, outputs, expected))
    with pytest.raises(ValueError, match="only the newest step samples later"):
        ahead.sample(earlier, batch.sampling)
    handle = ahead.launch(replace(batch, tokens_T=batch.tokens_T + 1), deferred=True)
    with pytest.raises(ValueError, match="has to sample before it is read"):
        ahead.collect(handle)


def test_logits_of_open_rows_outlast_the_next_step(build: Callable[[], NativeRunner]) -> None:
    """Which may have some of its own, of other sequences."""
    runner = build()
    batches = []
    for number in range(3):
        greedy = Piece(tokens=PROMPTS[number], blocks=[number], count=len(PROMPTS[number]))
        batch = make_batch([greedy])
        opened = replace(batch.sampling, open_rows_L=np.zeros(1, np.int32))
        batches.append(replace(batch, sampling=opened))
    alone = [runner.run(batch).open_logits_LV.copy() for batch in batches]
    handles = [runner.launch(batch) for batch in batches[:2]]
    first = runner.collect(handles[0])
    assert np.array_equal(first.open_logits_LV, alone[0])
    handles.append(runner.launch(batches[2]))
    for handle, expected in zip(handles[1:], alone[1:], strict=True):
        assert np.array_equal(runner.collect(handle).open_logits_LV, expected)


def counts(texts: list[list[int]], index: int) -> list[int]:
    """Of the tokens that a step computes."""
    return [1 if index else len(text) for text in texts]


def masked(batch: Batch, texts: list[list[int]]) -> Batch:
    """With a mask for each sequence, which depends on its last token; the first two have penalties
    for their tokens.
    """
    tokens = range(VOCAB_SIZE)
    masks = [
        mask_of([token for token in tokens if (token ^ text[-1]) % 5], vocab_size=VOCAB_SIZE)
        for text in texts
    ]
    rows = np.arange(len(texts), dtype=np.int32)
    sampling = replace(batch.sampling, mask_rows_M=rows, masks_MW=np.stack(masks))
    entries = [(row, *entry) for row in range(2) for entry in Counter(texts[row]).items()]
    columns = np.array(entries, np.int32).T
    names = ("penalty_rows_P", "penalty_ids_P", "penalty_counts_P")
    return replace(batch, sampling=replace(sampling, **dict(zip(names, columns, strict=True))))


def test_a_step_reads_only_what_was_launched(build: Callable[[], NativeRunner]) -> None:
    runner = build()
    texts = [list(prompt) for prompt in PROMPTS]
    first = step(texts, [4, 2, 7], [0, 1], index=0)
    unread_T = np.ones(2, np.bool_)
    later = step([[*text, UNKNOWN] for text in texts], [1, 1, 1], [0, 2], index=1)
    with pytest.raises(ValueError, match="only a step in flight has unread tokens"):
        runner.launch(later, unread_T=unread_T)
    handle = runner.launch(first)
    with pytest.raises(ValueError, match="slot 2 has no token in flight"):
        runner.launch(later, unread_T=unread_T)
    masked = replace(later.sampling, mask_rows_M=np.array([1], np.int32))
    with pytest.raises(ValueError, match="has no penalties, masks or scores"):
        runner.launch(replace(later, sampling=masked), unread_T=unread_T)
    with pytest.raises(ValueError, match="launched steps must be collected first"):
        runner.run(first)
    with pytest.raises(ValueError, match="in the order they were launched"):
        runner.collect(replace(handle, number=handle.number + 1))
    assert same(runner.collect(handle), runner.run(first))
    with pytest.raises(ValueError, match="in the order they were launched"):
        runner.collect(handle)
