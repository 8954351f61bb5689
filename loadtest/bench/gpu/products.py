"""Products of steps that fill the token budget: our kernel against the vendor BLAS (cuBLASLt).

An exact runner may use a product of the vendor BLAS if it has the bits of ours; the runner tries
that at its start (`ProvenProducts`). This stage shows which products qualify and what they gain.
"""

from __future__ import annotations

from functools import partial

import torch

from loadtest.bench.gpu.bench import Bench, Row
from loadtest.bench.gpu.kernels import product_seconds, products_of, random_weights


def measure(bench: Bench) -> None:
    from model.kernels.matmul import multiply
    from model.kernels.tiling import part_size

    for shape in bench.models:
        for name, outputs, inputs in products_of(shape):
            if name == "head":
                continue  # no step needs that many logits
            weights = random_weights(bench, outputs, inputs)
            for rows in (2,) if bench.smoke else (2048, 8192):
                bench.check_time()
                x = torch.randn(rows, inputs, device=bench.device, dtype=bench.dtype)
                row: Row = {
                    "model": shape.name,
                    "weight": name,
                    "rows": rows,
                    "parts": -(-inputs // part_size(outputs, inputs)),
                    "ours us": 1e6 * product_seconds(bench, multiply, x, weights),
                }
                if bench.device.type == "cuda":
                    row |= _by_library(bench, x, weights)
                bench.add("products of full steps", row)


def _by_library(bench: Bench, x: torch.Tensor, weights: list[torch.Tensor]) -> Row:
    """The columns of the vendor BLAS, whose product may be unsupported."""
    from model.runners.cuda.cublas import CublasLt, VerifiedProducts

    library = CublasLt()
    proven = VerifiedProducts([(weights[0], None)], rows=len(x), blas=library)
    by_library = partial(library.multiply, bias_N=None)
    row: Row = {"kept": bool(proven.shapes)}
    try:
        row["our bits"] = proven.has_our_bits(weights[0], None)
        row["library us"] = 1e6 * product_seconds(bench, by_library, x, weights)
    except RuntimeError as unsupported:
        row |= {"our bits": str(unsupported).splitlines()[0], "library us": None}
    return row
