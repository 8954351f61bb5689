"""The network, top to bottom: Transformer, Block, Attention, MLP, and self-attention itself.

A decoder turns each token into a vector of C numbers, the *residual stream*, and lets every block
add to it twice: attention brings in what earlier tokens hold, the MLP works on each token alone.
From the last state of a token the head reads how likely each word of the vocabulary comes next
(Vaswani et al., arXiv 1706.03762; the norm stands before each sublayer, as in GPT-2 and Llama).

There are two ways through the same modules, which differ only in how queries meet keys and values:

    forward(tokens)                     whole texts, plain causal attention, trainable
    step(batch, cache, attention)       one step of serving: K and V go to the paged cache, and the
                                        queries attend to what lies there

Parameters carry the canonical names of `model.families`. Legend: `model.batch`.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import nn

from model.attention import Attention as PagedAttention
from model.batch import Batch
from model.config import ModelConfig, Position
from model.kvcache import KVCache
from model.layers import RMSNorm, Rotation, activate, norm_layer, rotate, rotation


class Attend(Protocol):
    """How one layer's queries meet keys and values; returns [..., T, H, D]."""

    def __call__(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        *,
        layer: int,
        scale: float,
        window: int | None,
    ) -> torch.Tensor: ...


class Transformer(nn.Module):
    """Embedding, blocks, last norm, head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, V = config.hidden_size, config.vocab_size
        learned = config.position is Position.LEARNED
        self.config = config
        self.embed = nn.Embedding(V, C)
        self.position = nn.Embedding(config.max_model_len, C) if learned else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = norm_layer(config)
        self.head: nn.Module | None = None if config.tied_head else nn.Linear(C, V, bias=False)

    def forward(self, tokens_NT: torch.Tensor) -> torch.Tensor:
        """Logits [..., T, V] of texts [..., T] that each start at position 0; differentiable."""
        positions_T = torch.arange(tokens_NT.shape[-1], device=tokens_NT.device)
        return self.logits(self.hidden(tokens_NT, positions_T, attend=causal_attention))

    def step(self, batch: Batch, cache: KVCache, attention: PagedAttention) -> torch.Tensor:
        """One step of serving: stores the K and V of its tokens, returns their states [T, C]."""
        device = self.embed.weight.device
        tokens_T = torch.tensor(batch.tokens_T, device=device)
        positions_T = torch.tensor(batch.positions_T, device=device)
        slots_T = cache.slots(batch)
        attention.prepare(batch, block_size=cache.block_size, device=device)

        def attend(
            q_THD: torch.Tensor,
            k_TKD: torch.Tensor,
            v_TKD: torch.Tensor,
            *,
            layer: int,
            scale: float,
            window: int | None,
        ) -> torch.Tensor:
            keys_XKD, values_XKD = cache.store(layer, slots_T, k_TKD, v_TKD)
            return attention.attend(q_THD, keys_XKD, values_XKD, scale=scale, window=window)

        return self.hidden(tokens_T, positions_T, attend=attend)

    def hidden(
        self, tokens_T: torch.Tensor, positions_T: torch.Tensor, *, attend: Attend
    ) -> torch.Tensor:
        """The residual stream after the last block, [..., T, C]."""
        x_TC: torch.Tensor = self.embed(tokens_T)
        tables = None
        if self.position is None:  # position as an angle, inside attention
            tables = rotation(positions_T, self.config)
        else:  # position as a vector, added to the token's
            x_TC = x_TC + self.position(positions_T)
        for block in self.blocks:
            x_TC = block(x_TC, tables, attend)
        return x_TC

    def logits(self, x_RC: torch.Tensor) -> torch.Tensor:
        """Unnormalised log probabilities of the next token, [..., R, V]."""
        x_RC = self.norm(x_RC)
        if self.head is None:  # tied: the score of a token is the product with its embedding
            return nn.functional.linear(x_RC, self.embed.weight)
        logits_RV: torch.Tensor = self.head(x_RC)
        return logits_RV


class Block(nn.Module):
    """Two residual sublayers: attention across tokens, then the MLP on each token."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = norm_layer(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = norm_layer(config)
        self.mlp = GatedMLP(config) if config.gated_mlp else MLP(config)

    def forward(self, x_TC: torch.Tensor, tables: Rotation | None, attend: Attend) -> torch.Tensor:
        x_TC = x_TC + self.attention(self.attention_norm(x_TC), tables, attend)
        y_TC: torch.Tensor = x_TC + self.mlp(self.mlp_norm(x_TC))
        return y_TC


