"""The head's product, fused with what sampling needs first: the argmax of each row of logits.

A tile of the product finds the largest logit and the lowest id that has it while it holds its
logits; a step whose rows are all greedy needs nothing else, and its logits are not stored at all.
The product is that of `model.kernels.matmul`: the same tiles, the same order of sums, the same
bits.

    logits of a tile --+-- stored, if they are read later
                       +-- Argmax of the tile -- merge_argmax -- Argmax of the row

NaN is never the largest; a row of nothing else gives the last id. Legend: R rows, V vocabulary,
N chunks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from model.kernels.launch import await_inputs, launch_options
from model.kernels.matmul import place_tile, sum_tile
from model.kernels.shared_memory import shared_memory
from model.kernels.tiling import INPUTS, Tiling, part_size, tiling_for

_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Argmax:
    """The largest logit of each chunk of a row and the lowest id that has it, always below V."""

    values_RN: torch.Tensor  # float32
    ids_RN: torch.Tensor  # int32

    @classmethod
    def empty(cls, rows: int, num_chunks: int, *, device: torch.device) -> Argmax:
        return cls(
            torch.empty((rows, num_chunks), dtype=torch.float32, device=device),
            torch.empty((rows, num_chunks), dtype=torch.int32, device=device),
        )

    def first(self, rows: int) -> Argmax:
        """The first rows, in the same memory."""
        return Argmax(self.values_RN[:rows], self.ids_RN[:rows])


def head(
    x_RC: torch.Tensor,
    weight_VC: torch.Tensor,
    *,
    logits_RV: torch.Tensor | None,
    tiling: Tiling | None = None,
) -> Argmax:
    """The argmax of x · wᵀ, by tiles. `logits_RV`, float32, receives the logits if given."""
    R, C = x_RC.shape
    V = weight_VC.shape[0]
    tiling = tiling or tiling_for(R, limit=shared_memory(x_RC.device))
    part = part_size(V, C)
    num_chunks = triton.cdiv(V, tiling.outputs)
    argmax = Argmax.empty(R, num_chunks, device=x_RC.device)
    if R == 0:
        return argmax
    _head[(triton.cdiv(R, tiling.rows) * num_chunks,)](
        x_RC,
        weight_VC,
        argmax.values_RN if logits_RV is None else logits_RV,
        argmax.values_RN,
        argmax.ids_RN,
        R,
        x_RC.stride(0),
        N=V,
        K=C,
        PART=part,
        PARTS=triton.cdiv(C, part),
        STORED=logits_RV is not None,
        ROWS=tiling.rows,
        OUTPUTS=tiling.outputs,
        INPUTS=INPUTS,
        num_warps=tiling.warps,
        num_stages=tiling.stages_of(x_RC),
        **launch_options(x_RC.device),
    )
    return argmax


def find_argmax(logits_RV: torch.Tensor, *, chunk: int = _CHUNK) -> Argmax:
    """The argmax of stored logits, by chunks."""
    R, V = logits_RV.shape
    num_chunks = triton.cdiv(V, chunk)
    argmax = Argmax.empty(R, num_chunks, device=logits_RV.device)
    if R:
        _argmax[(R, num_chunks)](
            logits_RV, argmax.values_RN, argmax.ids_RN, V,
            N=num_chunks, CHUNK=chunk, enable_fp_fusion=False,
        )  # fmt: skip
    return argmax


def merge_argmax(argmax: Argmax, *, vocab_size: int, out: Argmax | None = None) -> Argmax:
    """The argmax of whole rows."""
    R, N = argmax.values_RN.shape
    out = out or Argmax.empty(R, 1, device=argmax.values_RN.device)
    if R:
        lanes = triton.next_power_of_2(N)
        _merge[(R,)](
            argmax.values_RN, argmax.ids_RN, out.values_RN, out.ids_RN, vocab_size,
            N=N, LANES=lanes, num_warps=min(8, max(1, lanes // 256)), enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["M"])
def _head(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    logits_ptr,  # [M, N], if STORED
    values_ptr,  # [M, NUM_CHUNKS]
    ids_ptr,  # [M, NUM_CHUNKS]
    M,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """One tile of logits: their argmax, and the logits if they are stored."""
    row_tile, output_tile = place_tile(M, N, ROWS, OUTPUTS)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    outputs = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    row_mask = rows < M
    output_mask = outputs < N
    await_inputs()
    total = sum_tile(
        x_ptr, w_ptr, w_ptr, w_ptr, rows, outputs, 0, M, x_stride,
        N, K, PART, PARTS, False, "plain", ROWS, OUTPUTS, INPUTS,
    )  # fmt: skip
    if STORED:
        logits_rows = logits_ptr + rows.to(tl.int64)[:, None] * N
        mask = row_mask[:, None] & output_mask[None, :]
        tl.store(logits_rows + outputs[None, :], tl.trans(total), mask=mask)
    NUM_CHUNKS: tl.constexpr = (N + OUTPUTS - 1) // OUTPUTS
    logits = tl.where(output_mask[:, None], total, float("-inf"))
    largest = tl.max(logits, axis=0)
    ids = tl.min(tl.where(logits == largest[None, :], outputs[:, None], N - 1), axis=0)
    places = rows * NUM_CHUNKS + output_tile
    tl.store(values_ptr + places, largest, mask=row_mask)
    tl.store(ids_ptr + places, ids, mask=row_mask)


@triton.jit
def _argmax(
    logits_ptr,  # [R, V]
    values_ptr,  # [R, N]
    ids_ptr,  # [R, N]
    V,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The largest logit of a chunk and the lowest id that has it."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=float("-inf"))
    largest = tl.max(logits, axis=0)
    tl.store(values_ptr + row * N + chunk, largest)
    tl.store(ids_ptr + row * N + chunk, tl.min(tl.where(logits == largest, ids, V - 1), axis=0))


@triton.jit
def _merge(
    values_ptr,  # [R, N]
    ids_ptr,  # [R, N]
    value_ptr,  # [R]
    id_ptr,  # [R]
    V,
    N: tl.constexpr,
    LANES: tl.constexpr,
):
    """The largest of a row's chunks and the lowest id among equals."""
    row = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    values = tl.load(values_ptr + row * N + lanes, mask=lanes < N, other=float("-inf"))
    ids = tl.load(ids_ptr + row * N + lanes, mask=lanes < N, other=V - 1)
    largest = tl.max(values, axis=0)
    tl.store(value_ptr + row, largest)
    tl.store(id_ptr + row, tl.min(tl.where(values == largest, ids, V - 1), axis=0))
