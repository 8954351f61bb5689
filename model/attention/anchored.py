"""Attention of whole texts under the mask of AnLLM (arXiv 2402.07616), as training computes it.

    query                keys it sees
    token of a segment   its segment so far, and the anchors of earlier ones
    anchor, the last     its segment, itself included: it gathers what the segment says, and no more

The mask of serving is `model.attention.compressed`'s, over a cache that holds these keys alone.
"""

from __future__ import annotations

import torch

from model.layers import fused


def seen_pairs(anchors_NT: torch.Tensor) -> torch.Tensor:
    """Which tokens s a token t sees, [..., T, T] as t, s; given which tokens are anchors."""
    T = anchors_NT.shape[-1]
    segments_NT = anchors_NT.cumsum(-1) - anchors_NT.long()  # an anchor ends its segment
    same = segments_NT[..., :, None] == segments_NT[..., None, :]
    far = anchors_NT[..., None, :] & ~anchors_NT[..., :, None]
    causal = torch.ones(T, T, dtype=torch.bool, device=anchors_NT.device).tril()
    return causal & (same | far)


def anchored_attention(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    *,
    layer: int,  # noqa: ARG001 - without a cache, layers need no telling apart
    scale: float,
    window: int | None,
    seen_TT: torch.Tensor,
) -> torch.Tensor:
    """softmax(q · kᵀ · scale + mask) · v of texts [..., T, H, D]. seen: of `seen_pairs`."""
    if window is not None:
        raise ValueError("anchors are for models without a sliding window")
    shared = q_THD.shape[-2] // k_TKD.shape[-2]
    return fused(
        q_THD,
        k_TKD.repeat_interleave(shared, dim=-2),
        v_TKD.repeat_interleave(shared, dim=-2),
        mask=seen_TT[..., None, :, :],
        scale=scale,
    )
