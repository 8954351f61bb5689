"""Laws of products by the library: none but those with our bits, and only where they pay.

The library is a stand-in with a clock of its own, since what is tried here is the judge: it gives
our bits, or others in one element, or is slow. The kernels are interpreted where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from model.batch import Batch, StepOutput
from model.kernels.activation import silu_mul
from model.kernels.matmul import Product, multiply, multiply_by_library, multiply_twin, part_size
from model.kernels.norm import add_rms_norm
from model.runners import RunnerOptions
from model.runners.cuda.cublas import ProductShape, ProvenProducts, multiply_by_parts
from model.runners.cuda.exactness import Trial, trial_for, try_exactness
from model.runners.cuda.runner import CudaRunner
from service.startup import set_whole_sums
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
        "library_products": True,
    }
    return RunnerOptions(**{**fields, **overrides})


def build(library: StandIn | None, *, overrides: Any = None, **arguments: Any) -> CudaRunner:
    arguments.setdefault("proof", None)
    return CudaRunner(
        CONFIG,
        tiny_weights(CONFIG),
        options=options(**(overrides or {})),
        digest="0" * 64,
        library=library,
        **arguments,
    )


def asked_for(runner: CudaRunner, library: StandIn, *, rows: int) -> tuple[StepOutput, list[int]]:
    """What a step of two prompts of so many rows gives, and what the library multiplied."""
    library.rows.clear()
    return runner.run(step(rows)), library.rows


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
    library = StandIn()
    runner, plain = build(library), build(None, overrides={"library_products": False})
    assert runner.library_shapes == SHAPES
    assert not plain.library_shapes
    assert runner.numeric_class == plain.numeric_class
    assert runner._network.fuses_head
    for rows, expected in ((ROWS, [ROWS] * 4), (ROWS - 1, []), (2, []), (ROWS, [ROWS] * 4)):
        given, asked = asked_for(runner, library, rows=rows)
        assert asked == expected
        assert bits(given) == bits(plain.run(step(rows)))


@pytest.mark.parametrize("product", range(6))
def test_one_other_bit_in_one_element_and_it_is_not_used(product: int) -> None:
    """In whichever of the trial's products it is: the last of them looks no less closely."""
    weights = [(weight, None) for weight in (torch.randn(16, 24, device=DEVICE),)]
    assert ProvenProducts(weights, rows=ROWS, library=StandIn()).shapes
    library = OneBitOff(after=product)
    proven = ProvenProducts(weights, rows=ROWS, library=library)
    assert not proven.shapes
    assert len(library.rows) == product + 1
    x = torch.randn(ROWS, 24, device=DEVICE)
    assert torch.equal(proven(x, weights[0][0]).values, multiply(x, weights[0][0]).values)


def test_zeros_of_another_sign_are_other_bits() -> None:
    class Negative(StandIn):
        def change(self, product: Product) -> Product:
            return Product(torch.where(product.values == 0, -0.0, product.values))

    weights = [(torch.randn(16, 24, device=DEVICE), None)]
    assert not ProvenProducts(weights, rows=ROWS, library=Negative()).shapes


@pytest.mark.parametrize(("cost", "shapes"), [(0.9, SHAPES), (0.99, set()), (3.0, set())])
def test_a_slower_one_is_not_used(cost: float, shapes: set[ProductShape]) -> None:
    library = StandIn(cost=cost)
    runner = build(library)
    assert runner.library_shapes == shapes
    assert bool(asked_for(runner, library, rows=ROWS)[1]) == bool(shapes)


def test_one_that_refuses_is_not_used() -> None:
    runner = build(Refuses())
    assert not runner.library_shapes
    assert runner.run(step(ROWS)).tokens_R.shape == (2,)


@pytest.mark.parametrize(
    "overrides",
    [
        {"library_products": False},  # the process did not keep sums whole
        {"max_sequences": ROWS},  # a full step may be one of decoding, which is recorded
    ],
)
def test_it_is_not_even_tried(overrides: dict[str, Any]) -> None:
    library = StandIn()
    assert not build(library, overrides=overrides).library_shapes
    assert not build(library, product=multiply_by_library).library_shapes
    assert not library.rows


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
    """The library goes by addresses and strides: proven is only what lies as it did then."""
    library = StandIn()
    weight = torch.randn(16, 24, device=DEVICE)
    proven = ProvenProducts([(weight, None)], rows=ROWS, library=library)
    library.rows.clear()
    x = torch.randn(ROWS, 48, device=DEVICE)
    proven(x[:, :24], weight)
    library.alignment = 1 << 40
    proven(x[:, :24].contiguous(), weight)
    assert not library.rows
    library.alignment = 1
    proven(x[:, :24].contiguous(), weight)
    assert library.rows == [ROWS]


