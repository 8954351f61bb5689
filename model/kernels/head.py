"""The head's product, and what a choice needs of it first: a row's largest logit, its lowest id.

A tile of the product finds them while it holds its logits; a step whose rows are all greedy needs
nothing else, and its logits are not stored at all. The product is that of `model.kernels.matmul`:
the same tiles, the same order of sums, the same bits.

    logits of a tile ──┬── stored, where somebody reads them
                       └── Tops of the tile ── merge_tops ── Tops of the row

NaN is never the largest; a row of nothing else gives the last id. It chooses nothing but the
likeliest: sampling is `model.kernels.choice`. Legend: R rows, V vocabulary, N stretches of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from model.kernels.matmul import (
    INPUTS,
    Tiling,
    multiply_twin,
    part_size,
    place_tile,
    sum_tile,
    tiling_for,
)

_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Tops:
    """The largest logit of each stretch of a row and the lowest id that has it, always below V."""

    values_RN: torch.Tensor  # float32
    ids_RN: torch.Tensor  # int32

    @classmethod
    def empty(cls, rows: int, stretches: int, *, device: torch.device) -> Tops:
        """Room for them."""
        return cls(
            torch.empty((rows, stretches), dtype=torch.float32, device=device),
            torch.empty((rows, stretches), dtype=torch.int32, device=device),
        )

    def of(self, rows: int) -> Tops:
        """Those of the first rows: the same memory."""
        return Tops(self.values_RN[:rows], self.ids_RN[:rows])


def head(
    x_RC: torch.Tensor,
    weight_VC: torch.Tensor,
    *,
    logits_RV: torch.Tensor | None,
    tiling: Tiling | None = None,
) -> Tops:
    """The tops of x · wᵀ, a stretch a tile. `logits_RV`, float32, takes the logits themselves."""
    R, C = x_RC.shape
    V = weight_VC.shape[0]
    tiling = tiling or tiling_for(R)
    part = part_size(V, C)
    stretches = triton.cdiv(V, tiling.outputs)
    tops = Tops.empty(R, stretches, device=x_RC.device)
    if R == 0:
        return tops
    _head[(triton.cdiv(R, tiling.rows) * stretches,)](
        x_RC,
        weight_VC,
        tops.values_RN if logits_RV is None else logits_RV,
        tops.values_RN,
        tops.ids_RN,
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
        num_stages=tiling.stages_of(x_RC.dtype),
        enable_fp_fusion=False,
    )
    return tops


def head_twin(
    x_RC: torch.Tensor,
    weight_VC: torch.Tensor,
    *,
    logits_RV: torch.Tensor | None,
    tiling: Tiling | None = None,  # noqa: ARG001 - the signature of `head`
) -> Tops:
    """The same in torch, a row being one stretch. Logits without NaN."""
    y = torch.empty((len(x_RC), len(weight_VC)), device=x_RC.device)
    multiply_twin(x_RC, weight_VC, out_MN=y if logits_RV is None else logits_RV)
    return find_tops_twin(y if logits_RV is None else logits_RV)


def find_tops(logits_RV: torch.Tensor, *, chunk: int = _CHUNK) -> Tops:
    """The tops of logits that are there, a stretch a chunk."""
    R, V = logits_RV.shape
    num_chunks = triton.cdiv(V, chunk)
    tops = Tops.empty(R, num_chunks, device=logits_RV.device)
    if R:
        _tops[(R, num_chunks)](
            logits_RV, tops.values_RN, tops.ids_RN, V,
            N=num_chunks, CHUNK=chunk, enable_fp_fusion=False,
        )  # fmt: skip
    return tops


def find_tops_twin(
    logits_RV: torch.Tensor,
    *,
    chunk: int = _CHUNK,  # noqa: ARG001 - the signature of `find_tops`
) -> Tops:
    """The same in torch, a row being one stretch. Logits without NaN."""
    values = logits_RV.amax(-1, keepdim=True)
    return Tops(values, logits_RV.argmax(-1, keepdim=True).int())


def merge_tops(tops: Tops, *, vocab_size: int, out: Tops | None = None) -> Tops:
    """One stretch a row, the whole of it."""
    R, N = tops.values_RN.shape
    out = out or Tops.empty(R, 1, device=tops.values_RN.device)
    if R:
        lanes = triton.next_power_of_2(N)
        _merge[(R,)](
            tops.values_RN, tops.ids_RN, out.values_RN, out.ids_RN, vocab_size,
            N=N, LANES=lanes, num_warps=min(8, max(1, lanes // 256)), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def merge_tops_twin(tops: Tops, *, vocab_size: int, out: Tops | None = None) -> Tops:
    """The same in torch. Values without NaN."""
    values = tops.values_RN.amax(-1, keepdim=True)
    ids = torch.where(tops.values_RN == values, tops.ids_RN, vocab_size - 1)
    out = out or Tops.empty(len(values), 1, device=values.device)
    return Tops(out.values_RN.copy_(values), out.ids_RN.copy_(ids.amin(-1, keepdim=True)))


@triton.jit(do_not_specialize=["M"])
def _head(
    x_ptr,
    w_ptr,
    logits_ptr,
    tops_ptr,
    ids_ptr,
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
    """One tile of logits: their tops, and the logits where they are stored."""
    row_tile, output_tile = place_tile(M, N, ROWS, OUTPUTS)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    outputs = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    row_mask = rows < M
    output_mask = outputs < N
    total = sum_tile(
        x_ptr, w_ptr, w_ptr, rows, outputs, 0, M, x_stride,
        N, K, PART, PARTS, False, ROWS, OUTPUTS, INPUTS,
    )  # fmt: skip
    if STORED:
        logits_rows = logits_ptr + rows.to(tl.int64)[:, None] * N
        mask = row_mask[:, None] & output_mask[None, :]
        tl.store(logits_rows + outputs[None, :], tl.trans(total), mask=mask)
    STRETCHES: tl.constexpr = (N + OUTPUTS - 1) // OUTPUTS
    logits = tl.where(output_mask[:, None], total, float("-inf"))
    top = tl.max(logits, axis=0)
    ids = tl.min(tl.where(logits == top[None, :], outputs[:, None], N - 1), axis=0)
    places = rows * STRETCHES + output_tile
    tl.store(tops_ptr + places, top, mask=row_mask)
    tl.store(ids_ptr + places, ids, mask=row_mask)


@triton.jit
def _tops(logits_ptr, tops_ptr, ids_ptr, V, N: tl.constexpr, CHUNK: tl.constexpr):
    """The largest logit of a chunk and the lowest id that has it."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=float("-inf"))
    top = tl.max(logits, axis=0)
    tl.store(tops_ptr + row * N + chunk, top)
    tl.store(ids_ptr + row * N + chunk, tl.min(tl.where(logits == top, ids, V - 1), axis=0))


@triton.jit
def _merge(tops_ptr, ids_ptr, top_ptr, id_ptr, V, N: tl.constexpr, LANES: tl.constexpr):
    """The largest of a row's tops and the lowest id among equals."""
    row = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    tops = tl.load(tops_ptr + row * N + lanes, mask=lanes < N, other=float("-inf"))
    ids = tl.load(ids_ptr + row * N + lanes, mask=lanes < N, other=V - 1)
    top = tl.max(tops, axis=0)
    tl.store(top_ptr + row, top)
    tl.store(id_ptr + row, tl.min(tl.where(tops == top, ids, V - 1), axis=0))
