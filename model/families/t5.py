"""T5 and mT5: relative positions, RMSNorm, no biases; an MLP with ReLU, or since 1.1 a gated one.

Config fields: `T5Config` of transformers (Raffel et al., arXiv 1910.10683; arXiv 2002.05202).
"""

from __future__ import annotations

from dataclasses import replace

from model.config import Activation, ModelConfig, Position
from model.families import Family
from model.families.hugging_face import Config, flag, id_of, real, refuse, whole

# feed_forward_proj -> activation, gated
_MLPS = {
    "relu": (Activation.RELU, False),
    "gelu": (Activation.GELU, False),
    "gated-gelu": (Activation.GELU_TANH, True),
    "gated-silu": (Activation.SILU, True),
}


def configure(config: Config) -> ModelConfig:
    """Raises ValueError for what the network does not have."""
    refuse(config, is_encoder_decoder=(True, None), quantization_config=(None,))
    defaults = {
        "n_positions": 512,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    }
    fields = {**defaults, **config}
    kind = fields.get("feed_forward_proj", "relu")
    if kind not in _MLPS:
        raise ValueError(f"feed_forward_proj = {kind!r} is not supported; {', '.join(_MLPS)} are")
    activation, gated = _MLPS[kind]
    hidden, heads = whole(fields, "d_model"), whole(fields, "num_heads")
    layers = whole(fields, "num_layers")
    # Version 1.1 and mT5 have a head of their own, which reads the states as they are.
    tied = flag(fields, "tie_word_embeddings", default=True)
    scaled = tied and fields.get("model_type") != "mt5"
    decoder = ModelConfig(
        family="t5",
        vocab_size=whole(fields, "vocab_size"),
        hidden_size=hidden,
        num_layers=whole({"num_decoder_layers": layers, **fields}, "num_decoder_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=whole(fields, "d_kv"),
        intermediate_size=whole(fields, "d_ff"),
        max_model_len=whole(fields, "n_positions"),
        norm_eps=real(fields, "layer_norm_epsilon", default=1e-6),
        position=Position.RELATIVE,
        activation=activation,
        gated_mlp=gated,
        tied_head=tied,
        scaled_scores=False,
        head_scale=hidden**-0.5 if flag(fields, "scale_decoder_outputs", default=scaled) else 1.0,
        num_buckets=whole(fields, "relative_attention_num_buckets"),
        max_distance=whole(fields, "relative_attention_max_distance"),
        start_ids=(id_of(fields, "decoder_start_token_id", "pad_token_id", default=0),),
        end_id=id_of(fields, "eos_token_id", default=1),
    )
    encoder = replace(decoder, num_layers=layers, bidirectional=True, tied_head=True, start_ids=())
    return replace(decoder, encoder=encoder)


def _attention(theirs: str, ours: str) -> dict[str, str | None]:
    parts = {"q": "q", "k": "k", "v": "v", "o": "out"}
    return {f"{theirs}.{part}.weight": f"{ours}.{name}.weight" for part, name in parts.items()}


def _stack(name: str, prefix: str, *, mlp: int) -> dict[str, str | None]:
    """Names of the encoder or the decoder; `mlp`: the number of its last sublayer."""
    layer, block = f"{name}.block.{{i}}.layer", f"{prefix}blocks.{{i}}"
    dense = f"{layer}.{mlp}.DenseReluDense"
    return {
        f"{name}.embed_tokens.weight": None,  # the shared one
        f"{layer}.0.SelfAttention.relative_attention_bias.weight": f"{prefix}distances.weight",
        **_attention(f"{layer}.0.SelfAttention", f"{block}.attention"),
        f"{layer}.0.layer_norm.weight": f"{block}.attention_norm.weight",
        f"{dense}.wi.weight": f"{block}.mlp.up.weight",
        f"{dense}.wi_0.weight": f"{block}.mlp.gate.weight",
        f"{dense}.wi_1.weight": f"{block}.mlp.up.weight",
        f"{dense}.wo.weight": f"{block}.mlp.down.weight",
        f"{layer}.{mlp}.layer_norm.weight": f"{block}.mlp_norm.weight",
        f"{name}.final_layer_norm.weight": f"{prefix}norm.weight",
    }


FAMILY = Family(
    name="t5",
    model_types=("t5", "mt5"),
    configure=configure,
    # transformers writes tie_word_embeddings = true for models of both kinds.
    own_head="lm_head.weight",
    names={
        "shared.weight": "embed.weight",
        "lm_head.weight": "head.weight",
        **_stack("encoder", "encoder.", mlp=1),
        **_stack("decoder", "", mlp=2),
        **_attention("decoder.block.{i}.layer.1.EncDecAttention", "blocks.{i}.cross"),
        "decoder.block.{i}.layer.1.layer_norm.weight": "blocks.{i}.cross_norm.weight",
        "decoder.block.{i}.layer.1.EncDecAttention.relative_attention_bias.weight": None,
    },
)
