"""Products of the layers by vendor BLAS, for the one size of step that was verified.

    a step of exactly `rows` rows     a verified shape     vendor BLAS
    a step of any other size          every shape          our own kernel

Our kernel has the same bits for any number of rows. cuBLASLt promises nothing of the kind; if it
has our bits, no answer depends on which of the two multiplied. At startup each shape is therefore
multiplied by both. It is verified if every bit is equal, for operands that reveal an order of
sums, and if cuBLASLt is faster, which large steps of prompts can achieve and decode steps cannot:
those stay ours.

cuBLASLt must not use split-K. `CublasLt` forbids it, and environment variables that cuBLASLt reads
once leave it no workspace for it; a process that has set them before it multiplies sets
`RunnerOptions.vendor_blas`. If K has several parts, a call for each adds to the sum of those
before, in float32, as our kernel does. Legend: `model.kernels.matmul`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional

from model.kernels.matmul import Product, multiply
from model.kernels.tiling import part_size
from model.runners.cuda.accelerator import median_seconds

_SEEDS = 3
_FASTER = 0.95  # of our time; above is noise, or lost by the reader of a float32 sum
_REPEATS = 15
_SAME_SIZE = {2: torch.int16, 4: torch.int32}


class ProductShape(NamedTuple):
    """What determines how a product of a given number of rows is computed."""

    outputs: int
    inputs: int
    bias: bool


class VendorBlas(Protocol):
    """A product that is not ours."""

    alignment: int  # bytes of the operands, since the algorithm may depend on their addresses

    def multiply(
        self, x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None
    ) -> Product:
        """Computes x · wᵀ + bias. Raises RuntimeError for what it cannot do without split-K."""
        ...

    def seconds(self, work: Callable[[], object]) -> float:
        """How long `work` takes on the device."""
        ...


class CublasLt:
    """cuBLASLt. The constructor forbids split-K and narrow sums for the whole process."""

    alignment = 256  # a larger one makes no difference

    def __init__(self) -> None:
        torch.backends.cuda.preferred_blas_library("cublaslt")
        matmul = torch.backends.cuda.matmul
        forbidden: Any = (False, False)  # sums in the narrow dtype, split-K
        matmul.allow_bf16_reduced_precision_reduction = forbidden
        matmul.allow_fp16_reduced_precision_reduction = forbidden

    def multiply(
        self, x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None
    ) -> Product:
        return multiply_by_parts(x_MK, weight_NK, bias_N)

    def seconds(self, work: Callable[[], object]) -> float:
        return median_seconds(work, repeats=_REPEATS)


def multiply_by_parts(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None
) -> Product:
    """Torch's products with our parts of K; in float32 if there are several."""
    part = part_size(*weight_NK.shape)
    if part >= weight_NK.shape[1]:
        return Product(functional.linear(x_MK, weight_NK, bias_N))
    wide: dict[str, Any] = {} if x_MK.dtype == torch.float32 else {"out_dtype": torch.float32}
    first, *others = zip(x_MK.split(part, dim=1), weight_NK.split(part, dim=1), strict=True)
    total_MN = torch.mm(first[0], first[1].T, **wide)
    if bias_N is not None:
        total_MN += bias_N
    for x, weight in others:
        torch.addmm(total_MN, x, weight.T, out=total_MN, **wide)
    return Product(total_MN)


