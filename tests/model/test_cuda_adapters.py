"""Adapters on the cuda runner.

Without a GPU: kernels interpreted, captured work called directly.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.adapters import Adapter, Factors
from model.checkpoint import load_model
from model.checkpoint.adapters import read_adapter
from model.kernels.adapters import RANKS, add_adapters, stack_adapters
from model.kernels.matmul import Product, multiply
from model.runners import RunnerOptions
from model.runners.cuda.build import build_runner
from model.runners.cuda.runner import CudaRunner
from model.runners.exactness import ExactnessCheck, check_exactness, check_for
from model.training.lowrank import LowRank
from tests.model.test_adapters import Answer, answers, prompts_of, torch_runner, written
from tests.support.builders import DEVICE, Piece, at_length, make_batch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it refuses float32 on a GPU")

NAME = "blocks.0.mlp.down.weight"


def drawn_adapter(seed: int, outputs: int, inputs: int, *, rank: int, name: str = NAME) -> Adapter:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(rank, inputs)).astype(np.float32) / inputs**0.5
    b = rng.normal(size=(outputs, rank)).astype(np.float32)
    return Adapter(digest=str(seed), factors={name: Factors(a, b)})


# --- the kernels -------------------------------------------------------------------------------
N, K = 70, 1300  # neither a whole number of tiles; K in two parts
ADAPTERS = [
    drawn_adapter(1, N, K, rank=3),
    drawn_adapter(2, N, K, rank=40),  # three tiles of ranks
    drawn_adapter(3, 8, 8, rank=2, name="blocks.0.attention.out.weight"),
    drawn_adapter(4, N, K, rank=RANKS),
]


def applied(
    x: torch.Tensor, weight: torch.Tensor, numbers: list[int], *, whole: bool
) -> torch.Tensor:
    stack = stack_adapters(ADAPTERS, dtype=x.dtype, device=DEVICE)[NAME]
    out: dict[str, Any] = {"out_MN": x.new_empty((len(x), N))} if whole else {}
    y = multiply(x, weight, **out)
    assert (y.num_parts == 1) == whole
    add_adapters(y, x, stack, torch.tensor(numbers, dtype=torch.int32, device=DEVICE))
    return y.sum_parts(x.dtype)


def operands(rows: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((rows, K), generator=generator).to(DEVICE)
    weight = (torch.randn((N, K), generator=generator) / K**0.5).to(DEVICE)
    return x, weight, random.Random(seed).choices(range(len(ADAPTERS) + 1), k=rows)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rows", [1, 21, 70, 300])
def test_rows_get_the_product_of_their_own_adapter(rows: int, *, whole: bool) -> None:
    """Both tilings, several lanes and one; adapter 3 leaves this weight as it is."""
    x, weight, numbers = operands(rows)
    given = applied(x, weight, numbers, whole=whole)
    plain = multiply(x, weight, out_MN=torch.empty((rows, N), device=DEVICE)).values
    for row, number in enumerate(numbers):
        factors = ADAPTERS[number - 1].factors.get(NAME) if number else None
        expected = plain[row]
        if factors is None:
            assert torch.equal(given[row], expected)
        else:
            a, b = (torch.from_numpy(each).to(DEVICE) for each in (factors.a, factors.b))
            torch.testing.assert_close(given[row], expected + b @ (a @ x[row]))
            assert (given[row] - expected).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_bit_depends_on_other_rows_or_parts(dtype: torch.dtype) -> None:
    """Alone, in another order, in both tilings, and in a product that is whole or in parts."""
    x, weight, numbers = operands(70)
    x, weight = x.to(dtype), weight.to(dtype)
    expected = applied(x, weight, numbers, whole=True)
    assert torch.equal(applied(x, weight, numbers, whole=False), expected)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    shuffled = [numbers[row] for row in order.tolist()]
    for whole in (False, True):
        given = applied(x[order], weight, shuffled, whole=whole)
        assert torch.equal(given, expected[order])
    for row in (0, 5, 69):
        alone = applied(x[row : row + 1], weight, numbers[row : row + 1], whole=False)
        assert torch.equal(alone, expected[row : row + 1])
        few = slice(row - row % 30, row + 1)
        assert torch.equal(applied(x[few], weight, numbers[few], whole=False), expected[few])


def test_parts_that_are_left_over_change_no_sum() -> None:
    """Not even the sign of a zero: they are -0."""
    stack = stack_adapters(ADAPTERS, dtype=torch.float32, device=DEVICE)[NAME]
    y = Product(torch.ones((2, 2, N), device=DEVICE), 2)
    x = torch.ones((2, K), device=DEVICE)
    add_adapters(y, x, stack, torch.tensor([0, 1], dtype=torch.int32, device=DEVICE))
    assert (y.values[:, 0] == 1).all()
    assert (y.values[1, 1] == 0).all()
    assert torch.signbit(y.values[1, 1]).all()


# --- the runner --------------------------------------------------------------------------------
TARGETS = [("q_proj", "v_proj"), ("all-linear",), ("down_proj", "gate_proj", "o_proj")]
NUMBERS = [1, 0, 3, 2, 1, 0]  # adapters of six prompts


def made(folder: Path) -> tuple[Path, list[Adapter]]:
    """A model and adapters of it, which adapt different matrices in different ranks."""
    shapes = [LowRank(rank=2 + index, targets=each) for index, each in enumerate(TARGETS)]
    found = [
        written(folder, "llama", shape, seed=seed, num_hidden_layers=1)
        for seed, shape in enumerate(shapes, 1)
    ]
    return found[0][0], [read_adapter(each, found[0][0]) for _, each, _ in found]


def cuda_runner(
    model: Path,
    *adapters: Adapter,
    weights: dict[str, torch.Tensor] | None = None,
    mixed_graphs: bool = True,
    **overrides: Any,
) -> CudaRunner:
    loaded = load_model(model)
    sizes: dict[str, Any] = {
        "dtype": "float32", "device": DEVICE.type, "block_size": 4, "num_blocks": 64,
        "max_sequences": 8, "max_batch_tokens": 48, "adapters": adapters,
    }  # fmt: skip
    return build_runner(
        loaded.config,
        loaded.weights if weights is None else weights,
        options=RunnerOptions(**{**sizes, **overrides}),
        digest="0" * 64,
        check=None,
        mixed_graphs=mixed_graphs,
    )


def assert_close(given: list[Answer], expected: list[Answer], *, atol: float) -> None:
    for (ids, found), (other_ids, other) in zip(given, expected, strict=True):
        assert ids == other_ids
        np.testing.assert_allclose(found, other, atol=atol)


@pytest.mark.slow
def test_it_applies_what_torch_applies_and_what_is_merged(tmp_path: Path) -> None:
    model, adapters = made(tmp_path)
    prompts = prompts_of(9, 2, 14, 5, 7, 3)
    given = answers(cuda_runner(model, *adapters), prompts, NUMBERS, count=3)
    assert_close(
        given, answers(torch_runner(model, *adapters), prompts, NUMBERS, count=3), atol=1e-4
    )
    shape = LowRank(rank=3, targets=TARGETS[1])
    *_, merged = written(tmp_path, "llama", shape, seed=2, num_hidden_layers=1)
    ((ids, found),) = answers(cuda_runner(model, weights=merged), [prompts[3]], [0], count=3)
    assert_close([given[3]], [(ids, found)], atol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize(
    ("chunk", "mixed_graphs"), [(100, True), *at_length((3, True), (7, False))]
)
def test_in_a_batch_of_several_every_bit_is_as_alone(
    chunk: int, tmp_path: Path, *, mixed_graphs: bool
) -> None:
    """As in a runner with that adapter alone; without an adapter, as in a runner that has none."""
    model, adapters = made(tmp_path)
    prompts = prompts_of(9, 2, 14, 5, 7, 3)
    runner = cuda_runner(model, *adapters, mixed_graphs=mixed_graphs)
    together = answers(runner, prompts, NUMBERS, count=3, chunk=chunk)
    singles = [cuda_runner(model, *only) for only in ([], *([each] for each in adapters))]
    for prompt, number, found in zip(prompts, NUMBERS, together, strict=True):
        assert answers(singles[number], [prompt], [min(number, 1)], count=3) == [found]


@pytest.mark.slow
@pytest.mark.usefixtures("one_order")
def test_a_batch_slot_has_the_adapter_of_its_present_sequence(tmp_path: Path) -> None:
    """A runner whose slots had other sequences answers as one that is new."""
    model, adapters = made(tmp_path)
    prompts, used = prompts_of(5, 6, 7), cuda_runner(model, *adapters)
    found = {}
    for numbers in ([1, 0, 2], [0, 3, 0], [0, 0, 0]):
        found[tuple(numbers)] = answers(used, prompts, numbers, count=3)
        new = cuda_runner(model, *adapters)
        assert answers(new, prompts, numbers, count=3) == found[tuple(numbers)]
    assert len({str(each) for each in found.values()}) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("one_order")
def test_the_check_at_the_start_covers_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts among its paths; and it fails if rows get the adapter of the first."""
    model, adapters = made(tmp_path)
    runner = cuda_runner(model, *adapters, mixed_graphs=False)  # fewer padding rows
    assert check_for(runner._options, num_blocks=64, max_model_len=64).adapters == 3
    check = ExactnessCheck(prompt=3, answer=2, beside=(2,), chunks=(), adapters=3)
    assert set(check_exactness(runner, check).values()) == {True}

    def wrong(y: Product, x: torch.Tensor, stack: Any, adapters_M: torch.Tensor) -> None:
        add_adapters(y, x, stack, adapters_M[:1].expand(len(x)).contiguous())

    monkeypatch.setattr("model.runners.cuda.network.add_adapters", wrong)
    assert not check_exactness(runner, check)["with 2 others"]


@pytest.mark.slow
def test_it_knows_its_adapters(tmp_path: Path) -> None:
    model, adapters = made(tmp_path)
    batch = make_batch([Piece(tokens=[1], blocks=[0], adapter=2)])
    with pytest.raises(ValueError, match="an adapter that is not loaded"):
        cuda_runner(model, adapters[0]).run(batch)
