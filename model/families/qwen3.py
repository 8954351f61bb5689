"""Qwen3, the dense ones: no biases, but a norm on each query and key head."""

from __future__ import annotations

from dataclasses import replace

from model.config import ModelConfig
from model.families import Family
from model.families.hugging_face import (
    LLAMA_NAMES,
    OUT_BIAS_NAMES,
    QKV_BIAS_NAMES,
    Config,
    flag,
    llama_like,
    refuse,
    windowed,
)
from model.families.qwen2 import upper_layers


def configure(config: Config) -> ModelConfig:
    """Raises ValueError for what the network does not have."""
    refuse(config, mlp_bias=(None, False))
    attention_bias = flag(config, "attention_bias")
    model = replace(
        llama_like({"head_dim": 128, **config}, family="qwen3"),
        qk_norm=True,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
    )
    return windowed(model, config, sliding=upper_layers(config))


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    configure=configure,
    names={
        **LLAMA_NAMES,
        **QKV_BIAS_NAMES,
        **OUT_BIAS_NAMES,
        "model.layers.{i}.self_attn.q_norm.weight": "blocks.{i}.attention.q_norm.weight",
        "model.layers.{i}.self_attn.k_norm.weight": "blocks.{i}.attention.k_norm.weight",
    },
    prefix="model.",
)