@pytest.mark.parametrize(("outputs", "inputs"), [(8, 100), (24, 768), (40, 650)])
@pytest.mark.parametrize("bias", [False, True])
def test_torchs_products_by_our_parts(outputs: int, inputs: int, bias: bool) -> None:
    """Sums of the parts that ours has, each rounded to float32 on its way."""
    torch.manual_seed(inputs)
    x, weight = torch.randn(5, inputs, device=DEVICE), torch.randn(outputs, inputs, device=DEVICE)
    bias_N = torch.randn(outputs, device=DEVICE) if bias else None
    given = multiply_by_parts(x, weight, bias_N).whole(x.dtype)
    torch.testing.assert_close(given, multiply_twin(x, weight, bias_N).values, atol=1e-4, rtol=1e-4)
    parts = -(-inputs // part_size(outputs, inputs))
    assert parts == {100: 1, 768: 3, 650: 2}[inputs]
    ours = multiply(x, weight, bias_N)
    assert ours.num_parts == parts
    torch.testing.assert_close(given, ours.whole(x.dtype), atol=1e-4, rtol=1e-4)


def test_several_parts_are_compared_as_their_reader_adds_them() -> None:
    """Ours comes in parts here, the library's as one: the same bits all the same."""
    weight = torch.randn(24, 768, device=DEVICE)
    assert multiply(torch.randn(ROWS, 768, device=DEVICE), weight).num_parts == 3
    assert ProvenProducts([(weight, None)], rows=ROWS, library=StandIn()).shapes


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


TRIAL = Trial(prompt=5, answer=1, beside=(), chunks=(), full=ROWS)


@pytest.mark.usefixtures("one_order")
def test_the_proof_has_a_full_step() -> None:
    library = StandIn()
    runner = build(library, proof=TRIAL)
    assert runner.exact
    library.rows.clear()
    assert try_exactness(runner, TRIAL)["full step"]
    assert library.rows == [ROWS] * 4


@pytest.mark.usefixtures("one_order")
def test_a_library_that_spoils_the_proof_is_given_up() -> None:
    """It had our bits as long as it was looked at: the runner stays exact without it."""
    library = StandIn()
    tried = len(build(library).library_shapes and library.rows)
    library = SpoiledLater(after=tried)
    runner = build(library, proof=TRIAL)
    assert len(library.rows) > tried
    assert runner.exact
    assert not runner.library_shapes
    assert not asked_for(runner, library, rows=ROWS)[1]


def test_a_full_step_fits_the_runner() -> None:
    """Where it is tried, all its texts have seats and blocks, and it has exactly those rows."""
    for most, blocks, length in ((8192, 10_000, 4096), (64, 40, 64), (1, 4, 16), (600, 3, 10_000)):
        given = options(max_batch_tokens=most, max_sequences=min(most, 32), block_size=16)
        trial = trial_for(given, num_blocks=blocks, max_model_len=length)
        assert (trial.full is None) == (blocks == 3)
        if trial.full is not None:
            texts = -(-most // trial.prompt)
            assert trial.full == most
            assert texts <= given.max_sequences
            assert texts * -(-(trial.prompt + trial.answer) // 16) <= blocks


def test_memory_is_planned_for_both() -> None:
    """For a full step, and for one of a row less, where all products are ours."""
    library = StandIn()
    measured: list[int] = []

    class Watched(CudaRunner):
        def _dry_step(self, num_tokens: int) -> None:
            measured.append(num_tokens)
            super()._dry_step(num_tokens)

    for given, expected in ((library, {ROWS, ROWS - 1}), (Refuses(), {ROWS})):
        measured.clear()
        Watched(
            CONFIG, tiny_weights(CONFIG), options=options(num_blocks=None, kv_memory=2**16),
            digest="0" * 64, proof=None, library=given,
        )  # fmt: skip
        assert set(measured) == expected