class VerifiedProducts:
    """`multiply` for a network's layers, by vendor BLAS for the shapes that were verified."""

    def __init__(
        self,
        products: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
        *,
        rows: int,
        blas: VendorBlas,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """`reduce` sums over ranks, all of which use vendor BLAS for the same shapes."""
        self._rows = rows
        self._blas = blas
        examples = {_shape(weight, bias): (weight, bias) for weight, bias in products}
        passed = {shape: self._passes(*pair) for shape, pair in examples.items()}
        device = next(iter(examples.values()))[0].device
        self.shapes = _of_all_ranks(passed, reduce, device)

    def __call__(
        self,
        x_MK: torch.Tensor,
        weight_NK: torch.Tensor,
        bias_N: torch.Tensor | None = None,
        *,
        out_MN: torch.Tensor | None = None,
        gated: bool = False,
    ) -> Product:
        """See `multiply`: the same bits by either. What vendor BLAS multiplied is not activated."""
        if (
            len(x_MK) == self._rows
            and out_MN is None
            and _shape(weight_NK, bias_N) in self.shapes
            and self._has_verified_layout(x_MK, weight_NK, bias_N)
        ):
            return self._blas.multiply(x_MK, weight_NK, bias_N)
        return multiply(x_MK, weight_NK, bias_N, out_MN=out_MN, gated=gated)

    def _passes(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> bool:
        try:
            return self.has_our_bits(weight_NK, bias_N) and self._is_faster(weight_NK, bias_N)
        except RuntimeError:  # it cannot do this without split-K, or memory is short
            return False

    def has_our_bits(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> bool:
        """Compares what readers of a product see: its parts added up and rounded."""
        for x, weight in _operands(weight_NK, self._rows):
            if not self._has_verified_layout(x, weight, bias_N):
                return False
            ours = multiply(x, weight, bias_N).sum_parts(x.dtype)
            theirs = self._blas.multiply(x, weight, bias_N).sum_parts(x.dtype).to(x.dtype)
            if not torch.equal(_bits(ours), _bits(theirs)):
                return False
        return True

    def _is_faster(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> bool:
        x, _ = next(_operands(weight_NK, self._rows))
        ours = self._blas.seconds(lambda: multiply(x, weight_NK, bias_N))
        theirs = self._blas.seconds(lambda: self._blas.multiply(x, weight_NK, bias_N))
        return theirs < _FASTER * ours

    def _has_verified_layout(self, *operands: torch.Tensor | None) -> bool:
        """Whether operands lie in memory as those did that were verified."""
        return all(
            operand is None
            or (operand.is_contiguous() and operand.data_ptr() % self._blas.alignment == 0)
            for operand in operands
        )


def _of_all_ranks(
    passed: Mapping[ProductShape, bool],
    reduce: Callable[[torch.Tensor], torch.Tensor] | None,
    device: torch.device,
) -> frozenset[ProductShape]:
    """The shapes that passed on every rank.

    Each rank has timings of its own. Without one decision they would launch different steps from
    here on, and wait for one another forever.
    """
    votes = torch.tensor([*passed.values(), True], dtype=torch.float32, device=device)
    *counts, num_ranks = (votes if reduce is None else reduce(votes)).tolist()
    found = zip(passed, counts, strict=True)
    return frozenset(shape for shape, count in found if count == num_ranks)


def _shape(weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> ProductShape:
    outputs, inputs = weight_NK.shape
    return ProductShape(outputs, inputs, bias_N is not None)


def _operands(weight_NK: torch.Tensor, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows and weights to multiply, of several seeds: the weight itself, and mirrored noise.

    Rounding to a narrow dtype hides most of what an order of sums changes. If the second half of
    the inputs cancels the first, only the rounding errors of the order are left.
    """
    half = weight_NK.shape[1] // 2
    for seed in range(_SEEDS):
        generator = torch.Generator(weight_NK.device).manual_seed(seed)
        x = weight_NK.new_empty(rows, weight_NK.shape[1]).normal_(generator=generator)
        x[1::8] = 0
        x[2::8] *= 1000
        x[3::8, ::64] *= 100  # a few inputs above all others, as activations have them
        x[4::8] /= 1000
        yield x, weight_NK
        noise = torch.empty_like(weight_NK).normal_(generator=generator)
        noise[:, half : 2 * half] = noise[:, :half]
        mirrored = x.clone()
        mirrored[:, half : 2 * half] = -x[:, :half]
        yield mirrored, noise * weight_NK.shape[1] ** -0.5


def _bits(y_MN: torch.Tensor) -> torch.Tensor:
    """As integers: zeros of both signs differ, and NaN equals itself."""
    return y_MN.view(_SAME_SIZE[y_MN.dtype.itemsize])
