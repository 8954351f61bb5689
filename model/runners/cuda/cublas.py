"""Products of the layers by the library, in the one size of step where that was proven to be right.

    a step of exactly `rows` rows     a shape that was kept     the library
    a step of any other size          every shape               our own product

Our product has the same bits for every number of rows; the library (cuBLASLt) promises nothing of
the kind, and where it has our bits no answer can tell which of the two multiplied. So at the start
each shape is multiplied by both. It is kept if every bit is the same, of operands that show an
order of sums, and if the library is faster, which large steps of prompts can give and decode steps
cannot: those stay ours.

The library must not cut sums into pieces of its own (split-K). It is told not to, and is left no
workspace to do it with: variables that it reads once, which a process sets before it multiplies
(`RunnerOptions.library_products` says that it did). Where K has several parts, a call for each adds
to the sum of those before, in float32, as our product does. Legend: `model.kernels.matmul`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional

from model.kernels.matmul import Product, multiply, part_size
from model.runners.cuda.accelerator import median_seconds

_SEEDS = 3
_FASTER = 0.95  # of our time; above, it is noise, or spent by who reads the sum in float32
_REPEATS = 15
_SAME_SIZE = {2: torch.int16, 4: torch.int32}


class ProductShape(NamedTuple):
    """What decides how a product with so many rows is computed."""

    outputs: int
    inputs: int
    bias: bool


class Library(Protocol):
    """Another make of products."""

    alignment: int  # bytes; it may go by the operands' addresses, so all have at least this

    def multiply(
        self, x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None
    ) -> Product:
        """Computes x · wᵀ + bias. Raises RuntimeError for what it cannot do as it was told."""
        ...

    def seconds(self, work: Callable[[], object]) -> float:
        """How long `work` takes where it is computed."""
        ...


class CublasLt:
    """The library of an NVIDIA GPU. To build one tells it, for the process, to split no sums."""

    alignment = 256  # above which it makes no difference

    def __init__(self) -> None:
        torch.backends.cuda.preferred_blas_library("cublaslt")
        matmul = torch.backends.cuda.matmul
        whole: Any = (False, False)  # neither reduced in the narrow dtype nor split
        matmul.allow_bf16_reduced_precision_reduction = whole
        matmul.allow_fp16_reduced_precision_reduction = whole

    def multiply(
        self, x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None
    ) -> Product:
        return multiply_by_parts(x_MK, weight_NK, bias_N)

    def seconds(self, work: Callable[[], object]) -> float:
        return median_seconds(work, repeats=_REPEATS)


def multiply_by_parts(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None
) -> Product:
    """Torch's products with the parts of K that ours has; in float32 where they are several."""
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


class ProvenProducts:
    """`multiply` for a network's layers, by the library where it was tried and is as good."""

    def __init__(
        self,
        products: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
        *,
        rows: int,
        library: Library,
    ) -> None:
        self._rows = rows
        self._library = library
        examples = {_shape(weight, bias): (weight, bias) for weight, bias in products}
        self.shapes = frozenset(shape for shape, pair in examples.items() if self._is_kept(*pair))

    def __call__(
        self,
        x_MK: torch.Tensor,
        weight_NK: torch.Tensor,
        bias_N: torch.Tensor | None = None,
        *,
        out_MN: torch.Tensor | None = None,
    ) -> Product:
        """See `multiply`: the same bits, whoever multiplies."""
        if (
            len(x_MK) == self._rows
            and out_MN is None
            and _shape(weight_NK, bias_N) in self.shapes
            and self._is_laid_out(x_MK, weight_NK, bias_N)
        ):
            return self._library.multiply(x_MK, weight_NK, bias_N)
        return multiply(x_MK, weight_NK, bias_N, out_MN=out_MN)

    def _is_kept(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> bool:
        try:
            return self.has_our_bits(weight_NK, bias_N) and self._is_faster(weight_NK, bias_N)
        except RuntimeError:  # it will not do this without splitting sums, or lacks the memory
            return False

    def has_our_bits(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> bool:
        """Of all that is handed on: parts as their reader adds them up, rounded as it rounds."""
        for x, weight in _operands(weight_NK, self._rows):
            if not self._is_laid_out(x, weight, bias_N):
                return False
            ours = multiply(x, weight, bias_N).whole(x.dtype)
            theirs = self._library.multiply(x, weight, bias_N).whole(x.dtype).to(x.dtype)
            if not torch.equal(_bits(ours), _bits(theirs)):
                return False
        return True

    def _is_faster(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> bool:
        x, _ = next(_operands(weight_NK, self._rows))
        ours = self._library.seconds(lambda: multiply(x, weight_NK, bias_N))
        theirs = self._library.seconds(lambda: self._library.multiply(x, weight_NK, bias_N))
        return theirs < _FASTER * ours

    def _is_laid_out(self, *operands: torch.Tensor | None) -> bool:
        """Whether operands lie as those did that the proof was made with."""
        return all(
            operand is None
            or (operand.is_contiguous() and operand.data_ptr() % self._library.alignment == 0)
            for operand in operands
        )


def _shape(weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> ProductShape:
    outputs, inputs = weight_NK.shape
    return ProductShape(outputs, inputs, bias_N is not None)


def _operands(weight_NK: torch.Tensor, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows and weights to multiply, of several seeds: the weight itself, and mirrored noise.

    Rounding to a narrow dtype hides most of what an order of sums changes. Where the second half of
    the inputs takes away what the first has added, the order's rounding is all that is left.
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
    """As integers: zeros of both signs differ, and what is not a number equals itself."""
    return y_MN.view(_SAME_SIZE[y_MN.dtype.itemsize])
