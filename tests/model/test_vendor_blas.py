"""Laws of products by vendor BLAS: none but those with our bits, and only if they are faster.

The BLAS is a stand-in with a clock of its own, since the verification is under test: it gives our
bits, or others in one element, or is slow. The kernels are interpreted if there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from model.batch import Batch, StepOutput
from model.kernels.activation import silu_mul
from model.kernels.matmul import Product, multiply, multiply_by_vendor_blas
from model.kernels.norm import add_rms_norm
from model.kernels.tiling import part_size
from model.runners import RunnerOptions
from model.runners.cuda.build import build_runner
from model.runners.cuda.cublas import ProductShape, VerifiedProducts, multiply_by_parts
from model.runners.cuda.runner import CudaRunner
from model.runners.exactness import ExactnessCheck, check_exactness, check_for
from service.startup import set_whole_sums
from tests.model.kernel_twins import multiply_twin
from tests.support.builders import DEVICE, Piece, make_batch, tiny_model_config, tiny_weights

pytestmark = pytest.mark.slow

ROWS = 11
CONFIG = tiny_model_config(
    num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1, intermediate_size=24,
    max_model_len=64, qkv_bias=True,
)  # fmt: skip
SHAPES = {
    ProductShape(32, 16, bias=True),
    ProductShape(16, 16, bias=False),
    ProductShape(48, 16, bias=False),
    ProductShape(16, 24, bias=False),
}


class StandIn:
    """Products as `multiply` has them, in a time that it says itself; it counts the rows asked."""

    alignment = 1

    def __init__(self, *, cost: float = 0.5) -> None:
        self.rows: list[int] = []
        self._cost = cost
        self._clock = 0.0

    def multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        self.rows.append(len(x))
        self._clock += self._cost
        whole = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
        return self.change(multiply(x, weight, bias, out_MN=whole))

    def change(self, product: Product) -> Product:
        return product

    def seconds(self, work: Callable[[], object]) -> float:
        """Ours takes one second."""
        began = self._clock
        work()
        return self._clock - began or 1.0


class OneBitOff(StandIn):
    """In one element of some products, the last bit is another."""

    def __init__(self, *, after: int) -> None:
        super().__init__()
        self.after = after

    def change(self, product: Product) -> Product:
        if len(self.rows) > self.after:
            product.values.view(torch.int32)[-1, -1] ^= 1
        return product


class SpoiledLater(StandIn):
    """It has our bits for so many products, and then is wrong by enough that nothing hides it."""

    def __init__(self, *, after: int) -> None:
        super().__init__()
        self.after = after

    def change(self, product: Product) -> Product:
        return product if len(self.rows) <= self.after else Product(product.values * 1.5)


class Refuses(StandIn):
    def multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        raise RuntimeError("splits sums or nothing")


def options(**overrides: Any) -> RunnerOptions:
    fields = {
        "dtype": "float32",
        "device": DEVICE.type,
        "block_size": 4,
        "num_blocks": 32,
        "max_sequences": 8,
        "max_batch_tokens": ROWS,
        "vendor_blas": True,
    }
    return RunnerOptions(**{**fields, **overrides})


def build(blas: StandIn | None, *, overrides: Any = None, **arguments: Any) -> CudaRunner:
    arguments.setdefault("check", None)
    return build_runner(
        CONFIG,
        tiny_weights(CONFIG),
        options=options(**(overrides or {})),
        digest="0" * 64,
        blas=blas,
        **arguments,
    )


def asked_for(runner: CudaRunner, blas: StandIn, *, rows: int) -> tuple[StepOutput, list[int]]:
    """What a step of two prompts of so many rows gives, and what the blas multiplied."""
    blas.rows.clear()
    return runner.run(step(rows)), blas.rows


def step(rows: int) -> Batch:
    sampling = {"logprobs": True, "temperature": 0.8, "seed": 5}
    lengths = (rows // 2, rows - rows // 2)
    pieces = [
        Piece(
            tokens=[(7 * seat + 3 * n) % 97 for n in range(length)],
            count=length, blocks=[3 * seat, 3 * seat + 1, 3 * seat + 2], seat=seat,
            sampling=sampling,
        )
        for seat, length in enumerate(lengths)
    ]  # fmt: skip
    return make_batch(pieces, num_top=3)


def bits(output: StepOutput) -> list[bytes]:
    return [
        column.tobytes() for column in (output.tokens_R, output.logprobs_R, output.top_logprobs_RN)
    ]


def test_it_multiplies_full_steps_alone() -> None:
    """The four products of a layer, with the bits that ours would have; the head's not."""
    blas = StandIn()
    runner, plain = build(blas), build(None, overrides={"vendor_blas": False})
    assert runner.vendor_blas_shapes == SHAPES
    assert not plain.vendor_blas_shapes
    assert runner.numeric_class == plain.numeric_class
    assert runner._network.fuses_head
    for rows, expected in ((ROWS, [ROWS] * 4), (ROWS - 1, []), (2, []), (ROWS, [ROWS] * 4)):
        given, asked = asked_for(runner, blas, rows=rows)
        assert asked == expected
        assert bits(given) == bits(plain.run(step(rows)))


