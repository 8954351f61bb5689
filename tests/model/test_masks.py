"""Masks: a row chooses what its mask allows, as if the other tokens were not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.batch import Batch, SamplingBatch, Words, unpack_masks
from model.config import ModelConfig
from model.runners import Runner, RunnerOptions
from model.runners.cuda.build import build_runner
from model.runners.cuda.runner import CudaRunner
from model.runners.torch import TorchRunner
from model.sampler import sample
from tests.support.builders import (
    DEVICE,
    Piece,
    make_batch,
    make_sampling,
    tiny_model_config,
    tiny_weights,
)

V = 97
INF = float("inf")
COLUMNS: list[dict[str, Any]] = [
    {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 2.0, "top_p": 0.6},
    {"temperature": 1.3, "min_p": 0.3}, {"temperature": 1.0, "logprobs": True},
]  # fmt: skip


def pack_masks(allowed: np.ndarray[Any, Any]) -> Words:
    """[M, V] of truth values to words, bit by bit."""
    words = np.zeros((len(allowed), -(-allowed.shape[1] // 32)), np.uint32)
    for row, token in np.argwhere(allowed):
        words[row, token // 32] |= np.uint32(1) << np.uint32(token % 32)
    return words


def random_masks(draw: np.random.Generator, rows: int) -> np.ndarray[Any, Any]:
    """From one token to nearly all; at least one."""
    share = draw.choice([0.01, 0.1, 0.5, 0.95], size=(rows, 1))
    allowed = draw.random((rows, V)) < share
    allowed[np.arange(rows), draw.integers(0, V, rows)] = True
    return allowed


def with_masks(sampling: SamplingBatch, rows: list[int], allowed: Any) -> SamplingBatch:
    return replace(
        sampling, mask_rows_M=np.array(rows, np.int32), masks_MW=pack_masks(np.asarray(allowed))
    )


def with_bias(sampling: SamplingBatch, entries: list[tuple[int, int, float]]) -> SamplingBatch:
    rows, ids, values = zip(*entries, strict=True)
    return replace(
        sampling,
        bias_rows_E=np.array(rows, np.int32),
        bias_ids_E=np.array(ids, np.int32),
        bias_values_E=np.array(values, np.float32),
    )


def test_words_and_truth_values_are_the_same() -> None:
    allowed = random_masks(np.random.default_rng(0), 9)
    assert np.array_equal(unpack_masks(pack_masks(allowed), V), allowed)


@pytest.mark.parametrize("seed", range(4))
def test_a_mask_is_minus_infinity_where_it_forbids(seed: int) -> None:
    """The reference: the same sampler over logits that say so themselves."""
    draw = np.random.default_rng(seed)
    rows = 24
    logits_RV = torch.from_numpy(draw.normal(0, 3, (rows, V)).astype(np.float32))
    columns = [COLUMNS[row % len(COLUMNS)] | {"seed": row, "index": seed} for row in range(rows)]
    masked = sorted(draw.choice(rows, size=draw.integers(1, rows + 1), replace=False).tolist())
    allowed = random_masks(draw, len(masked))
    plain = make_sampling(columns, vocab_size=V, top=3)
    given = sample(logits_RV, with_masks(plain, masked, allowed))
    forbidden_RV = logits_RV.clone()
    forbidden_RV[masked] = forbidden_RV[masked].masked_fill(~torch.from_numpy(allowed), -INF)
    assert torch.equal(given.tokens_R, sample(forbidden_RV, plain).tokens_R)
    for place, row in enumerate(masked):
        assert allowed[place, given.tokens_R[row]]
    unmasked = sample(logits_RV, plain)
    assert torch.equal(given.top_logprobs_RN, unmasked.top_logprobs_RN), "of unmodified logits"


def test_masked_rows_are_the_same_alone_and_among_others() -> None:
    draw = np.random.default_rng(7)
    logits_RV = torch.from_numpy(draw.normal(0, 3, (12, V)).astype(np.float32))
    columns = [COLUMNS[row % len(COLUMNS)] | {"seed": row} for row in range(12)]
    allowed = random_masks(draw, 6)
    masked = [1, 2, 5, 8, 9, 11]
    together = sample(logits_RV, with_masks(make_sampling(columns, vocab_size=V), masked, allowed))
    for place, row in enumerate(masked):
        one = with_masks(
            make_sampling([columns[row]], vocab_size=V), [0], allowed[place : place + 1]
        )
        assert sample(logits_RV[row : row + 1], one).tokens_R[0] == together.tokens_R[row]


@pytest.mark.parametrize("column", COLUMNS, ids=str)
def test_neither_bias_nor_penalties_bring_back_what_is_forbidden(column: dict[str, Any]) -> None:
    """A bias of 100 on what is forbidden, and -inf on all that is allowed."""
    logits_RV = torch.linspace(-3, 3, V).repeat(2, 1)
    allowed = np.zeros((2, V), np.bool_)
    allowed[:, [4, 40]] = True
    plain = with_masks(make_sampling([column] * 2, vocab_size=V, top=1), [0, 1], allowed)
    biased = with_bias(plain, [(0, 90, 100.0), (1, 4, -INF), (1, 40, -INF)])
    tokens = sample(logits_RV, biased).tokens_R.tolist()
    assert tokens[0] in {4, 40}
    assert tokens[1] == 40, "the likeliest of what the mask allows"
    penalised = replace(
        plain,
        repetition_R=np.full(2, 1.5, np.float32),
        presence_R=np.full(2, -2.0, np.float32),
        penalty_rows_P=np.array([0, 1], np.int32),
        penalty_ids_P=np.array([90, 4], np.int32),
        penalty_counts_P=np.array([3, 3], np.int32),
    )
    assert set(sample(logits_RV, penalised).tokens_R.tolist()) <= {4, 40}


def masked_step(seed: int) -> tuple[Batch, np.ndarray[Any, Any], list[int]]:
    """A step of seven sequences, of which four have masks; some with a bias, too. The first is one
    whose logits nobody needs.
    """
    draw = np.random.default_rng(seed)
    pieces = [
        Piece(tokens=[5, 6, seat], count=3, blocks=[seat], seat=seat, sampling=column)
        for seat, column in enumerate([{}, *COLUMNS])
    ]
    batch = make_batch(pieces, num_top=2)
    masked = [1, 2, 4, 6]
    allowed = random_masks(draw, len(masked))
    sampling = with_masks(batch.sampling, masked, allowed)
    sampling = with_bias(sampling, [(2, 7, 100.0), *[(4, token, -INF) for token in range(V)]])
    return replace(batch, sampling=sampling), allowed, masked


def torch_runner(config: ModelConfig) -> Runner:
    options = RunnerOptions(dtype="float32", device="cpu", block_size=16, num_blocks=8)
    return TorchRunner(config, tiny_weights(config), options=options, digest="0" * 64)


def cuda_runner(config: ModelConfig) -> CudaRunner:
    options = RunnerOptions(
        dtype="float32", device=DEVICE.type, block_size=16, num_blocks=8, max_sequences=8,
        max_batch_tokens=32,
    )  # fmt: skip
    return build_runner(config, tiny_weights(config), options=options, digest="0" * 64, check=None)


@pytest.mark.slow
@pytest.mark.parametrize("build", [torch_runner, cuda_runner])
def test_runners_mask(build: Callable[[ModelConfig], Runner]) -> None:
    """Against the torch runner's own logits, by way of its log probabilities."""
    config = tiny_model_config(num_layers=1)
    runner, reference = build(config), torch_runner(config)
    for seed in range(3):
        batch, allowed, masked = masked_step(seed)
        batch.check(block_size=16, num_blocks=8, vocab_size=V)
        output, expected = runner.run(batch), reference.run(batch)
        assert output.tokens_R.tolist() == expected.tokens_R.tolist()
        assert all(allowed[place, output.tokens_R[row]] for place, row in enumerate(masked))
        assert output.logprobs_R[6] == pytest.approx(expected.logprobs_R[6], abs=1e-4)
        plain = runner.run(replace(batch, sampling=make_sampling([{}, *COLUMNS], top=2)))
        assert output.top_ids_RN[6].tolist() == plain.top_ids_RN[6].tolist()


