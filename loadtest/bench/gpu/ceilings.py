"""The ceilings of the chip: bytes/s of a large copy, operations/s of a large product."""

from __future__ import annotations

import torch

from loadtest.bench.gpu.bench import Bench


def measure(bench: Bench) -> None:
    """On random data: products of zeros are faster."""
    side = 64 if bench.smoke else 8192
    a, b = (torch.randn(side, side, device=bench.device, dtype=bench.dtype) for _ in range(2))
    product = 2 * side**3 / bench.seconds(lambda: a @ b)
    bandwidth, source = bench.bandwidth()
    bench.add(
        "ceilings",
        {
            "copy GB/s": bench.copy_rate() / 1e9,
            "product TFLOP/s": product / 1e12,
            "roof GB/s": bandwidth / 1e9,
            "roof from": source,
        },
    )