@pytest.mark.parametrize("product", range(6))
def test_one_other_bit_in_one_element_and_it_is_not_used(product: int) -> None:
    """In whichever of the check's products it is: the last of them looks no less closely."""
    weights = [(weight, None) for weight in (torch.randn(16, 24, device=DEVICE),)]
    assert VerifiedProducts(weights, rows=ROWS, blas=StandIn()).shapes
    blas = OneBitOff(after=product)
    verified = VerifiedProducts(weights, rows=ROWS, blas=blas)
    assert not verified.shapes
    assert len(blas.rows) == product + 1
    x = torch.randn(ROWS, 24, device=DEVICE)
    assert torch.equal(verified(x, weights[0][0]).values, multiply(x, weights[0][0]).values)


def test_zeros_of_another_sign_are_other_bits() -> None:
    class Negative(StandIn):
        def change(self, product: Product) -> Product:
            return Product(torch.where(product.values == 0, -0.0, product.values))

    weights = [(torch.randn(16, 24, device=DEVICE), None)]
    assert not VerifiedProducts(weights, rows=ROWS, blas=Negative()).shapes


@pytest.mark.parametrize(("cost", "shapes"), [(0.9, SHAPES), (0.99, set()), (3.0, set())])
def test_a_slower_one_is_not_used(cost: float, shapes: set[ProductShape]) -> None:
    blas = StandIn(cost=cost)
    runner = build(blas)
    assert runner.vendor_blas_shapes == shapes
    assert bool(asked_for(runner, blas, rows=ROWS)[1]) == bool(shapes)


def test_one_that_refuses_is_not_used() -> None:
    runner = build(Refuses())
    assert not runner.vendor_blas_shapes
    assert runner.run(step(ROWS)).tokens_R.shape == (2,)


