"""The head's product has the bits of any other product, and its argmax are those of its logits."""

from __future__ import annotations

import math

import pytest
import torch

from model.kernels.head import (
    Argmax,
    find_argmax,
    head,
    merge_argmax,
)
from model.kernels.inputs import Column
from model.kernels.matmul import multiply
from model.kernels.sampling import sample_tokens
from model.kernels.tiling import Tiling, tiling_for
from tests.model.kernel_twins import (
    find_argmax_twin,
    head_twin,
    merge_argmax_twin,
    multiply_twin,
)
from tests.support.builders import DEVICE, HALF, noise

pytestmark = pytest.mark.slow

SHAPES = [(1, 5, 24), (5, 64, 256), (17, 130, 700), (33, 97, 300), (130, 257, 40)]


def whole_numbers(*shape: int) -> torch.Tensor:
    """Small ones: their sums are exact in any order, and many are equal."""
    return torch.randint(-1, 2, shape).to(device=DEVICE, dtype=torch.float32)


def assert_same(given: Argmax, expected: Argmax) -> None:
    assert torch.equal(given.values_RN, expected.values_RN)
    assert torch.equal(given.ids_RN, expected.ids_RN)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("R", "V", "C"), SHAPES)
def test_its_logits_have_the_bits_of_a_product(R: int, V: int, C: int, dtype: torch.dtype) -> None:
    torch.manual_seed(R)
    x, weight = noise(R, C, dtype=dtype), noise(V, C, dtype=dtype) / math.sqrt(C)
    if R % 2:  # all below 0, which is what stands beyond the vocabulary's end
        x, weight = x.abs(), -weight.abs()
    expected = torch.full((R, V), torch.nan, device=DEVICE)
    multiply(x, weight, out_MN=expected)
    logits = torch.full((R, V), torch.nan, device=DEVICE)
    argmax = head(x, weight, logits_RV=logits)
    assert torch.equal(logits, expected)
    merged = merge_argmax(argmax, vocab_size=V)
    assert_same(merged, find_argmax_twin(expected))
    assert_same(merged, merge_argmax_twin(argmax, vocab_size=V))
    assert_same(head(x, weight, logits_RV=None), argmax)


@pytest.mark.parametrize(("R", "V", "C"), SHAPES)
def test_the_lowest_id_of_equals_is_the_likeliest(R: int, V: int, C: int) -> None:
    torch.manual_seed(R)
    x, weight = whole_numbers(R, C), whole_numbers(V, C)
    weight[V - V // 2 :] = weight[: V // 2].clone()  # equals in other tiles
    logits = torch.empty((R, V), device=DEVICE)
    expected = head_twin(x, weight, logits_RV=logits)
    assert torch.equal(logits, multiply_twin(x, weight).values)
    assert_same(merge_argmax(head(x, weight, logits_RV=None), vocab_size=V), expected)
    few = Argmax(expected.values_RN[-3:], expected.ids_RN[-3:])
    assert_same(merge_argmax(find_argmax(logits[-3:], chunk=64), vocab_size=V), few)
    assert (expected.ids_RN < V - V // 2).all()


@pytest.mark.usefixtures("one_order")
def test_no_bit_depends_on_the_rows_or_the_tiling() -> None:
    torch.manual_seed(0)
    x, weight = noise(40, 600), noise(130, 600)
    expected = torch.empty((40, 130), device=DEVICE)
    argmax = merge_argmax(head(x, weight, logits_RV=expected), vocab_size=130)
    for row in (0, 17, 39):
        alone = head(x[row : row + 1], weight, logits_RV=None)
        own = Argmax(argmax.values_RN[row : row + 1], argmax.ids_RN[row : row + 1])
        assert_same(merge_argmax(alone, vocab_size=130), own)
    for tiling in (tiling_for(1), tiling_for(64), Tiling(16, 128, 4, 2)):
        logits = torch.empty_like(expected)
        given = head(x, weight, logits_RV=logits, tiling=tiling)
        assert torch.equal(logits, expected)
        assert_same(merge_argmax(given, vocab_size=130), argmax)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # what the interpreter says
def test_what_is_no_number_is_chosen_as_logits_alone_choose_it() -> None:
    """A greedy row of nothing else has the last id; beside numbers it is passed over."""
    logits = whole_numbers(5, 130)
    logits[1] = torch.nan
    logits[2, :100] = torch.nan
    logits[3] = -torch.inf
    logits[4, [0, 128, 129]] = torch.nan
    state = torch.zeros((6, Column.TABLE + 1), dtype=torch.int32, device=DEVICE)
    slots = torch.arange(5, dtype=torch.int32, device=DEVICE)
    tokens = sample_tokens(logits, state, slots)
    weight = torch.eye(130, device=DEVICE)
    assert tokens[1] == 129
    assert tokens[3] == 0
    assert 100 <= int(tokens[2]) < 130
    for chunk in (64, 128):
        argmax = find_argmax(logits, chunk=chunk)
        assert (argmax.ids_RN < 130).all()
        assert sample_tokens(logits, state, slots, argmax=argmax).equal(tokens)
        assert merge_argmax(argmax, vocab_size=130).ids_RN[:, 0].equal(tokens)
    x = torch.zeros((2, 130), device=DEVICE)
    x[1, 7] = torch.nan
    given = merge_argmax(head(x, weight, logits_RV=None), vocab_size=130)
    assert given.ids_RN[:, 0].tolist() == [0, 129]


def test_a_step_may_choose_nothing() -> None:
    x, weight = noise(0, 24), noise(70, 24)
    argmax = merge_argmax(head(x, weight, logits_RV=noise(0, 70)), vocab_size=70)
    assert argmax.ids_RN.shape == (0, 1)
