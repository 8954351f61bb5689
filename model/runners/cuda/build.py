"""Builds a CudaRunner: loads the weights, sizes the KV pool, verifies that answers are exact.

Memory is planned once: weights, buffers for the largest step, what that step was measured to need,
a margin; the rest may be KV pool. No step that `RunnerOptions` allows needs more.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import triton

from model.config import ModelConfig
from model.kernels.attention import STEP
from model.kernels.matmul import multiply
from model.kernels.work_list import SPLIT
from model.kvcache import bytes_per_block
from model.packed_weights import is_matrix
from model.runners import RunnerOptions
from model.runners.cuda.accelerator import Accelerator, CudaAccelerator, HostAccelerator
from model.runners.cuda.chip import check_kv_dtype, resource_errors, unsupported_chip
from model.runners.cuda.cublas import CublasLt, VendorBlas, VerifiedProducts
from model.runners.cuda.device_memory import blocks_that_fit, check_weights_fit
from model.runners.cuda.mixed import MixedShapes, token_buckets
from model.runners.cuda.network import FusedNetwork, Multiply, Reduce
from model.runners.cuda.runner import CudaRunner
from model.runners.cuda.slots import BatchSlots
from model.runners.cuda.workspace import Workspace
from model.runners.exactness import ExactnessCheck, check_exactness, check_for
from model.runners.logprobs import SCORED_AT_ONCE
from model.runners.torch import choose_device
from model.weights import Weights

KERNEL_VERSION = 2  # raised whenever the kernels' bits change

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PACKED = {"float8": "-fp8", "int8": "-q8"}  # weights of 8 bits -> part of the numeric class
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@resource_errors()
def build_runner(
    config: ModelConfig,
    weights: Weights,
    *,
    options: RunnerOptions,
    digest: str,
    product: Multiply = multiply,
    reduce: Reduce | None = None,
    check: ExactnessCheck | Literal["by options"] | None = "by options",
    blas: VendorBlas | None = None,
    mixed_graphs: bool = True,
) -> CudaRunner:
    """Builds a runner. Raises ValueError for unsupported networks or options, or too little memory.

    With device `cpu` the kernels run in Triton's interpreter: for tests. `product` multiplies by
    weight matrices; any but the default is not exact. `reduce` sums over ranks. The runner is
    called exact only after `check` has passed (None: no check). `blas` (None: the GPU's) is used
    for the shapes that it is verified for, if the options allow it. Without `mixed_graphs`, steps
    with prompts or drafts are launched kernel by kernel, without padding.
    """
    device = choose_device(options.device)
    on_gpu = device.type == "cuda"
    if on_gpu and (reason := unsupported_chip(device)):
        raise ValueError(f"{reason}: use the torch runner")
    dtype = _choose_dtype(options.dtype, on_gpu=on_gpu)
    accelerator: Accelerator = CudaAccelerator(device) if on_gpu else HostAccelerator()
    accelerator.activate()
    device = accelerator.device
    kv_dtype = _choose_kv_dtype(options.kv_dtype, dtype)
    if on_gpu:
        check_kv_dtype(device, kv_dtype)
    packed = options.dtype in _PACKED
    if packed and product is not multiply:
        raise ValueError(f"dtype {options.dtype} has no product by vendor BLAS: use bfloat16")
    needed = _weight_bytes(weights, dtype, options.dtype)
    needed += sum(each.num_values for each in options.adapters) * dtype.itemsize
    check_weights_fit(needed, accelerator.free_memory())
    network = FusedNetwork(
        config, weights, dtype=dtype, device=device, product=product, reduce=reduce,
        float8=options.dtype == "float8", adapters=options.adapters,
    )  # fmt: skip
    verifies = product is multiply and not packed  # vendor BLAS reads no weights of 8 bits
    verified = _verify_blas(network, options, blas, device) if verifies else None
    table_width = -(-config.max_model_len // options.block_size)
    slots = BatchSlots(
        options.max_sequences, table_width=table_width, adapted=bool(options.adapters)
    )
    # Sums over ranks stay out of these graphs until they have run on several GPUs.
    captured = mixed_graphs and product is multiply and reduce is None
    shapes = _mixed_shapes(config, options, slots, captured=captured)
    workspace = Workspace(
        config,
        options,
        windows=network.windows,
        slots=slots,
        kv_dtype=kv_dtype,
        device=device,
        num_padding=shapes.num_padding,
    )
    runner = CudaRunner(
        options,
        accelerator=accelerator,
        network=network,
        workspace=workspace,
        slots=slots,
        shapes=shapes,
    )
    with torch.inference_mode():
        accelerator.compile_ahead(runner.launch_variants)
    num_blocks = options.num_blocks or _measure_blocks(
        runner,
        options,
        accelerator=accelerator,
        block_bytes=bytes_per_block(config, options.block_size, dtype=kv_dtype),
        mixes_products=verified is not None,
    )
    runner.allocate_pool(num_blocks)
    runner.vendor_blas_shapes = frozenset() if verified is None else verified.shapes
    if product is multiply and reduce is None and check is not None:
        if check == "by options":
            check = check_for(options, num_blocks=num_blocks, max_model_len=config.max_model_len)
        runner.capture_graphs()  # so that they are checked, too
        runner.exact = _is_exact(runner, network, check)
    kind = "triton" if runner.exact else "triton-inexact"
    kernels = _kernels_name(device, dtype, kv_dtype, packed=_PACKED.get(options.dtype, ""))
    runner.numeric_class = f"{kind}-{kernels}-{digest[:12]}"
    return runner


def _mixed_shapes(
    config: ModelConfig, options: RunnerOptions, slots: BatchSlots, *, captured: bool
) -> MixedShapes:
    most = min(options.max_batch_tokens, options.max_sequences * config.max_model_len)
    if options.vendor_blas:  # it multiplies full steps, one launch at a time
        most = min(most, options.max_batch_tokens - 1)
    return MixedShapes(
        buckets=token_buckets(most) if captured and most else (),
        max_sequences=options.max_sequences,
        max_context=config.max_model_len,
        pad_slot=slots.pad_slot,
    )


def _verify_blas(
    network: FusedNetwork, options: RunnerOptions, blas: VendorBlas | None, device: torch.device
) -> VerifiedProducts | None:
    """Makes vendor BLAS multiply the shapes that it is verified for, in full steps.

    Only steps with prompts have so many rows, and those are not captured as graphs.
    """
    if not options.vendor_blas or options.max_batch_tokens <= options.max_sequences:
        return None
    if blas is None:
        if device.type != "cuda":
            return None
        blas = CublasLt()
    with torch.inference_mode():
        verified = VerifiedProducts(
            network.layer_products, rows=options.max_batch_tokens, blas=blas, reduce=network.reduce
        )
    if not verified.shapes:
        return None
    network.multiply_layers_by(verified)
    return verified


def _measure_blocks(
    runner: CudaRunner,
    options: RunnerOptions,
    *,
    accelerator: Accelerator,
    block_bytes: int,
    mixes_products: bool,
) -> int:
    """Blocks of the pool, from what the largest step and the graphs leave free.

    That is the largest of any step: each of its rows has masks, penalties and log probabilities.
    """
    largest = options.max_batch_tokens
    # Vendor BLAS multiplies full steps only: with one row less all products are ours.
    sizes = (largest, largest - 1) if mixes_products else (largest,)
    most: dict[str, Any] = {
        "adjusted": True, "logprobs": True, "scored": min(largest, SCORED_AT_ONCE),
    }  # fmt: skip
    runner.padding_step(largest, **most)  # compiles; libraries allocate what they keep
    work = max(accelerator.peak_of(partial(runner.padding_step, size, **most)) for size in sizes)
    runner.launch_largest()
    work += accelerator.peak_of(runner.launch_largest)  # graphs keep memory of their own
    return blocks_that_fit(
        free=accelerator.free_memory(),
        work=work,
        block_bytes=block_bytes,
        wanted=options.kv_memory,
        share=options.memory_share,
    )


def _is_exact(runner: CudaRunner, network: FusedNetwork, check: ExactnessCheck) -> bool:
    """Whether answers have the same bits by every path. If they do not, first graphs of mixed steps
    are given up, and then vendor BLAS: whether they were to blame, the next check shows.
    """

    def passes() -> bool:
        return all(check_exactness(runner, check).values())

    if passes():
        return True
    if runner.has_mixed_graphs:
        runner.drop_mixed_graphs("answers were not exact")
        if passes():
            return True
    if not runner.vendor_blas_shapes:
        return False
    runner.vendor_blas_shapes = frozenset()
    network.multiply_layers_by(multiply)
    return passes()


def _weight_bytes(weights: Weights, dtype: torch.dtype, name: str) -> int:
    """Bytes on the device, without scales. `name`: the dtype asked for; int8 needs blocks."""
    total, has_blocks = 0, False
    for key, weight in weights.items():
        is_block = weight.dtype is torch.uint8
        has_blocks |= is_block
        is_packed = is_block or (name == "float8" and is_matrix(key))
        total += weight.numel() * (1 if is_packed else dtype.itemsize)
    if has_blocks != (name == "int8"):
        raise ValueError(
            "dtype int8 is for weights in the 8-bit blocks of a GGUF file, and these for no other"
        )
    return total


def _kernels_name(
    device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, *, packed: str
) -> str:
    chip = "interpreter"
    if device.type == "cuda":
        chip = "sm{}{}".format(*torch.cuda.get_device_capability(device))
    kinds = f"{_SHORT[dtype]}{packed}-kv{8 * kv_dtype.itemsize}"
    return f"{chip}-{kinds}-{KERNEL_VERSION}.{SPLIT}.{STEP}-triton{triton.__version__}"


def _choose_dtype(name: str, *, on_gpu: bool) -> torch.dtype:
    if name in _PACKED and not on_gpu:
        return torch.float32  # interpreted, products in bfloat16 are wrong
    if name == "auto" or name in _PACKED:
        return torch.bfloat16
    if name == "float32" and on_gpu:
        raise ValueError(
            "the cuda runner does not support dtype float32 on a GPU, only in the interpreter: use "
            "bfloat16, float16 or the torch runner"
        )
    if name not in _DTYPES:
        raise ValueError(
            f"dtype must be auto, int8, float8 or one of {', '.join(_DTYPES)} for the cuda runner"
        )
    return _DTYPES[name]


def _choose_kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    kinds = {"auto": dtype, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
    if name not in kinds:
        raise ValueError(f"kv_dtype must be one of {', '.join(kinds)} for the cuda runner")
    return kinds[name]