@pytest.mark.parametrize(
    "overrides",
    [
        {"vendor_blas": False},  # the process did not keep sums whole
        {"max_sequences": ROWS},  # a full step may be one of decoding, which is captured
    ],
)
def test_it_is_not_even_tried(overrides: dict[str, Any]) -> None:
    blas = StandIn()
    assert not build(blas, overrides=overrides).vendor_blas_shapes
    assert not build(blas, product=multiply_by_vendor_blas).vendor_blas_shapes
    assert not blas.rows


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operator set stays, and then no sum is known to be whole."""
    names = ("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    assert set_whole_sums()
    assert set_whole_sums()
    for name in names:
        with monkeypatch.context() as operators:
            operators.setenv(name, ":4096:8")
            assert not set_whole_sums()


def test_operands_that_lie_otherwise_are_ours() -> None:
    """BLAS algorithms depend on addresses and strides: only the compared layout is verified."""
    blas = StandIn()
    weight = torch.randn(16, 24, device=DEVICE)
    verified = VerifiedProducts([(weight, None)], rows=ROWS, blas=blas)
    blas.rows.clear()
    x = torch.randn(ROWS, 48, device=DEVICE)
    verified(x[:, :24], weight)
    blas.alignment = 1 << 40
    verified(x[:, :24].contiguous(), weight)
    assert not blas.rows
    blas.alignment = 1
    verified(x[:, :24].contiguous(), weight)
    assert blas.rows == [ROWS]


@pytest.mark.parametrize(("outputs", "inputs"), [(8, 100), (24, 768), (40, 650)])
@pytest.mark.parametrize("bias", [False, True])
def test_torchs_products_by_our_parts(outputs: int, inputs: int, bias: bool) -> None:
    """Sums of the parts that ours has, each rounded to float32 on its way."""
    torch.manual_seed(inputs)
    x, weight = torch.randn(5, inputs, device=DEVICE), torch.randn(outputs, inputs, device=DEVICE)
    bias_N = torch.randn(outputs, device=DEVICE) if bias else None
    given = multiply_by_parts(x, weight, bias_N).sum_parts(x.dtype)
    torch.testing.assert_close(given, multiply_twin(x, weight, bias_N).values, atol=1e-4, rtol=1e-4)
    parts = -(-inputs // part_size(outputs, inputs))
    assert parts == {100: 1, 768: 3, 650: 2}[inputs]
    ours = multiply(x, weight, bias_N)
    assert ours.num_parts == parts
    torch.testing.assert_close(given, ours.sum_parts(x.dtype), atol=1e-4, rtol=1e-4)


def test_several_parts_are_compared_as_their_reader_adds_them() -> None:
    """Ours comes in parts here, the blas's as one: the same bits all the same."""
    weight = torch.randn(24, 768, device=DEVICE)
    assert multiply(torch.randn(ROWS, 768, device=DEVICE), weight).num_parts == 3
    assert VerifiedProducts([(weight, None)], rows=ROWS, blas=StandIn()).shapes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_in_float32_is_read_as_its_parts_are(dtype: torch.dtype) -> None:
    """Whoever reads a product rounds the sum of the parts once, and one whole sum the same."""
    parts = torch.randn(3, ROWS, 48, device=DEVICE)
    in_parts, whole = Product(parts, 3), Product(parts[0] + parts[1] + parts[2])
    residual = torch.randn(ROWS, 48, device=DEVICE).to(dtype)
    other, norm = residual.clone(), torch.ones(48, dtype=dtype, device=DEVICE)
    expected = add_rms_norm(residual, in_parts, norm, eps=1e-5)
    assert torch.equal(add_rms_norm(other, whole, norm, eps=1e-5), expected)
    assert torch.equal(other, residual)
    assert torch.equal(silu_mul(whole, dtype=dtype), silu_mul(in_parts, dtype=dtype))


CHECK = ExactnessCheck(prompt=5, answer=1, beside=(), chunks=(), full=ROWS)


@pytest.mark.usefixtures("one_order")
def test_the_proof_has_a_full_step() -> None:
    blas = StandIn()
    runner = build(blas, check=CHECK)
    assert runner.exact
    blas.rows.clear()
    assert check_exactness(runner, CHECK)["full step"]
    assert blas.rows == [ROWS] * 4


@pytest.mark.usefixtures("one_order")
def test_a_blas_that_fails_the_check_is_given_up() -> None:
    """It had our bits as long as it was looked at: the runner stays exact without it."""
    blas = StandIn()
    tried = len(build(blas).vendor_blas_shapes and blas.rows)
    blas = SpoiledLater(after=tried)
    runner = build(blas, check=CHECK)
    assert len(blas.rows) > tried
    assert runner.exact
    assert not runner.vendor_blas_shapes
    assert not asked_for(runner, blas, rows=ROWS)[1]


def test_a_full_step_fits_the_runner() -> None:
    """If it is checked, all its texts have slots and blocks, and it has exactly those rows."""
    for most, blocks, length in ((8192, 10_000, 4096), (64, 40, 64), (1, 4, 16), (600, 3, 10_000)):
        given = options(max_batch_tokens=most, max_sequences=min(most, 32), block_size=16)
        check = check_for(given, num_blocks=blocks, max_model_len=length)
        assert (check.full is None) == (blocks == 3)
        if check.full is not None:
            texts = -(-most // check.prompt)
            assert check.full == most
            assert texts <= given.max_sequences
            assert texts * -(-(check.prompt + check.answer) // 16) <= blocks


def test_memory_is_planned_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a full step, and for one with a row less, where all products are ours.

    Both with everything that a row may ask for: its memory was once not planned.
    """
    blas = StandIn()
    measured: list[int] = []
    step_of = CudaRunner.padding_step

    def watched(runner: CudaRunner, num_tokens: int, **asked: Any) -> None:
        measured.append(num_tokens)
        assert asked == {"adjusted": True, "logprobs": True, "scored": ROWS}
        step_of(runner, num_tokens, **asked)

    monkeypatch.setattr(CudaRunner, "padding_step", watched)
    for given, expected in ((blas, {ROWS, ROWS - 1}), (Refuses(), {ROWS})):
        measured.clear()
        build(given, overrides={"num_blocks": None, "kv_memory": 2**16})
        assert set(measured) == expected
