"""GPT-2: learned positions, LayerNorm, biases everywhere, a plain GELU MLP, a tied head.

Checkpoints come with and without the prefix `transformer.`; their matrices are [in, out].
"""

from __future__ import annotations

from model.config import Activation, ModelConfig, Norm, Position
from model.families import Family
from model.families.hugging_face import (
    Config,
    flag,
    last_token_classifier,
    real,
    refuse,
    whole,
)

_NAMES: dict[str, str | tuple[str, ...] | None] = {
    "wte.weight": "embed.weight",
    "wpe.weight": "position.weight",
    "h.{i}.ln_1.weight": "blocks.{i}.attention_norm.weight",
    "h.{i}.ln_1.bias": "blocks.{i}.attention_norm.bias",
    "h.{i}.attn.c_attn.weight": tuple(f"blocks.{{i}}.attention.{p}.weight" for p in "qkv"),
    "h.{i}.attn.c_attn.bias": tuple(f"blocks.{{i}}.attention.{p}.bias" for p in "qkv"),
    "h.{i}.attn.c_proj.weight": "blocks.{i}.attention.out.weight",
    "h.{i}.attn.c_proj.bias": "blocks.{i}.attention.out.bias",
    "h.{i}.attn.bias": None,  # the causal mask
    "h.{i}.attn.masked_bias": None,
    "h.{i}.ln_2.weight": "blocks.{i}.mlp_norm.weight",
    "h.{i}.ln_2.bias": "blocks.{i}.mlp_norm.bias",
    "h.{i}.mlp.c_fc.weight": "blocks.{i}.mlp.up.weight",
    "h.{i}.mlp.c_fc.bias": "blocks.{i}.mlp.up.bias",
    "h.{i}.mlp.c_proj.weight": "blocks.{i}.mlp.down.weight",
    "h.{i}.mlp.c_proj.bias": "blocks.{i}.mlp.down.bias",
    "ln_f.weight": "norm.weight",
    "ln_f.bias": "norm.bias",
}
_PREFIX = "transformer."
_MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def configure(config: Config) -> ModelConfig:
    """Raises ValueError for what the network does not have."""
    refuse(
        config,
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
        quantization_config=(None,),
    )
    hidden, heads = whole(config, "n_embd"), whole(config, "n_head")
    wide = 4 * hidden if config.get("n_inner") is None else whole(config, "n_inner")
    return ModelConfig(
        family="gpt2",
        vocab_size=whole(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=whole(config, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=wide,
        max_model_len=whole(config, "n_positions"),
        norm=Norm.LAYER,
        norm_eps=real(config, "layer_norm_epsilon", default=1e-5),
        position=Position.LEARNED,
        activation=Activation.GELU_TANH,
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_head=flag(config, "tie_word_embeddings", default=True),
        classifier=last_token_classifier(config),
    )


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    configure=configure,
    names={
        "lm_head.weight": "head.weight",
        "score.weight": "classifier.out.weight",
        **{_PREFIX + name: ours for name, ours in _NAMES.items()},
    },
    transposed=frozenset(f"{_PREFIX}h.{{i}}.{matrix}.weight" for matrix in _MATRICES),
    prefix=_PREFIX,
)