def test_the_native_runner_masks(
    native_config: Callable[..., ModelConfig], native: Callable[..., Runner]
) -> None:
    """Greedy rows without a mask take no logits, and rows with one do."""
    config = native_config()
    runner = native(config, tiny_weights(config))
    for seed in range(3):
        batch, allowed, masked = masked_step(seed)
        output = runner.run(batch)
        assert all(allowed[place, output.tokens_R[row]] for place, row in enumerate(masked))
        plain = runner.run(replace(batch, sampling=make_sampling([{}, *COLUMNS], top=2)))
        for row in (0, 3, 5):
            assert output.tokens_R[row] == plain.tokens_R[row]


def test_an_unread_row_has_no_mask() -> None:
    config = tiny_model_config(num_layers=1)
    runner = cuda_runner(config)
    batch = make_batch([Piece(tokens=[1, 2], count=1, blocks=[0])])
    masked = with_masks(batch.sampling, [0], np.ones((1, V), np.bool_))
    with pytest.raises(ValueError, match="masks"):
        runner.launch(replace(batch, sampling=masked), unread_T=np.array([True]))


WRONG: list[tuple[list[int], np.ndarray[Any, Any], str]] = [
    ([0], np.zeros((1, 4), np.uint32), "at least one"),
    ([0], np.array([[0, 0, 0, 1 << 1]], np.uint32), "at least one"),  # token 97 is none
    ([0], np.ones((1, 3), np.uint32), "bit for each"),
    ([0], np.ones((2, 4), np.uint32), "one row"),
    ([1, 1], np.ones((2, 4), np.uint32), "one row"),
    ([1, 0], np.ones((2, 4), np.uint32), "rise"),
    ([2], np.ones((1, 4), np.uint32), "samples"),
]


@pytest.mark.parametrize(("rows", "masks", "message"), WRONG)
def test_check_finds(rows: list[int], masks: np.ndarray[Any, Any], message: str) -> None:
    batch = make_batch([Piece(tokens=[1, 2], count=2, blocks=[n], seat=n) for n in range(2)])
    sampling = replace(batch.sampling, mask_rows_M=np.array(rows, np.int32), masks_MW=masks)
    with pytest.raises(ValueError, match=message):
        replace(batch, sampling=sampling).check(block_size=4, num_blocks=4, vocab_size=V)
