"""A GGUF file's metadata as the fields of config.json, and the names of its tensors.

One name map serves all architectures: llama.cpp has already made the names uniform. Does not know
which families exist; a key that the file lacks is left to the family's default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from model.checkpoint import CheckpointError
from model.checkpoint.gguf_header import GgufHeader
from model.config import ROPE_THETA

# Rotary pairs stand side by side in the rows of Q and K, and have to be taken apart.
INTERLEAVED = frozenset({"llama", "smollm3"})

ENCODERS = frozenset({"bert", "nomic-bert"})
_MODEL_TYPES = {"nomic-bert": "nomic_bert"}  # that differ from the architecture
_QKV = ("q", "k", "v")
_BLOCK = {
    "attn_norm": "attention_norm",
    "attn_output_norm": "attention_norm",  # of encoders, whose norms stand behind the sublayers
    "ffn_norm": "mlp_norm",
    "layer_output_norm": "mlp_norm",
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "attn_output": "attention.out",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
}
NAMES: Mapping[str, str | tuple[str, ...] | None] = {
    "token_embd.weight": "embed.weight",
    "position_embd.weight": "position.weight",
    "token_types.weight": "types.weight",
    "token_embd_norm.weight": "embed_norm.weight",
    "token_embd_norm.bias": "embed_norm.bias",
    "output_norm.weight": "norm.weight",
    "output_norm.bias": "norm.bias",
    "output.weight": "head.weight",
    "rope_freqs.weight": None,  # read into the configuration
    **{
        f"blk.{{i}}.{theirs}.{kind}": f"blocks.{{i}}.{ours}.{kind}"
        for theirs, ours in _BLOCK.items()
        for kind in ("weight", "bias")
    },
    **{
        f"blk.{{i}}.attn_qkv.{kind}": tuple(
            f"blocks.{{i}}.attention.{part}.{kind}" for part in _QKV
        )
        for kind in ("weight", "bias")
    },
}

_LLAMA_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "attention.sliding_window": "sliding_window",
}
_GPT2_KEYS = {
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "context_length": "n_positions",
}
SMOLLM3_ROPE_FREE = 4  # every fourth layer; llama.cpp has it in its code, not in the file

# The frequency scaling that Llama 3.1 was trained with; a GGUF file keeps its result only.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def translate(header: GgufHeader) -> dict[str, Any]:
    """config.json as a Hugging Face folder of the same model would have it, as far as known."""
    architecture = header.text("general.architecture")
    if architecture is None:
        raise CheckpointError(f"{header.file_name}: general.architecture is missing")
    for refused, neutral in (("expert_count", 0), ("rope.scaling.attn_factor", 1)):
        if header.number(f"{architecture}.{refused}") not in (None, 0, neutral):
            raise CheckpointError(f"{header.file_name}: {refused} is not supported")
    keys = _GPT2_KEYS if architecture == "gpt2" else _LLAMA_KEYS
    config: dict[str, Any] = {"model_type": _MODEL_TYPES.get(architecture, architecture)}
    for theirs, ours in keys.items():
        value = header.integer(f"{architecture}.{theirs}")
        if value is not None:
            config[ours] = value
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{header.file_name}: token_embd.weight is missing")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    if architecture == "gpt2":
        return config | _present(
            layer_norm_epsilon=header.number("gpt2.attention.layer_norm_epsilon")
        )
    if architecture in ENCODERS:
        return config | _encoder(header, architecture)
    return config | _llama_like(header, architecture)


def _encoder(header: GgufHeader, architecture: str) -> dict[str, Any]:
    """What BERT's kin have besides sizes. The tables have the numbers of positions and types."""
    if header.flag(f"{architecture}.attention.causal"):
        raise CheckpointError(f"{header.file_name}: attention.causal is not supported for encoders")
    hidden, heads, turned = (
        header.integer(f"{architecture}.{name}")
        for name in ("embedding_length", "attention.head_count", "rope.dimension_count")
    )
    if turned is not None and turned * (heads or 1) != hidden:
        raise CheckpointError(f"{header.file_name}: partial rotary positions are not supported")
    rows = {
        name: entry.shape[0]
        for name in ("position_embd.weight", "token_types.weight")
        if (entry := header.tensors.get(name)) is not None
    }
    return _present(
        max_position_embeddings=rows.get("position_embd.weight")
        or header.integer(f"{architecture}.context_length"),
        type_vocab_size=rows.get("token_types.weight", 0),
        layer_norm_eps=header.number(f"{architecture}.attention.layer_norm_epsilon"),
        rope_theta=header.number(f"{architecture}.rope.freq_base"),
    ) | {"rope_scaling": _linear_scaling(header, architecture)}


