"""The Transformer that serves, ready to be trained: built, initialised, run over batches."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.nn import functional

from model.attention.anchored import anchored_attention, seen_pairs
from model.config import ModelConfig
from model.encoder_decoder import network_of
from model.transformer import Attend, Transformer, fused_attention
from model.weights import Weights


def build_network(config: ModelConfig, weights: Weights) -> Transformer:
    """A network with these weights, all of them trainable."""
    with torch.device("meta"):
        network = network_of(config)
    network.load_state_dict(dict(weights), strict=True, assign=True)
    return network.requires_grad_(requires_grad=True)


def initialised(config: ModelConfig, *, seed: int) -> Transformer:
    """A network with random weights, small enough that its first guess is near uniform.

    As in GPT-2: normal with a standard deviation of 0.02, and what is added to the residual stream
    scaled down by the root of the number of additions.
    """
    network = network_of(config)
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


def states(
    network: Transformer,
    tokens_NT: torch.Tensor,
    lengths_N: torch.Tensor | None = None,
    *,
    anchor_ids: frozenset[int] = frozenset(),
) -> torch.Tensor:
    """The residual stream after the last block, [N, T, C]; texts are padded on the right.

    An encoder needs their lengths: its tokens would see the padding. anchor_ids: tokens that end a
    segment, of which later ones see no other token; none: without segments.
    """
    positions_T = torch.arange(tokens_NT.shape[-1], device=tokens_NT.device)
    if anchor_ids:
        ids = torch.tensor(sorted(anchor_ids), device=tokens_NT.device)
        seen_NTT = seen_pairs(torch.isin(tokens_NT, ids))
        attend: Attend = partial(anchored_attention, seen_TT=seen_NTT)
    else:
        bidirectional = network.config.bidirectional
        lengths_N = lengths_N if bidirectional else None
        attend = partial(fused_attention, causal=not bidirectional, lengths_N=lengths_N)
    if tokens_NT.device.type == "cpu":
        attend = partial(_in_float32, attend)
    return network.hidden(tokens_NT, positions_T, attend=attend)


def _in_float32(
    attend: Attend,
    *heads: torch.Tensor,
    layer: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Attention that `--bfloat16` leaves in float32: on CPUs torch's gradient of it in bfloat16
    takes up to four times as long.
    """
    with torch.autocast("cpu", enabled=False):
        q_THD, k_TKD, v_TKD = (each.float() for each in heads)
        return attend(q_THD, k_TKD, v_TKD, layer=layer, scale=scale, window=window)


def token_losses(
    network: Transformer,
    tokens_NT: torch.Tensor,
    scored_NT: torch.Tensor,
    *,
    anchor_ids: frozenset[int] = frozenset(),
) -> torch.Tensor:
    """The sum of -log p of the tokens marked in `scored_NT`, each given those before it.

    The head computes the rows of these alone.
    """
    chosen = scored_NT[:, 1:]
    states_RC = states(network, tokens_NT[:, :-1], anchor_ids=anchor_ids)[chosen]
    logits_RV = network.logits(states_RC)
    return functional.cross_entropy(logits_RV.float(), tokens_NT[:, 1:][chosen], reduction="sum")
