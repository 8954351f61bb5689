"""The Transformer that serves, ready to be trained: built, initialised, run over batches."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from model.config import ModelConfig
from model.transformer import Transformer
from model.weights import Weights


def build_network(config: ModelConfig, weights: Weights) -> Transformer:
    """A network with these weights, all of them trainable."""
    with torch.device("meta"):
        network = Transformer(config)
    network.load_state_dict(dict(weights), strict=True, assign=True)
    return network.requires_grad_(requires_grad=True)


def initialised(config: ModelConfig, *, seed: int) -> Transformer:
    """A network with random weights, small enough that its first guess is near uniform.

    As in GPT-2: normal with a standard deviation of 0.02, and what is added to the residual stream
    scaled down by the root of the number of additions.
    """
    network = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith((".out.weight", ".down.weight")):
                parameter.normal_(std=0.02 / math.sqrt(2 * config.num_layers), generator=generator)
            elif parameter.dim() > 1:
                parameter.normal_(std=0.02, generator=generator)
            elif name.endswith(".bias"):
                parameter.zero_()
    return network


def states(network: Transformer, tokens_NT: torch.Tensor) -> torch.Tensor:
    """The residual stream after the last block, [N, T, C]; texts are padded on the right."""
    positions_T = torch.arange(tokens_NT.shape[-1], device=tokens_NT.device)
    return network.hidden(tokens_NT, positions_T, attend=fused_attention)


def fused_attention(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    *,
    layer: int,  # noqa: ARG001 - without a cache, layers need no telling apart
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """`causal_attention` of a batch in one call of torch, which keeps no weights for the gradient.

    Padding stands behind a text, where the text does not see it.
    """
    T, H = q_THD.shape[-3:-1]
    seen = None
    if window is not None and window < T:
        ago = torch.arange(T, device=q_THD.device)[:, None] - torch.arange(T, device=q_THD.device)
        seen = (ago >= 0) & (ago < window)
    q_HTD, k_KTD, v_KTD = (x.transpose(-3, -2) for x in (q_THD, k_TKD, v_TKD))
    mixed_HTD = functional.scaled_dot_product_attention(
        q_HTD,
        k_KTD,
        v_KTD,
        attn_mask=seen,
        is_causal=seen is None,
        scale=scale,
        enable_gqa=k_TKD.shape[-2] != H,
    )
    return mixed_HTD.transpose(-3, -2)


def token_losses(
    network: Transformer, tokens_NT: torch.Tensor, scored_NT: torch.Tensor
) -> torch.Tensor:
    """The sum of -log p of the tokens marked in `scored_NT`, each given those before it.

    The head computes the rows of these alone.
    """
    chosen = scored_NT[:, 1:]
    states_RC = states(network, tokens_NT[:, :-1])[chosen]
    logits_RV = network.logits(states_RC)
    return functional.cross_entropy(logits_RV.float(), tokens_NT[:, 1:][chosen], reduction="sum")
