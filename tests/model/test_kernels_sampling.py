"""Tokens chosen by the kernels are those that the sampler chooses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.kernels.head import head, merge_argmax
from model.kernels.inputs import Column
from model.kernels.sampling import sample_tokens
from tests.model.kernel_twins import (
    sample_tokens_twin,
)
from tests.support.builders import DEVICE

pytestmark = pytest.mark.slow


def random_state(rng: np.random.Generator, rows: int, vocab_size: int) -> torch.Tensor:
    """A slot a row, with columns drawn so that every way and every mixture of cuts comes up."""
    state = np.zeros((rows + 1, Column.TABLE + 1), np.int32)
    floats = state.view(np.float32)
    for slot in range(rows):
        way = rng.integers(5)
        state[slot, Column.INDEX] = rng.integers(0, 10_000)
        state[slot, Column.SEED_LOW : Column.CHOICE] = rng.integers(-(2**31), 2**31, 2)
        state[slot, Column.CHOICE] = rng.integers(0, 4)
        state[slot, Column.TOP_K] = rng.integers(1, 30) if way in {2, 4} else vocab_size
        floats[slot, Column.TEMPERATURE] = 0 if way == 0 else rng.choice([0.2, 0.7, 1.0, 3.0])
        floats[slot, Column.TOP_P] = rng.choice([0.0, 0.4, 0.95]) if way in {3, 4} else 1.0
        floats[slot, Column.MIN_P] = rng.choice([0.0, 0.0, 0.1])
    return torch.from_numpy(state).to(DEVICE)


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.kernels) for seed in (0, *range(2, 16)))]
)
def test_chooses_what_the_sampler_chooses(seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    rows, vocab_size = 5, int(rng.choice([5, 97, 300]))
    state = random_state(rng, rows, vocab_size)
    logits = torch.randn(rows, vocab_size) * 3
    if seed % 2:
        logits = logits.round()  # many equals
    logits[0, : vocab_size // 2] = -torch.inf
    slots = torch.tensor(rng.permutation(rows), dtype=torch.int32, device=DEVICE)
    logits = logits.to(DEVICE)
    expected = sample_tokens_twin(logits, state, slots).tolist()
    for programs in (1, 12, 999):  # one to each chunk of a row
        given = sample_tokens(logits, state, slots, chunk=64, programs=programs)
        assert given.tolist() == expected


@pytest.mark.parametrize(
    "seed", [1, 2, *(pytest.param(seed, marks=pytest.mark.kernels) for seed in range(3, 11))]
)
def test_chooses_the_same_from_the_tops_of_the_head(seed: int) -> None:
    """Greedy, drawn and mixed rows, from one to past a tile of rows, with equals in other tiles."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    rows, vocab_size = int(rng.choice([1, 5, 18])), int(rng.choice([5, 64, 97, 300]))
    x, weight = torch.randn(rows, 24), torch.randn(vocab_size, 24)
    if seed % 2:
        x, weight = x.round(), weight.round()
        weight[vocab_size - vocab_size // 2 :] = weight[: vocab_size // 2].clone()
    x, weight = x.to(DEVICE), weight.to(DEVICE)
    state = random_state(rng, rows, vocab_size)
    if seed % 3 == 0:
        state[:, Column.TEMPERATURE] = 0
    slots = torch.tensor(rng.permutation(rows), dtype=torch.int32, device=DEVICE)
    logits = torch.empty((rows, vocab_size), device=DEVICE)
    argmax = head(x, weight, logits_RV=logits)
    expected = sample_tokens_twin(logits, state, slots).tolist()
    assert sample_tokens(logits, state, slots, argmax=argmax, chunk=64).tolist() == expected
    likeliest = merge_argmax(argmax, vocab_size=vocab_size).ids_RN[:, 0].tolist()
    assert likeliest == logits.argmax(-1).tolist()
    for row, slot in enumerate(slots.tolist()):
        if state[slot, Column.TEMPERATURE] == 0:
            assert likeliest[row] == expected[row]


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_chooses_from_a_real_vocabulary(temperature: float) -> None:
    """Of many blocks: top-k, top-p and both, and a run that ends among equal logits."""
    torch.manual_seed(0)
    rows, vocab_size = 4, 151_936
    state = torch.zeros((rows + 1, Column.TABLE + 1), dtype=torch.int32)
    floats = state.view(torch.float32)
    floats[:, Column.TEMPERATURE] = temperature
    floats[:, Column.TOP_P] = torch.tensor([1.0, 0.95, 0.8, 0.999, 1.0])
    state[:, Column.TOP_K] = torch.tensor([50, vocab_size, 5000, 100_000, vocab_size])
    state[:, Column.INDEX] = torch.arange(rows + 1)
    logits = torch.randn(rows, vocab_size) * 4
    logits[2:] = (logits[2:] * 8).round() / 8
    logits[3, 1000:60_000] = -torch.inf
    state, logits = state.to(DEVICE), logits.to(DEVICE)
    slots = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    given = sample_tokens(logits, state, slots)
    assert given.tolist() == sample_tokens_twin(logits, state, slots).tolist()


def test_random_numbers_follow_from_seed_choice_and_index() -> None:
    """Over a flat distribution the token is the number itself: each column of its key counts."""
    state = torch.zeros((6, Column.TABLE + 1), dtype=torch.int32)
    state.view(torch.float32)[:, [Column.TEMPERATURE, Column.TOP_P]] = 1.0
    state[:, Column.TOP_K] = 4096
    for slot, column in enumerate(
        (Column.INDEX, Column.SEED_LOW, Column.SEED_HIGH, Column.CHOICE), 1
    ):
        state[slot, column] = -1 if column in {Column.SEED_LOW, Column.SEED_HIGH} else 1
    state = state.to(DEVICE)
    slots = torch.arange(5, dtype=torch.int32, device=DEVICE)
    logits = torch.zeros(5, 4096, device=DEVICE)
    tokens = sample_tokens(logits, state, slots).tolist()
    assert len(set(tokens)) == 5
    assert tokens == sample_tokens_twin(logits, state, slots).tolist()
