"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from dataclasses import replace

from model.config import ModelConfig
from model.families import Family
from model.families.hugging_face import (
    LLAMA_NAMES,
    QKV_BIAS_NAMES,
    Config,
    layer_numbers,
    llama_like,
    refuse,
    windowed,
)


def configure(config: Config) -> ModelConfig:
    """Raises ValueError for what the network does not have."""
    refuse(config, attention_bias=(None, True), mlp_bias=(None, False))
    model = replace(llama_like(config, family="qwen2"), qkv_bias=True)
    return windowed(model, config, sliding=upper_layers(config))


def upper_layers(config: Config) -> frozenset[int]:
    """Layers from `max_window_layers` on, which are those that a window applies to."""
    first = config.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        raise ValueError("max_window_layers must be a whole number, not negative")
    return frozenset(layer for layer in layer_numbers(config) if layer >= first)


FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    configure=configure,
    names={**LLAMA_NAMES, **QKV_BIAS_NAMES},
    prefix="model.",
)
