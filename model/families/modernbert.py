"""ModernBERT (arXiv 2412.13663): rotary positions, mostly local attention, a gated GELU MLP.

Norms stand before the sublayers; the first one is that of the embeddings. A token of a local layer
sees `local_attention` / 2 tokens on each side; its rotary positions have a theta of their own.
Config fields: `ModernBertConfig` of transformers, of its releases before and since 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from model.config import Classifier, ModelConfig, Norm, Pooling
from model.families import Family
from model.families.bert import activation, both, unneeded
from model.families.hugging_face import (
    Config,
    classifier,
    flag,
    full_attention_layers,
    layer_numbers,
    real,
    refuse,
    whole,
)

_KINDS = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}
_OLD_THETAS = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
_LAYER = "model.layers.{i}"


def configure(config: Config) -> ModelConfig:
    """Raises ValueError for what the network does not have."""
    refuse(config, quantization_config=(None,), rope_scaling=(None,))
    hidden, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    attention_bias = flag(config, "attention_bias")
    period = whole({"global_attn_every_n_layers": 3, **config}, "global_attn_every_n_layers")
    local = frozenset(layer for layer in layer_numbers(config) if layer % period)
    return ModelConfig(
        family="modernbert",
        vocab_size=whole(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=len(layer_numbers(config)),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=whole(config, "intermediate_size"),
        max_model_len=whole({"max_position_embeddings": 8192, **config}, "max_position_embeddings"),
        norm=Norm.LAYER,
        norm_bias=flag(config, "norm_bias"),
        norm_eps=real(config, "norm_eps", default=1e-5),
        rope_theta=_theta(config, "full_attention"),
        window_rope_theta=_theta(config, "sliding_attention"),
        activation=activation(config, "hidden_activation"),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias"),
        tied_head=True,
        bidirectional=True,
        embed_norm=True,
        sliding_window=whole({"local_attention": 128, **config}, "local_attention") // 2 + 1,
        full_attention_layers=full_attention_layers(config, local),
        classifier=_classifier(config),
    )


def _theta(config: Config, kind: str) -> float:
    """The base of the rotary frequencies of a kind of layer, from either spelling."""
    settings = config.get("rope_parameters") or {}
    own = settings.get(kind) if isinstance(settings, Mapping) else None
    if own is not None and not isinstance(own, Mapping):
        raise ValueError(f"rope_parameters: {kind} must be an object")
    own = own or {}
    refuse(own, rope_type=("default",), factor=(None,))
    return real(own, "rope_theta", default=real(config, _OLD_THETAS[kind], default=_KINDS[kind]))


def _classifier(config: Config) -> Classifier | None:
    head = classifier(config, "ModernBertForSequenceClassification")
    pooling = config.get("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise ValueError("classifier_pooling must be cls or mean")
    return head and replace(
        head,
        pooling=Pooling(pooling),
        bias=flag(config, "classifier_bias"),
        activation=activation(config, "classifier_activation"),
        norm=True,
    )


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"blocks.{{i}}.attention.{part}.{kind}" for part in "qkv")


def _gated(kind: str) -> tuple[str, ...]:
    return tuple(f"blocks.{{i}}.mlp.{part}.{kind}" for part in ("gate", "up"))


FAMILY = Family(
    name="modernbert",
    model_types=("modernbert",),
    configure=configure,
    names={
        "model.embeddings.tok_embeddings.weight": "embed.weight",
        **both("model.embeddings.norm", "embed_norm"),
        **both(f"{_LAYER}.attn_norm", "blocks.{i}.attention_norm"),
        **{f"{_LAYER}.attn.Wqkv.{kind}": _qkv(kind) for kind in ("weight", "bias")},
        **both(f"{_LAYER}.attn.Wo", "blocks.{i}.attention.out"),
        **both(f"{_LAYER}.mlp_norm", "blocks.{i}.mlp_norm"),
        **{f"{_LAYER}.mlp.Wi.{kind}": _gated(kind) for kind in ("weight", "bias")},
        **both(f"{_LAYER}.mlp.Wo", "blocks.{i}.mlp.down"),
        **both("model.final_norm", "norm"),
        **both("head.dense", "classifier.dense"),
        **both("head.norm", "classifier.norm"),
        **both("classifier", "classifier.out"),
        **unneeded("decoder"),
    },
    prefix="model.",
)
