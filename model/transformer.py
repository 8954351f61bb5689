"""The network, top to bottom: Transformer, Block, Attention, MLP, Scores, and self-attention.

A decoder turns each token into a vector of C numbers, the *residual stream*, and lets every block
add to it twice: attention brings in what earlier tokens hold, the MLP works on each token alone.
From the last state of a token the head reads how likely each word of the vocabulary comes next
(Vaswani et al., arXiv 1706.03762; the norm stands before each sublayer, as in GPT-2 and Llama).
An encoder lets each token attend to all others (BERT: Devlin et al., arXiv 1810.04805; its norms
stand behind the sublayers). Its states are pooled to one vector, or scored by a classifier.

There are three ways through the same modules, which differ in how queries meet keys and values:

    forward(tokens)                     whole texts, plain attention, trainable
    states(tokens, types)               the normalised states of one whole text, to be pooled
    step(batch, cache, attention)       one step of serving: K and V go to the paged cache, and the
                                        queries attend to what lies there

Parameters carry the canonical names of `model.families`. Legend: `model.batch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import nn

from model.attention import Attention as PagedAttention
from model.batch import Batch
from model.config import Classifier, ModelConfig, Position
from model.kvcache import KVCache
from model.layers import (
    RMSNorm,
    Rotation,
    activate,
    buckets,
    embedding,
    fused,
    norm_layer,
    rotate,
    rotation,
    sinusoids,
)


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


class Recall(Protocol):
    """How one layer's queries meet the keys and values of a source; returns [..., T, H, D]."""

    def __call__(self, q_THD: torch.Tensor, *, layer: int, scale: float) -> torch.Tensor: ...


class Transformer(nn.Module):
    """Embedding, blocks, last norm, and a head or a classifier.

    With cross-attention in its blocks it is the decoder of `model.encoder_decoder`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, C, V = config, config.hidden_size, config.vocab_size
        learned = config.position is Position.LEARNED
        self.embed = embedding(V, C)
        rows = config.max_model_len + config.position_offset
        self.position = embedding(rows, C) if learned else None
        relative = config.position is Position.RELATIVE
        self.distances = embedding(config.num_buckets, config.num_heads) if relative else None
        self.types = embedding(config.num_types, C) if config.num_types else None
        self.embed_norm = norm_layer(config) if config.embed_norm else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = norm_layer(config) if config.final_norm else nn.Identity()
        self.head: nn.Module | None = None if config.tied_head else nn.Linear(C, V, bias=False)
        self.head_bias = nn.Parameter(torch.zeros(1, V)) if config.head_bias else None
        self.classifier = Scores(config, config.classifier) if config.classifier else None

    def forward(self, tokens_NT: torch.Tensor) -> torch.Tensor:
        """Logits [..., T, V] of texts [..., T] that each start at position 0; differentiable."""
        positions_T = torch.arange(tokens_NT.shape[-1], device=tokens_NT.device)
        return self.logits(self.hidden(tokens_NT, positions_T, attend=self._whole(plain_attention)))

    def states(self, tokens_T: torch.Tensor, types_T: torch.Tensor | None = None) -> torch.Tensor:
        """The states of one text's tokens after the last norm, [T, C]. types: None: all 0."""
        positions_T = torch.arange(len(tokens_T), device=tokens_T.device)
        x_TC = self.hidden(tokens_T, positions_T, types_T, attend=self._whole(fused_attention))
        states_TC: torch.Tensor = self.norm(x_TC)
        return states_TC

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
        self,
        tokens_T: torch.Tensor,
        positions_T: torch.Tensor,
        types_T: torch.Tensor | None = None,
        *,
        attend: Attend,
        recall: Recall | None = None,
    ) -> torch.Tensor:
        """The residual stream after the last block, [..., T, C]."""
        config = self.config
        x_TC: torch.Tensor = self.embed(tokens_T)
        if config.embed_scale != 1:
            x_TC = x_TC * config.embed_scale
        tables = local = None
        if config.position is Position.ROTARY:  # position as an angle, inside attention
            tables = local = rotation(positions_T, config)
            if config.window_rope_theta is not None:
                local = rotation(positions_T, config, theta=config.window_rope_theta)
        elif self.position is not None:  # position as a vector, added to the token's
            x_TC = x_TC + self.position(positions_T + config.position_offset)
        elif config.position is Position.SINUSOIDAL:
            x_TC = x_TC + sinusoids(positions_T, config.hidden_size).to(x_TC.dtype)
        if self.types is not None:
            x_TC = x_TC + self.types(torch.zeros_like(tokens_T) if types_T is None else types_T)
        if self.embed_norm is not None:
            x_TC = self.embed_norm(x_TC)
        for layer, block in enumerate(self.blocks):
            turned = tables if config.window(layer) is None else local
            x_TC = block(x_TC, turned, attend, recall)
        return x_TC

    def score_bias(self, queries_T: torch.Tensor, keys_S: torch.Tensor) -> torch.Tensor | None:
        """What relative positions [..., T] and [..., S] add to the scores, [..., H, T, S]."""
        if self.distances is None:
            return None
        ago = queries_T[..., :, None] - keys_S[..., None, :]
        bias: torch.Tensor = self.distances(buckets(ago, self.config))
        return bias.movedim(-1, -3)

    def _whole(self, attend: Callable[..., torch.Tensor]) -> Attend:
        """Attention over whole texts in this network's direction."""
        return partial(attend, causal=not self.config.bidirectional)

    def logits(self, x_RC: torch.Tensor) -> torch.Tensor:
        """Unnormalised log probabilities of the next token, [..., R, V]."""
        x_RC = self.norm(x_RC)
        if self.config.head_scale != 1:
            x_RC = x_RC * self.config.head_scale
        if self.head is None:  # tied: the score of a token is the product with its embedding
            logits_RV = nn.functional.linear(x_RC, self.embed.weight)
        else:
            logits_RV = self.head(x_RC)
        return logits_RV if self.head_bias is None else logits_RV + self.head_bias


