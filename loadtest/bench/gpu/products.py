"""Products by the library: do their bits depend on the number of rows, and are they fast?

The process is started with variables that leave the library no workspace to cut sums into pieces
with. Eight rows repeat down the operand; a product is computed with 1 to 256 rows of it, and
with many more:

    equal results in equal rows, wherever they lie, and the same as with fewer rows    one order
    otherwise sizes fall into orders, listed as 1 | 2-16 | 17-4096                      not exact
    rows of one size differ among themselves                                            uneven

Where a shape has one order, the library may multiply it in an exact runner; where it has one order
from some size on, no step below that size may. Our own product is put to the same test.

Steps that fill a budget are tried as an exact runner tries them at its start: which of the
library's products have the bits of ours, and are they worth it?
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch.nn import functional

from loadtest.bench.gpu.bench import Bench, Row
from loadtest.bench.gpu.kernels import product_seconds, products_of, random_weights
from loadtest.bench.gpu.models import Shape

_PERIOD = 8  # different rows

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """One way to multiply."""

    multiply: Multiply
    timed: Callable[..., object]  # the same, as far as a runner needs it
    library: str | None = None  # what torch is to call


@dataclass(slots=True)
class Order:
    """Sizes whose results agree bit by bit, and the results of the first rows."""

    head_MN: torch.Tensor
    sizes: list[int]


@dataclass(slots=True)
class Orders:
    """What was found for one weight."""

    found: list[Order] = field(default_factory=list)
    uneven: list[int] = field(default_factory=list)  # sizes whose equal rows differ

    @property
    def exact(self) -> bool:
        return len(self.found) == 1 and not self.uneven

    @property
    def exact_from(self) -> int | None:
        """The least size from which on nothing changes; None: the largest is uneven."""
        ends = {order.sizes[-1]: order for order in self.found}
        largest = max([*ends, *self.uneven])
        if largest in self.uneven:
            return None
        last = ends[largest]
        others = [size for order in self.found if order is not last for size in order.sizes]
        before = max([0, *others, *self.uneven])
        return min(size for size in last.sizes if size > before)

    def __str__(self) -> str:
        parts = [_spans(order.sizes, self._tried) for order in self.found]
        if self.uneven:
            parts.append(f"uneven {_spans(self.uneven, self._tried)}")
        return " | ".join(parts)

    @property
    def _tried(self) -> list[int]:
        return sorted([size for order in self.found for size in order.sizes] + self.uneven)


def find_orders(multiply: Multiply, weight_NK: torch.Tensor, sizes: Iterable[int]) -> Orders:
    """Sorts rising sizes by the bits of their results."""
    sizes = list(sizes)
    rows = torch.randn(_PERIOD, weight_NK.shape[1], device=weight_NK.device, dtype=weight_NK.dtype)
    x_MK = rows.repeat(-(-sizes[-1] // _PERIOD), 1)
    orders = Orders()
    for size in sizes:
        y_MN = multiply(x_MK[:size], weight_NK)
        if not torch.equal(y_MN[_PERIOD:], y_MN[:-_PERIOD]):
            orders.uneven.append(size)
            continue
        head = y_MN[:_PERIOD].clone()
        for order in orders.found:
            common = min(len(order.head_MN), len(head))
            if torch.equal(order.head_MN[:common], head[:common]):
                order.sizes.append(size)
                if len(head) > common:
                    order.head_MN = head
                break
        else:
            orders.found.append(Order(head, [size]))
    return orders


def measure(bench: Bench) -> None:
    """For every weight of both models, by every way to multiply."""
    ways = _ways(bench)
    for shape in bench.models:
        if bench.device.type == "cuda":
            _full_steps(bench, shape)
        for name, outputs, inputs in products_of(shape):
            weights = random_weights(bench, outputs, inputs)
            for way in ways:
                bench.check_time()
                _choose(ways[way])
                orders = find_orders(ways[way].multiply, weights[0], _sizes(bench, name))
                bench.add(
                    "products: orders of sums",
                    {
                        "model": shape.name,
                        "weight": name,
                        "by": way,
                        "exact": orders.exact,
                        "exact from": orders.exact_from,
                        "rows with one order": str(orders),
                    },
                )
            for rows in (2,) if bench.smoke else (1, 32, 256, 2048, 8192):
                if name == "head" and rows > 256:
                    continue  # no step asks for so many logits
                bench.check_time()
                x = torch.randn(rows, inputs, device=bench.device, dtype=bench.dtype)
                row: Row = {"model": shape.name, "weight": name, "rows": rows}
                for way in ways:
                    _choose(ways[way])
                    row[f"{way} us"] = 1e6 * product_seconds(bench, ways[way].timed, x, weights)
                bench.add("products: speed", row)


def _ways(bench: Bench) -> dict[str, _Way]:
    from model.kernels.matmul import multiply

    def whole(x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        return multiply(x_MK, weight_NK).sum_parts(x_MK.dtype)

    ways = {"ours": _Way(multiply=whole, timed=multiply)}
    if bench.device.type == "cpu":
        return ways | {"library": _Way(multiply=functional.linear, timed=functional.linear)}
    return ways | {
        library: _Way(multiply=functional.linear, timed=functional.linear, library=library)
        for library in ("cublas", "cublaslt")
    }


def _choose(way: _Way) -> None:
    """Sets what torch calls, and forbids sums in pieces where that can be said (cuBLASLt)."""
    from model.runners.cuda.cublas import CublasLt

    if way.library == "cublaslt":
        CublasLt()
    elif way.library is not None:
        torch.backends.cuda.preferred_blas_library(way.library)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, True)


def _full_steps(bench: Bench, shape: Shape) -> None:
    """The library in the place of our product, in steps that fill a budget."""
    from model.kernels.matmul import multiply, part_size
    from model.runners.cuda.cublas import CublasLt, VerifiedProducts

    library = CublasLt()
    for name, outputs, inputs in products_of(shape):
        if name == "head":
            continue
        weights = random_weights(bench, outputs, inputs)
        for rows in (2048, 8192):
            bench.check_time()
            proven = VerifiedProducts([(weights[0], None)], rows=rows, blas=library)
            x = torch.randn(rows, inputs, device=bench.device, dtype=bench.dtype)
            row: Row = {
                "model": shape.name,
                "weight": name,
                "rows": rows,
                "parts": -(-inputs // part_size(outputs, inputs)),
                "kept": bool(proven.shapes),
                "ours us": 1e6 * product_seconds(bench, multiply, x, weights),
            }
            by_library = partial(library.multiply, bias_N=None)
            try:
                row["our bits"] = proven.has_our_bits(weights[0], None)
                row["library us"] = 1e6 * product_seconds(bench, by_library, x, weights)
            except RuntimeError as refused:
                row |= {"our bits": str(refused).splitlines()[0], "library us": None}
            bench.add("products: full steps", row)


def _sizes(bench: Bench, weight: str) -> list[int]:
    if bench.smoke:
        return [1, 2, 9]
    return [*range(1, 257), *([] if weight == "head" else [512, 1024, 2048, 4096])]


def _spans(sizes: list[int], tried: list[int]) -> str:
    """1-16, 33: runs without a gap among the sizes that were tried."""
    places = {size: place for place, size in enumerate(tried)}
    gaps = [index + 1 for index, (a, b) in enumerate(pairwise(sizes)) if places[b] > places[a] + 1]
    runs = [sizes[start:end] for start, end in pairwise([0, *gaps, len(sizes)])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
