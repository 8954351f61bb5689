"""SmolLM3: Llama with a tied head and every fourth layer free of rotary positions."""

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
    layer_numbers,
    llama_like,
    whole,
    windowed,
)


def configure(config: Config) -> ModelConfig:
    """Raises ValueError for what the network does not have."""
    free = _rope_free_layers(config)
    attention_bias = flag(config, "attention_bias")
    model = replace(
        llama_like(config, family="smollm3", theta=2_000_000.0, tied=True),
        rope_free_layers=free,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias"),
    )
    return windowed(model, config, sliding=free)


def _rope_free_layers(config: Config) -> frozenset[int]:
    """`no_rope_layers` has, despite its name, a 1 for each layer with rotary positions."""
    layers = layer_numbers(config)
    rotary = config.get("no_rope_layers")
    if rotary is None:
        interval = whole({"no_rope_layer_interval": 4, **config}, "no_rope_layer_interval")
        rotary = [(layer + 1) % interval != 0 for layer in layers]
    if not isinstance(rotary, list) or len(rotary) < len(layers) or set(rotary) - {0, 1}:
        raise ValueError("no_rope_layers must have a 0 or 1 for each layer")
    return frozenset(layer for layer in layers if not rotary[layer])


FAMILY = Family(
    name="smollm3",
    model_types=("smollm3",),
    configure=configure,
    names={**LLAMA_NAMES, **QKV_BIAS_NAMES, **OUT_BIAS_NAMES, **MLP_BIAS_NAMES},
    prefix="model.",
)
