"""How families read a Hugging Face config.json: what Llama and its kin have in common.

A field that asks for something the network does not have is an error which names it; fields that
change nothing about the network are not read. Both spellings of rotary settings are understood:
`rope_theta` with `rope_scaling`, and `rope_parameters`, which has both in one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import (
    MAX_LAYERS,
    MAX_SIZE,
    Classifier,
    LinearScaling,
    ModelConfig,
    Pooling,
    Problem,
    RopeScaling,
)

Config = Mapping[str, Any]
MAX_LABELS = 100_000

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
    "score.weight": "classifier.out.weight",
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
    """What all of Llama's kin write alike. `theta` and `tied` apply if the file does not set them.

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
        num_layers=len(layer_numbers(config)),
        num_heads=heads,
        num_kv_heads=heads if silent else whole(config, "num_key_value_heads"),
        head_dim=head_dim,
        intermediate_size=whole(config, "intermediate_size"),
        max_model_len=whole(config, "max_position_embeddings"),
        norm_eps=real(config, "rms_norm_eps", default=1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied_head=flag(config, "tie_word_embeddings", default=tied),
        classifier=last_token_classifier(config),
    )


def whole(config: Config, field: str, *, most: int = MAX_SIZE) -> int:
    """A number that the file must have, from 1 to `most`."""
    value = config.get(field)
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{field} must be a whole number from 1 to {most}")
    return value


def real(config: Config, field: str, *, default: float | None = None) -> float:
    """A finite number above 0. Without a `default` the file must have it."""
    value: Any = config.get(field)
    if value is None and default is not None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"{field} must be a finite number above 0")
    return float(value)


def id_of(config: Config, *fields: str, default: int | None = None) -> int:
    """The token that the first of the fields which is set names, or else `default`."""
    value = next((config[name] for name in fields if config.get(name) is not None), default)
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise ValueError(f"{fields[0]} must be a token's id")
    return value


def flag(config: Config, field: str, *, default: bool = False) -> bool:
    """True or false, `default` if the file is silent."""
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{field} must be true or false")
    return default if value is None else value


def layer_numbers(config: Config) -> range:
    """The numbers of all layers."""
    return range(whole(config, "num_hidden_layers", most=MAX_LAYERS))


def refuse(config: Config, **accepted: tuple[object, ...]) -> None:
    """Raises ValueError for a field that is there with another value than the accepted ones."""
    for field, values in accepted.items():
        if field in config and config[field] not in values:
            raise ValueError(f"{field} = {config[field]!r} is not supported")


def rotary(config: Config, *, theta: float) -> tuple[float, RopeScaling | LinearScaling | None]:
    """Base and scaling of the rotary frequencies, from either spelling."""
    field, settings = _rotary_settings(config)
    for place in (config, settings):
        refuse(place, partial_rotary_factor=(None, 1, 1.0))
    base = real(settings, "rope_theta", default=real(config, "rope_theta", default=theta))
    try:
        return base, _rotary_scaling(settings)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _rotary_settings(config: Config) -> tuple[str, Config]:
    """The field that has the settings, and these. Both fields may be there if they agree."""
    found: dict[str, Config] = {}
    for field in ("rope_parameters", "rope_scaling"):
        settings = config.get(field)
        if settings is not None and not isinstance(settings, Mapping):
            raise ValueError(f"{field} must be an object")
        if any(isinstance(value, Mapping) for value in (settings or {}).values()):
            raise ValueError(f"{field} of each kind of layer are not supported")
        if settings:
            found[field] = settings
    meanings = [
        {name: value for name, value in settings.items() if name not in ("rope_theta", "type")}
        | {"rope_type": _rotary_kind(settings)}
        for settings in found.values()
    ]
    thetas = {settings["rope_theta"] for settings in found.values() if "rope_theta" in settings}
    if meanings[1:] and (meanings[0] != meanings[1] or len(thetas) > 1):
        raise ValueError("rope_parameters and rope_scaling differ; remove one of them")
    return next(iter(found.items()), ("rope_parameters", {}))