def _llama_like(header: GgufHeader, architecture: str) -> dict[str, Any]:
    if header.flag(f"{architecture}.attention.causal") is False:
        raise CheckpointError(f"{header.file_name}: {architecture} is supported as a decoder only")
    config = _present(
        rms_norm_eps=header.number(f"{architecture}.attention.layer_norm_rms_epsilon"),
        rope_theta=header.number(f"{architecture}.rope.freq_base"),
        # Only where key_length is absent; a partial rotation shows in the two being different.
        head_dim=header.integer(f"{architecture}.attention.key_length")
        or header.integer(f"{architecture}.rope.dimension_count"),
    )
    if header.integer(f"{architecture}.rope.dimension_count") not in (None, config.get("head_dim")):
        raise CheckpointError(f"{header.file_name}: partial rotary positions are not supported")
    config["rope_scaling"] = _linear_scaling(header, architecture)
    config["hidden_act"] = "silu"
    config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    config["mlp_bias"] = "blk.0.ffn_down.bias" in header.tensors
    if architecture == "smollm3":
        layers = header.integer("smollm3.block_count") or 0
        if layers > len(header.tensors):
            raise CheckpointError(f"{header.file_name}: more layers than tensors")
        config["no_rope_layers"] = [
            int((layer + 1) % SMOLLM3_ROPE_FREE != 0) for layer in range(layers)
        ]
    return config


def _linear_scaling(header: GgufHeader, architecture: str) -> dict[str, Any] | None:
    """The scaling that the metadata states. As in llama.cpp, a factor without a type is linear."""
    kind = header.text(f"{architecture}.rope.scaling.type") or "linear"
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"{header.file_name}: rope.scaling.type {kind[:80]!r} is not supported;"
            " none and linear are"
        )
    names = ("rope.scaling.factor", "rope.scale_linear")  # the older name is read second
    factors = [header.number(f"{architecture}.{name}") for name in names]
    factor = next((factor for factor in factors if factor), 1.0)
    return None if kind == "none" or factor == 1 else {"rope_type": "linear", "factor": factor}


def _present(**entries: float | None) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if value is not None}


def rope_scaling(factors: Sequence[float], *, theta: float) -> dict[str, Any] | None:
    """The scaling whose frequency divisors are `factors`; None if nothing is scaled.

    Raises CheckpointError if the factors are not those of Llama 3's formula.
    """
    if not ROPE_THETA[0] <= theta <= ROPE_THETA[1]:
        raise CheckpointError(f"rope.freq_base must be from {ROPE_THETA[0]:g} to {ROPE_THETA[1]:g}")
    if not all(0 < factor < math.inf for factor in factors):
        raise CheckpointError("the values of rope_freqs.weight must be finite and above 0")
    factor = max(factors)
    if factor == min(factors) == 1.0:
        return None
    scaling = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    expected = _llama3_factors(len(factors), theta=theta, factor=factor)
    if not all(math.isclose(*pair, rel_tol=1e-4) for pair in zip(factors, expected, strict=True)):
        raise CheckpointError("rope_freqs.weight is not Llama 3's frequency scaling")
    return scaling


def _llama3_factors(count: int, *, theta: float, factor: float) -> list[float]:
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    original = _LLAMA3["original_max_position_embeddings"]
    factors = []
    for index in range(count):
        turns = original / (2 * math.pi * theta ** (index / count))  # within the old context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
