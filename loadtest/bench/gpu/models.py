"""Models to measure on a GPU: real shapes, random weights that are generated on access.

Speed does not depend on the values of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from model.config import ModelConfig
from model.packed_weights import is_matrix
from model.transformer import Transformer

QWEN3_600M = ModelConfig(
    family="qwen3",
    vocab_size=151936,
    hidden_size=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=3072,
    max_model_len=4096,
    norm_eps=1e-6,
    rope_theta=1e6,
    qk_norm=True,
    tied_head=True,
)
SMOLLM2_135M = ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    max_model_len=4096,
    rope_theta=1e5,
    tied_head=True,
)
LLAMA31_8B = ModelConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    max_model_len=4096,
    rope_theta=5e5,
)
TINY = ModelConfig(
    family="qwen3",
    vocab_size=97,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=24,
    max_model_len=64,
    qk_norm=True,
    tied_head=True,
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and its name in the tables."""

    name: str
    config: ModelConfig

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that a step reads in bfloat16; of an untied embedding only rows."""
        count = sum(tensor.numel() for tensor in _shapes(self.config).values())
        embedding = self.config.vocab_size * self.config.hidden_size
        return 2 * (count if self.config.tied_head else count - embedding)

    @property
    def float8_weight_bytes(self) -> int:
        """The same with the layers' matrices in float8."""
        shapes = _shapes(self.config)
        return self.weight_bytes - sum(shapes[name].numel() for name in shapes if is_matrix(name))

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of one token over all layers, in bfloat16."""
        return 2 * 2 * self.config.num_layers * self.config.kv_size


class RandomWeights(Mapping[str, torch.Tensor]):
    """Canonical name -> noise, small enough that activations stay in range."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._shapes = _shapes(config)
        self._device = device

    def __getitem__(self, name: str) -> torch.Tensor:
        like = self._shapes[name]
        if like.dim() == 1:
            return torch.ones(like.shape, device=self._device)
        noise = torch.randn(like.shape, device=self._device, dtype=torch.bfloat16)
        return noise.mul_(like.shape[1] ** -0.5)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def hugging_face_config(config: ModelConfig) -> Any:  # noqa: ANN401 - transformers has no types
    """The same shape as a configuration of `transformers`."""
    import transformers

    kinds = {"qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}
    return kinds[config.family](
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_model_len,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_head,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )


def _shapes(config: ModelConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(Transformer(config).state_dict())