def _rotary_kind(settings: Config) -> object:
    return settings.get("rope_type", settings.get("type", "default"))


def _rotary_scaling(settings: Config) -> RopeScaling | LinearScaling | None:
    kind = _rotary_kind(settings)
    if kind == "default":
        if settings.get("factor") not in (None, 1):
            raise ValueError("there is a factor and no rope_type")
        return None
    if kind == "linear":
        return LinearScaling(factor=real(settings, "factor"))
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported; linear and llama3 are")
    return RopeScaling(
        factor=real(settings, "factor"),
        low_freq_factor=real(settings, "low_freq_factor"),
        high_freq_factor=real(settings, "high_freq_factor"),
        original_max_position=whole(settings, "original_max_position_embeddings"),
    )


def classifier(config: Config, *architectures: str) -> Classifier | None:
    """The head of a sequence classifier, with the family's defaults; None if it has none."""
    named = config.get("architectures")
    if not isinstance(named, list) or not set(named) & set(architectures):
        return None
    by_id = config.get("id2label")
    if not isinstance(by_id, Mapping):
        count = whole({"num_labels": 2, **config}, "num_labels", most=MAX_LABELS)
        by_id = {str(index): f"LABEL_{index}" for index in range(count)}
    if not 1 <= len(by_id) <= MAX_LABELS or set(by_id) != set(map(str, range(len(by_id)))):
        raise ValueError(f"id2label must name the labels 0, 1, ...; at most {MAX_LABELS}")
    labels = tuple(str(by_id[str(index)]) for index in range(len(by_id)))
    stated = config.get("problem_type")
    if stated is not None and stated not in set(Problem):
        raise ValueError(f"problem_type must be one of {', '.join(Problem)}")
    derived = Problem.REGRESSION if len(labels) == 1 else Problem.SINGLE_LABEL
    return Classifier(
        labels=labels, problem=Problem(stated or derived), sigmoid=_has_sigmoid(config)
    )


def last_token_classifier(config: Config) -> Classifier | None:
    """The head of a decoder's sequence classifier: a matrix on the state of the last token."""
    named = config.get("architectures")
    found = named if isinstance(named, list) else []
    heads = [str(each) for each in found if str(each).endswith("ForSequenceClassification")]
    head = classifier(config, *heads)
    return head and replace(head, pooling=Pooling.LAST, dense=False, out_bias=False)


def _has_sigmoid(config: Config) -> bool:
    """Whether sentence-transformers turns a cross-encoder's logit into a score by a sigmoid."""
    settings = config.get("sentence_transformers")
    stated = settings.get("activation_fn") if isinstance(settings, Mapping) else None
    stated = stated or config.get("sbert_ce_default_activation_function")
    return stated is None or str(stated).rpartition(".")[2] != "Identity"


def full_attention_layers(config: Config, sliding: frozenset[int]) -> frozenset[int]:
    """Layers without the window: as `layer_types` lists them, or all but the `sliding` ones."""
    layers = layer_numbers(config)
    types = config.get("layer_types")
    if types is None:
        return frozenset(layers) - sliding
    if (
        not isinstance(types, list)
        or len(types) != len(layers)
        or set(types) - {"full_attention", "sliding_attention"}
    ):
        raise ValueError("layer_types must list full_attention or sliding_attention per layer")
    return frozenset(layer for layer in layers if types[layer] == "full_attention")


def windowed(model: ModelConfig, config: Config, *, sliding: frozenset[int]) -> ModelConfig:
    """With the window of the families that switch it on by `use_sliding_window`."""
    if not flag(config, "use_sliding_window") or config.get("sliding_window") is None:
        return model
    return replace(
        model,
        sliding_window=whole(config, "sliding_window"),
        full_attention_layers=full_attention_layers(config, sliding),
    )
