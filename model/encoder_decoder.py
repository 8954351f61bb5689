"""EncoderDecoder: a decoder that also attends to the states of an encoder (arXiv 1706.03762).

The encoder reads a source in both directions, once. From its states each block of the decoder
computes keys and values; all tokens of the decoder's text meet these in cross-attention.

    forward(tokens, sources)            whole texts, trainable
    step(batch, cache, attention)       one step of serving: the keys and values of a source lie in
                                        blocks of the paged cache, like those of the decoder's text

Both networks are `Transformer`s and share the embedding. Legend: `model.batch`; U: source tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from model.attention import Attention as PagedAttention
from model.attention.gathered import Gathered
from model.batch import Batch, SourceBatch
from model.config import ModelConfig
from model.kvcache import KVCache, slots_of
from model.layers import fused
from model.transformer import Attend, CrossAttention, Transformer, hidden_pairs

Memory = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of a source, each [..., U, K, D], per layer of the decoder."""


class EncoderDecoder(Transformer):
    """The decoder, and within it the encoder. Raises ValueError for a configuration without one."""

    def __init__(self, config: ModelConfig) -> None:
        if config.encoder is None:
            raise ValueError("the configuration has no encoder")
        super().__init__(config)
        self.encoder = Transformer(config.encoder)
        self.encoder.embed = self.embed

    def translate(
        self,
        tokens_NT: torch.Tensor,
        sources_NU: torch.Tensor,
        lengths_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The residual stream of texts, [..., T, C], given their sources; differentiable.

        lengths: of the sources, if they are padded on the right.
        """
        seen = None
        if lengths_N is not None:
            seen = torch.arange(sources_NU.shape[-1], device=lengths_N.device) < lengths_N[:, None]
            seen = seen[:, None, None]
        memory = self.memory(self.encode(sources_NU, seen))
        T = tokens_NT.shape[-1]
        positions_T = torch.arange(T, device=tokens_NT.device)
        later = hidden_pairs(T, None, causal=True, device=tokens_NT.device)
        mask = _mask(self.score_bias(positions_T, positions_T), ~later)

        def recall(q_THD: torch.Tensor, *, layer: int, scale: float) -> torch.Tensor:
            return fused(q_THD, *memory[layer], mask=seen, scale=scale)

        return self.hidden(tokens_NT, positions_T, attend=masked(mask), recall=recall)

    def encode(self, sources_NU: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """The encoder's states, [..., U, C]. seen: None: every token attends to all."""
        positions_U = torch.arange(sources_NU.shape[-1], device=sources_NU.device)
        mask = _mask(self.encoder.score_bias(positions_U, positions_U), seen)
        states = self.encoder.hidden(sources_NU, positions_U, attend=masked(mask))
        normed: torch.Tensor = self.encoder.norm(states)
        return normed

    def memory(self, states_UC: torch.Tensor) -> Memory:
        """What the decoder keeps of a source."""
        crosses = (block.get_submodule("cross") for block in self.blocks)
        return [each.keys_values(states_UC) for each in crosses if isinstance(each, CrossAttention)]

    def step(self, batch: Batch, cache: KVCache, attention: PagedAttention) -> torch.Tensor:  # noqa: ARG002 - scores with a bias need another
        """One step of serving: encodes new sources, stores keys and values of these and of the
        step's tokens, and returns the tokens' states [T, C].
        """
        sources = batch.sources
        if sources is None:
            raise ValueError("a step of an encoder-decoder has sources")
        device = self.embed.weight.device
        self._encode_new(sources, cache)
        size = cache.block_size
        own = Gathered(
            batch,
            batch.block_table_SB,
            batch.context_lens_S,
            block_size=size,
            device=device,
            bias=self.score_bias,
            causal=True,
        )
        others = Gathered(batch, sources.table_SB, sources.lens_S, block_size=size, device=device)
        slots_T = cache.slots(batch)

        def attend(
            q_THD: torch.Tensor,
            k_TKD: torch.Tensor,
            v_TKD: torch.Tensor,
            *,
            layer: int,
            scale: float,
            window: int | None,  # noqa: ARG001 - no such model has one
        ) -> torch.Tensor:
            return own.attend(q_THD, *cache.store(layer, slots_T, k_TKD, v_TKD), scale=scale)

        def recall(q_THD: torch.Tensor, *, layer: int, scale: float) -> torch.Tensor:
            return others.attend(q_THD, *cache.layer(layer), scale=scale)

        tokens_T = torch.tensor(batch.tokens_T, device=device)
        positions_T = torch.tensor(batch.positions_T, device=device)
        return self.hidden(tokens_T, positions_T, attend=attend, recall=recall)

    def _encode_new(self, sources: SourceBatch, cache: KVCache) -> None:
        """Each source alone, so that its bits do not depend on others."""
        device, start = self.embed.weight.device, 0
        for row in np.flatnonzero(sources.is_new_S).tolist():
            end = start + int(sources.lens_S[row])
            tokens_U = torch.tensor(sources.tokens_U[start:end], device=device)
            positions_U = np.arange(end - start)
            slots = slots_of(sources.table_SB[row], positions_U, block_size=cache.block_size)
            slots_U = torch.from_numpy(slots).to(device)
            for layer, (k_UKD, v_UKD) in enumerate(self.memory(self.encode(tokens_U))):
                cache.store(layer, slots_U, k_UKD, v_UKD)
            start = end


def network_of(config: ModelConfig) -> Transformer:
    """A network of this configuration, with or without an encoder."""
    return Transformer(config) if config.encoder is None else EncoderDecoder(config)


def masked(mask: torch.Tensor | None) -> Attend:
    """Attention over whole texts with a mask, of truth values or to be added to the scores."""

    def attend(
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        *,
        layer: int,  # noqa: ARG001 - without a cache, layers need no telling apart
        scale: float,
        window: int | None,  # noqa: ARG001 - no such model has one
    ) -> torch.Tensor:
        return fused(q_THD, k_TKD, v_TKD, mask=mask, scale=scale)

    return attend


def _mask(bias: torch.Tensor | None, seen: torch.Tensor | None) -> torch.Tensor | None:
    """Both in one."""
    if bias is None or seen is None:
        return seen if bias is None else bias
    return bias.masked_fill(~seen, -torch.inf)
