"""BART and Marian: LayerNorm behind the sublayers, one embedding, biases, of the logits, too.

BART (Lewis et al., arXiv 1910.13461) learned its positions and normalises embeddings; Marian (the
translators of OPUS-MT) has sinusoids. Config fields: `BartConfig`, `MarianConfig` of transformers.
"""

from __future__ import annotations

from dataclasses import replace

from model.config import ModelConfig, Norm, Position
from model.families import Family
from model.families.bert import activation, both
from model.families.hugging_face import Config, flag, id_of, refuse, whole

_OFFSET = 2  # rows of BART's position table before position 0


def _configure(config: Config, *, family: str, position: Position) -> ModelConfig:
    refuse(
        config,
        is_encoder_decoder=(True, None),
        share_encoder_decoder_embeddings=(True, None),
        normalize_before=(False, None),
        add_final_layer_norm=(False, None),
        quantization_config=(None,),
    )
    hidden, heads = whole(config, "d_model"), whole(config, "decoder_attention_heads")
    learned = position is Position.LEARNED
    scaled = flag(config, "scale_embedding")
    start = id_of(config, "decoder_start_token_id", "pad_token_id", default=2)
    forced = config.get("forced_bos_token_id")
    decoder = ModelConfig(
        family=family,
        vocab_size=whole(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=whole(config, "decoder_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=whole(config, "decoder_ffn_dim"),
        max_model_len=whole(config, "max_position_embeddings"),
        norm=Norm.LAYER,
        position=position,
        activation=activation(config, "activation_function"),
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_head=flag(config, "tie_word_embeddings", default=True),
        post_norm=True,
        embed_norm=learned,
        position_offset=_OFFSET if learned else 0,
        embed_scale=hidden**0.5 if scaled else 1.0,
        head_bias=True,
        start_ids=(start,) if forced is None else (start, id_of(config, "forced_bos_token_id")),
        end_id=id_of(config, "eos_token_id", default=2),
    )
    encoder_heads = whole(config, "encoder_attention_heads")
    encoder = replace(
        decoder,
        num_layers=whole(config, "encoder_layers"),
        num_heads=encoder_heads,
        num_kv_heads=encoder_heads,
        head_dim=hidden // encoder_heads,
        intermediate_size=whole(config, "encoder_ffn_dim"),
        tied_head=True,
        head_bias=False,
        bidirectional=True,
        start_ids=(),
    )
    return replace(decoder, encoder=encoder)


def configure_bart(config: Config) -> ModelConfig:
    """Raises ValueError for what the network does not have."""
    return _configure(config, family="bart", position=Position.LEARNED)


def configure_marian(config: Config) -> ModelConfig:
    """Raises ValueError for what the network does not have."""
    if whole(config, "d_model") % 2:
        raise ValueError("d_model must be even")
    return _configure(config, family="marian", position=Position.SINUSOIDAL)


def _attention(theirs: str, ours: str) -> dict[str, str]:
    parts = {"q": "q", "k": "k", "v": "v", "out": "out"}
    names: dict[str, str] = {}
    for part, name in parts.items():
        names |= both(f"{theirs}.{part}_proj", f"{ours}.{name}")
    return names


def _stack(name: str, prefix: str, *, learned: bool) -> dict[str, str | None]:
    """Names of the encoder or the decoder."""
    layer, block = f"model.{name}.layers.{{i}}", f"{prefix}blocks.{{i}}"
    return {
        f"model.{name}.embed_tokens.weight": None,  # the shared one
        f"model.{name}.embed_positions.weight": f"{prefix}position.weight" if learned else None,
        **both(f"model.{name}.layernorm_embedding", f"{prefix}embed_norm"),
        **_attention(f"{layer}.self_attn", f"{block}.attention"),
        **both(f"{layer}.self_attn_layer_norm", f"{block}.attention_norm"),
        **both(f"{layer}.fc1", f"{block}.mlp.up"),
        **both(f"{layer}.fc2", f"{block}.mlp.down"),
        **both(f"{layer}.final_layer_norm", f"{block}.mlp_norm"),
    }


def _names(*, learned: bool) -> dict[str, str | None]:
    return {
        "model.shared.weight": "embed.weight",
        "lm_head.weight": "head.weight",
        "final_logits_bias": "head_bias",
        **_stack("encoder", "encoder.", learned=learned),
        **_stack("decoder", "", learned=learned),
        **_attention("model.decoder.layers.{i}.encoder_attn", "blocks.{i}.cross"),
        **both("model.decoder.layers.{i}.encoder_attn_layer_norm", "blocks.{i}.cross_norm"),
    }


BART = Family(
    name="bart",
    model_types=("bart",),
    configure=configure_bart,
    names=_names(learned=True),
)

MARIAN = Family(
    name="marian",
    model_types=("marian",),
    configure=configure_marian,
    names=_names(learned=False),
)