class Attention(nn.Module):
    """Self-attention with H query heads, of which each H / K share one key and value head.

    Each token asks a question (query), offers a label (key) and carries a content (value). A head
    is one such conversation in D dimensions; all heads are computed by one fused projection.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        fused = config.query_size + 2 * config.kv_size
        self.layer = layer
        self.heads = (config.num_heads, config.num_kv_heads)
        self.head_dim = D
        self.scale = 1 / math.sqrt(D)  # keeps the products' variance at 1 whatever D is
        self.window = config.window(layer)
        self.rotary = layer not in config.rope_free_layers
        self.qkv = nn.Linear(C, fused, bias=config.qkv_bias)
        self.q_norm = RMSNorm(D, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, eps=config.norm_eps) if config.qk_norm else None
        self.out = nn.Linear(config.query_size, C, bias=config.out_bias)

    def forward(self, x_TC: torch.Tensor, tables: Rotation | None, attend: Attend) -> torch.Tensor:
        H, K = self.heads
        # Queries, keys and values, side by side as heads.
        qkv: torch.Tensor = self.qkv(x_TC)
        qkv = qkv.view(*x_TC.shape[:-1], H + 2 * K, self.head_dim)
        qk, v_TKD = qkv[..., : H + K, :], qkv[..., H + K :, :]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[..., :H, :]), self.k_norm(qk[..., H:, :])), dim=-2)
        # Position: queries and keys are turned, values are not.
        if self.rotary and tables is not None:
            qk = rotate(qk, tables)
        q_THD, k_TKD = qk[..., :H, :], qk[..., H:, :]
        mixed_THD = attend(
            q_THD, k_TKD, v_TKD, layer=self.layer, scale=self.scale, window=self.window
        )
        # What the heads heard, brought together and back into the residual stream.
        y_TC: torch.Tensor = self.out(mixed_THD.flatten(-2))
        return y_TC


class MLP(nn.Module):
    """Applied to each token: up to F, nonlinearity, down to C."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, width = config.hidden_size, config.intermediate_size
        self.kind = config.activation
        self.up = nn.Linear(C, width, bias=config.mlp_bias)
        self.down = nn.Linear(width, C, bias=config.mlp_bias)

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        y_TC: torch.Tensor = self.down(activate(self.up(x_TC), self.kind))
        return y_TC


class GatedMLP(nn.Module):
    """The same with a gate: act(gate · x) decides how much of up · x passes (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, width = config.hidden_size, config.intermediate_size
        self.kind = config.activation
        self.gate_up = nn.Linear(C, 2 * width, bias=config.mlp_bias)
        self.down = nn.Linear(width, C, bias=config.mlp_bias)

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = self.gate_up(x_TC).chunk(2, dim=-1)
        y_TC: torch.Tensor = self.down(activate(gate_TF, self.kind) * up_TF)
        return y_TC


def causal_attention(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    *,
    layer: int,  # noqa: ARG001 - without a cache, layers need no telling apart
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """softmax(q · kᵀ · scale + mask) · v over whole texts: self-attention as defined."""
    return mixed(causal_weights(q_THD, k_TKD, scale=scale, window=window), v_TKD)


def causal_weights(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, *, scale: float, window: int | None
) -> torch.Tensor:
    """How much each token attends to each, [..., K, H / K, T, T] in float32; a row's sum is 1.

    Letters of the sums: t asks, s answers, k is a key head, g a query head of its group.
    """
    T, K, D = k_TKD.shape[-3:]
    grouped = q_THD.reshape(*q_THD.shape[:-2], K, -1, D)
    # Scaled dot product: how well does what s offers fit what t asks?
    scores = torch.einsum("...tkgd,...skd->...kgts", grouped, k_TKD) * scale
    # Causal mask: a token sees itself and what came before, within the window if there is one.
    ago = torch.arange(T, device=q_THD.device)[:, None] - torch.arange(T, device=q_THD.device)
    hidden = ago < 0 if window is None else (ago < 0) | (ago >= window)
    return scores.float().masked_fill(hidden, -torch.inf).softmax(dim=-1)


def mixed(weights: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
    """The values averaged by attention weights, [..., T, H, D]."""
    weights = weights.to(v_TKD.dtype)
    return torch.einsum("...kgts,...skd->...tkgd", weights, v_TKD).flatten(-3, -2)
