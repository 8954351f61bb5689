"""Llama 1 to 3 and what shares its architecture, SmolLM2 among them."""

from __future__ import annotations

from dataclasses import replace

from model.config import ModelConfig
from model.families import Family
from model.families.hugging_face import (
    LLAMA_NAMES,
    MLP_BIAS_NAMES,
    OUT_BIAS_NAMES,
    QKV_BIAS_NAMES,
    Config,
    flag,
    llama_like,
)


def configure(config: Config) -> ModelConfig:
    """Raises ValueError for what the network does not have."""
    attention_bias = flag(config, "attention_bias")
    return replace(
        llama_like(config, family="llama"),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias"),
    )


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    configure=configure,
    names={**LLAMA_NAMES, **QKV_BIAS_NAMES, **OUT_BIAS_NAMES, **MLP_BIAS_NAMES},
    prefix="model.",
)
