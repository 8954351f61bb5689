"""How families read a Hugging Face config.json: what Llama and its kin have in common.

A field that asks for something the network does not have is an error which names it; fields that
change nothing about the network are not read. Both spellings of rotary settings are understood:
`rope_theta` with `rope_scaling`, and `rope_parameters`, which has both in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import ModelConfig, RopeScaling

Config = Mapping[str, Any]

LLAMA_NAMES: Mapping[str, str | None] = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.weight": "blocks.{i}.attention_norm.weight",
    "model.layers.{i}.self_attn.q_proj.weight": "blocks.{i}.attention.q.weight",
    "model.layers.{i}.self_attn.k_proj.weight": "blocks.{i}.attention.k.weight",
    "model.layers.{i}.self_attn.v_proj.weight": "blocks.{i}.attention.v.weight",
    "model.layers.{i}.self_attn.o_proj.weight": "blocks.{i}.attention.out.weight",
    "model.layers.{i}.self_attn.rotary_emb.inv_freq": None,
    "model.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.mlp_norm.weight",
    "model.layers.{i}.mlp.gate_proj.weight": "blocks.{i}.mlp.gate.weight",
    "model.layers.{i}.mlp.up_proj.weight": "blocks.{i}.mlp.up.weight",
    "model.layers.{i}.mlp.down_proj.weight": "blocks.{i}.mlp.down.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}

QKV_BIAS_NAMES: Mapping[str, str] = {
    f"model.layers.{{i}}.self_attn.{part}_proj.bias": f"blocks.{{i}}.attention.{part}.bias"
    for part in ("q", "k", "v")
}

OUT_BIAS_NAMES: Mapping[str, str] = {
    "model.layers.{i}.self_attn.o_proj.bias": "blocks.{i}.attention.out.bias"
}

MLP_BIAS_NAMES: Mapping[str, str] = {
    f"model.layers.{{i}}.mlp.{part}_proj.bias": f"blocks.{{i}}.mlp.{part}.bias"
    for part in ("gate", "up", "down")
}


def llama_like(
    config: Config,
    *,
    family: str,
    theta: float = 10_000.0,
    tied: bool = False,
) -> ModelConfig:
    """What all of Llama's kin write alike. `theta` and `tied` hold where the file is silent.

    Raises ValueError, naming the field, for one that is missing, malformed or not supported.
    """
    refuse(config, hidden_act=("silu",), quantization_config=(None,))
    heads = whole(config, "num_attention_heads")
    hidden = whole(config, "hidden_size")
    head_dim = hidden // heads if config.get("head_dim") is None else whole(config, "head_dim")
    silent = config.get("num_key_value_heads") is None
    rope_theta, rope_scaling = rotary(config, theta=theta)
    return ModelConfig(
        family=family,
        vocab_size=whole(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=whole(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads if silent else whole(config, "num_key_value_heads"),
        head_dim=head_dim,
        intermediate_size=whole(config, "intermediate_size"),
        max_model_len=whole(config, "max_position_embeddings"),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied_head=bool(config.get("tie_word_embeddings", tied)),
    )


def whole(config: Config, field: str) -> int:
    """A number that the file must have."""
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{field} must be a whole number")  # noqa: TRY004 - a value of the file
    return value


def refuse(config: Config, **accepted: tuple[object, ...]) -> None:
    """Raises ValueError for a field that is there with another value than the accepted ones."""
    for field, values in accepted.items():
        if field in config and config[field] not in values:
            raise ValueError(f"{field} = {config[field]!r} is not supported")


def rotary(config: Config, *, theta: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies, from either spelling."""
    refuse(config, partial_rotary_factor=(None, 1, 1.0))
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    settings = config.get(field) or {}
    if any(isinstance(value, Mapping) for value in settings.values()):
        raise ValueError(f"{field} of each kind of layer are not supported")
    kind = settings.get("rope_type", settings.get("type", "default"))
    refuse(settings, partial_rotary_factor=(None, 1, 1.0))
    base = float(settings.get("rope_theta") or config.get("rope_theta") or theta)
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise ValueError(f"{field}: rope type {kind!r} is not supported")
    try:
        return base, RopeScaling(
            factor=float(settings["factor"]),
            low_freq_factor=float(settings["low_freq_factor"]),
            high_freq_factor=float(settings["high_freq_factor"]),
            original_max_position=int(settings["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise ValueError(f"{field} lacks {error}") from error


def full_attention_layers(config: Config, sliding: frozenset[int]) -> frozenset[int]:
    """Layers without the window: as `layer_types` lists them, or all but the `sliding` ones."""
    layers = range(whole(config, "num_hidden_layers"))
    types = config.get("layer_types")
    if types is None:
        return frozenset(layers) - sliding
    if len(types) != len(layers) or set(types) - {"full_attention", "sliding_attention"}:
        raise ValueError("layer_types must say full_attention or sliding_attention for each layer")
    return frozenset(layer for layer in layers if types[layer] == "full_attention")


def windowed(model: ModelConfig, config: Config, *, sliding: frozenset[int]) -> ModelConfig:
    """With the window of the families that switch it on by `use_sliding_window`."""
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return model
    return replace(
        model,
        sliding_window=whole(config, "sliding_window"),
        full_attention_layers=full_attention_layers(config, sliding),
    )