class Block(nn.Module):
    """Residual sublayers: attention across tokens, the MLP on each token, and between them, in the
    decoder of an encoder-decoder, attention to the source.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        own_norm = config.has_attention_norm(layer)
        self.post_norm = config.post_norm
        self.attention_norm = norm_layer(config) if own_norm else nn.Identity()
        self.attention = Attention(config, layer)
        self.cross_norm = norm_layer(config) if config.encoder else None
        self.cross = CrossAttention(config, layer) if config.encoder else None
        self.mlp_norm = norm_layer(config)
        self.mlp = GatedMLP(config) if config.gated_mlp else MLP(config)

    def forward(
        self,
        x_TC: torch.Tensor,
        tables: Rotation | None,
        attend: Attend,
        recall: Recall | None = None,
    ) -> torch.Tensor:
        if self.post_norm:
            x_TC = self.attention_norm(x_TC + self.attention(x_TC, tables, attend))
            if self.cross is not None and self.cross_norm is not None and recall is not None:
                x_TC = self.cross_norm(x_TC + self.cross(x_TC, recall))
            z_TC: torch.Tensor = self.mlp_norm(x_TC + self.mlp(x_TC))
            return z_TC
        x_TC = x_TC + self.attention(self.attention_norm(x_TC), tables, attend)
        if self.cross is not None and self.cross_norm is not None and recall is not None:
            x_TC = x_TC + self.cross(self.cross_norm(x_TC), recall)
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
        # Keeps the products' variance at 1 whatever D is; T5's weights do that.
        self.scale = 1 / math.sqrt(D) if config.scaled_scores else 1.0
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


class CrossAttention(nn.Module):
    """Attention of the decoder's tokens to the states of the source's tokens."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.layer = layer
        self.head_dim = D
        self.scale = 1 / math.sqrt(D) if config.scaled_scores else 1.0
        self.q = nn.Linear(C, config.query_size, bias=config.qkv_bias)
        self.kv = nn.Linear(C, 2 * config.kv_size, bias=config.qkv_bias)
        self.out = nn.Linear(config.query_size, C, bias=config.out_bias)

    def keys_values(self, states_SC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a source, each [..., S, K, D]: computed once, used by all tokens."""
        kv = self.kv(states_SC).unflatten(-1, (2, -1, self.head_dim))
        return kv[..., 0, :, :], kv[..., 1, :, :]

    def forward(self, x_TC: torch.Tensor, recall: Recall) -> torch.Tensor:
        q_THD = self.q(x_TC).unflatten(-1, (-1, self.head_dim))
        y_TC: torch.Tensor = self.out(recall(q_THD, layer=self.layer, scale=self.scale).flatten(-2))
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


class Scores(nn.Module):
    """The classifier: a pooled state's logits, one per label."""

    def __init__(self, config: ModelConfig, shape: Classifier) -> None:
        super().__init__()
        C = config.hidden_size
        self.kind = shape.activation
        self.dense = nn.Linear(C, C, bias=shape.bias) if shape.dense else None
        self.norm = norm_layer(config) if shape.norm else None
        self.out = nn.Linear(C, len(shape.labels), bias=shape.out_bias)

    def forward(self, x_C: torch.Tensor) -> torch.Tensor:
        if self.dense is not None:
            x_C = activate(self.dense(x_C), self.kind)
        if self.norm is not None:
            x_C = self.norm(x_C)
        logits: torch.Tensor = self.out(x_C)
        return logits


def plain_attention(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    *,
    layer: int,  # noqa: ARG001 - without a cache, layers need no telling apart
    scale: float,
    window: int | None,
    causal: bool = True,
) -> torch.Tensor:
    """softmax(q · kᵀ · scale + mask) · v over whole texts: self-attention as defined."""
    weights = attention_weights(q_THD, k_TKD, scale=scale, window=window, causal=causal)
    return mixed(weights, v_TKD)


def fused_attention(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    *,
    layer: int,  # noqa: ARG001 - as above
    scale: float,
    window: int | None,
    causal: bool = True,
    lengths_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in one call of torch, which keeps no weights, of a text or a batch [N, T, H, D].

    lengths: of texts that are padded on the right, if their attention is bidirectional: a later
    token is seen there, padding is not.
    """
    T, H = q_THD.shape[-3:-1]
    shared = H // k_TKD.shape[-2]
    plain = lengths_N is None and (window is None or window >= T)
    seen = None if plain else ~hidden_pairs(T, window, causal=causal, device=q_THD.device)
    if lengths_N is not None:
        real_NT = torch.arange(T, device=q_THD.device) < lengths_N[:, None]
        seen = real_NT[:, None, None] if seen is None else seen & real_NT[:, None, None]
    return fused(
        q_THD,
        k_TKD.repeat_interleave(shared, dim=-2),
        v_TKD.repeat_interleave(shared, dim=-2),
        mask=seen,
        causal=causal and plain,
        scale=scale,
    )


def hidden_pairs(T: int, window: int | None, *, causal: bool, device: torch.device) -> torch.Tensor:
    """Which tokens s a token t does not see, [T, T], as t, s."""
    ago = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
    # Causal mask: a token sees itself and what came before, within the window if there is one.
    hidden = ago < 0 if causal else torch.zeros_like(ago, dtype=torch.bool)
    return hidden if window is None else hidden | (ago.abs() >= window)


def attention_weights(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    causal: bool = True,
) -> torch.Tensor:
    """How much each token attends to each, [..., K, H / K, T, T] in float32; a row's sum is 1.

    Letters of the sums: t asks, s answers, k is a key head, g a query head of its group.
    """
    T, K, D = k_TKD.shape[-3:]
    grouped = q_THD.reshape(*q_THD.shape[:-2], K, -1, D)
    # Scaled dot product: how well does what s offers fit what t asks?
    scores = torch.einsum("...tkgd,...skd->...kgts", grouped, k_TKD) * scale
    hidden = hidden_pairs(T, window, causal=causal, device=q_THD.device)
    return scores.float().masked_fill(hidden, -torch.inf).softmax(dim=-1)


def mixed(weights: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
    """The values averaged by attention weights, [..., T, H, D]."""
    weights = weights.to(v_TKD.dtype)
    return torch.einsum("...kgts,...skd->...tkgd", weights, v_TKD).flatten(-3, -2)
