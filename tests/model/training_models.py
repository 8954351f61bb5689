"""Tiny random models of the families, as bases of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.families import family_of
from model.training.folder import Base
from tests.support.builders import tiny_weights

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}
FIELDS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": {**SIZES, "sliding_window": 5},
    "qwen2": SIZES,
    "qwen3": {**SIZES, "tie_word_embeddings": True},
    "smollm3": SIZES,
    "gpt2": GPT2,
}
BERT = {
    name: size for name, size in SIZES.items() if name not in ("head_dim", "num_key_value_heads")
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": {**BERT, "pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {
        "vocab_size": 97,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 64,
    },
    "nomic_bert": BERT,
    "modernbert": {
        **BERT,
        "local_attention": 6,
        "global_attn_every_n_layers": 2,
        "pad_token_id": 0,
    },
}


def tiny_base(family: str, *, seed: int = 0, **sizes: int) -> Base:
    """A random model of a family, as if it had been read from a folder; `sizes` replace fields."""
    fields = {"model_type": family, **(FIELDS | ENCODERS)[family], **sizes}
    found = family_of(family)
    config = found.configure(fields)
    return Base(
        fields=fields,
        family=found,
        config=config,
        weights=tiny_weights(config, seed=seed),
        dtype=torch.float32,
        files=Path(),
        digest=f"{family}-{seed}",
    )
