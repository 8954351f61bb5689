"""Single kernels: attention over batch and context, products of few rows.

Both are memory-bound: the tables give GB/s of the bytes that they must read, and the share of a
copy's rate. Each call reads more than the L2 cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from loadtest.bench.gpu.bench import Bench
from loadtest.bench.gpu.models import Shape
from model.packed_weights import PackedWeight, to_float8
from model.runners import RunnerOptions

_BLOCK_SIZE = RunnerOptions().block_size
_GRID = (
    (1, 4096), (1, 65536), (8, 1024), (8, 8192), (32, 2048), (32, 16384),
    (128, 1024), (128, 4096), (256, 512), (256, 1024), (256, 2048),
)  # fmt: skip


def measure(bench: Bench) -> None:
    """Attention of decoded tokens, then every product of a decode step."""
    copy = bench.copy_rate()
    for shape in bench.models:
        for batch, context in [(2, 40)] if bench.smoke else _GRID:
            bench.check_time()
            _attention_row(bench, shape, batch, context, copy=copy)
    for shape in bench.models:
        for name, outputs, inputs in products_of(shape):
            bench.check_time()
            _product_rows(bench, shape, (name, outputs, inputs), copy=copy)


def products_of(shape: Shape) -> list[tuple[str, int, int]]:
    """(name, outputs, inputs) of the weights of a step."""
    config = shape.config
    return [
        ("qkv", config.query_size + 2 * config.kv_size, config.hidden_size),
        ("out", config.hidden_size, config.query_size),
        ("gate-up", 2 * config.intermediate_size, config.hidden_size),
        ("down", config.hidden_size, config.intermediate_size),
        ("head", config.vocab_size, config.hidden_size),
    ]


def random_weights(bench: Bench, outputs: int, inputs: int) -> list[torch.Tensor]:
    """As many of one shape as together exceed the cache."""
    copies = max(1, min(16, 2**28 // (outputs * inputs * bench.dtype.itemsize)))
    scale = inputs**-0.5
    if bench.smoke:
        copies = 1
    return [
        torch.randn(outputs, inputs, device=bench.device, dtype=bench.dtype) * scale
        for _ in range(copies)
    ]


def product_seconds(
    bench: Bench, product: Callable[..., object], x: torch.Tensor, weights: Sequence[object]
) -> float:
    """Seconds per product, over all weights."""
    return bench.replayed(partial(_each, product, x, weights)) / len(weights)


def _each(product: Callable[..., object], x: torch.Tensor, weights: Sequence[object]) -> None:
    for weight in weights:
        product(x, weight)


def _product_rows(bench: Bench, shape: Shape, weight: tuple[str, int, int], *, copy: float) -> None:
    from model.kernels.matmul import multiply, multiply_by_vendor_blas

    name, outputs, inputs = weight
    weights = random_weights(bench, outputs, inputs)
    packed = [to_float8(each) for each in weights]
    for rows in bench.batches:
        x = torch.randn(rows, inputs, device=bench.device, dtype=bench.dtype)
        ours = product_seconds(bench, multiply, x, weights)
        rate = outputs * inputs * bench.dtype.itemsize / ours
        bench.add(
            "kernel: product",
            {
                "model": shape.name,
                "weight": name,
                "rows": rows,
                "us": ours * 1e6,
                "library us": product_seconds(bench, multiply_by_vendor_blas, x, weights) * 1e6,
                "float8 us": product_seconds(bench, _multiply_packed, x, packed) * 1e6,
                "GB/s": rate / 1e9,
                "of copy": rate / copy,
            },
        )


def _multiply_packed(x: torch.Tensor, weight: PackedWeight) -> object:
    from model.kernels.matmul import multiply

    return multiply(x, weight.values_NK, scales=weight.scales)


def _attention_row(bench: Bench, shape: Shape, batch: int, context: int, *, copy: float) -> None:
    seconds, moved = _attention_time(bench, shape, batch, context)
    rate = moved / seconds
    bench.add(
        "kernel: attention",
        {
            "model": shape.name,
            "batch": batch,
            "context": context,
            "us": seconds * 1e6,
            "GB/s": rate / 1e9,
            "of copy": rate / copy,
        },
    )


def _attention_time(bench: Bench, shape: Shape, batch: int, context: int) -> tuple[float, int]:
    """Seconds of one layer's attention, and the bytes of K and V that it reads."""
    from model.kernels.attention import Partials, attention_programs, paged_attention
    from model.kernels.work_list import WorkList, shares_for

    config, device, dtype = shape.config, bench.device, bench.dtype
    blocks = -(-context // _BLOCK_SIZE)
    pool_2XKD = torch.randn(
        2, batch * blocks * _BLOCK_SIZE, config.num_kv_heads, config.head_dim,
        device=device, dtype=dtype,
    )  # fmt: skip
    table = torch.randperm(batch * blocks, device=device).int().view(batch, blocks)
    rows = torch.arange(batch + 1, device=device, dtype=torch.int32)
    contexts = torch.full((batch,), context, device=device, dtype=torch.int32)
    work = WorkList(
        max_rows=batch,
        max_sequences=batch,
        max_context=context,
        group=config.num_heads // config.num_kv_heads,
        device=device,
        shares=shares_for(attention_programs(device), config.num_kv_heads),
    )
    work.fill(rows, contexts, rows[:-1], window=None)
    partials = Partials(work, num_heads=config.num_heads, head_dim=config.head_dim, device=device)
    queries = torch.randn(batch, config.num_heads, config.head_dim, device=device, dtype=dtype)

    def attend() -> torch.Tensor:
        return paged_attention(
            queries,
            pool_2XKD[0],
            pool_2XKD[1],
            table,
            work=work,
            partials=partials,
            block_size=_BLOCK_SIZE,
            scale=config.head_dim**-0.5,
            window=None,
            programs=attention_programs(device),
        )

    moved = 2 * batch * context * config.kv_size * dtype.itemsize
    return bench.replayed(attend), moved
