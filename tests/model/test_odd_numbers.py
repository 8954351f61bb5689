"""Odd numbers in a checkpoint: one clear CheckpointError, or a network that computes.

Every number in the head of a GGUF file, and in a folder's config.json, is replaced by numbers that
are negative, zero, huge or not a number, and by values of another type.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFValue, GGUFValueType

from model.checkpoint import CheckpointError, load_model
from model.text.tokenizer import Tokenizer
from model.transformer import Transformer
from tests.support.tiny_model import TinyModel

VALUES = {
    "minus one": GGUFValue(-1, GGUFValueType.INT32),
    "zero": GGUFValue(0, GGUFValueType.UINT32),
    "one": GGUFValue(1, GGUFValueType.UINT32),
    "largest u32": GGUFValue(2**32 - 1, GGUFValueType.UINT32),
    "largest u64": GGUFValue(2**64 - 1, GGUFValueType.UINT64),
    "smallest i64": GGUFValue(-(2**63), GGUFValueType.INT64),
    "not a number": GGUFValue(math.nan, GGUFValueType.FLOAT32),
    "infinite": GGUFValue(math.inf, GGUFValueType.FLOAT32),
    "minus infinite": GGUFValue(-math.inf, GGUFValueType.FLOAT64),
    "huge": GGUFValue(1e308, GGUFValueType.FLOAT64),
    "tiny": GGUFValue(1e-308, GGUFValueType.FLOAT64),
    "negative": GGUFValue(-1.5, GGUFValueType.FLOAT32),
    "zero float": GGUFValue(0.0, GGUFValueType.FLOAT32),
    "flag": GGUFValue(True, GGUFValueType.BOOL),
    "text": GGUFValue("8", GGUFValueType.STRING),
    "list": GGUFValue([-1, 2], GGUFValueType.ARRAY, sub_type=GGUFValueType.INT32),
    "list of floats": GGUFValue([math.nan], GGUFValueType.ARRAY, sub_type=GGUFValueType.FLOAT32),
}
GGUF_KEYS = [
    "general.alignment",
    "split.count",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.sliding_window",
    "llama.expert_count",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.rope.scale_linear",
    "llama.rope.scaling.attn_factor",
    "llama.rope.scaling.factor",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.token_type",
]
JSON_VALUES: list[Any] = [
    *(-1, 0, 1, 2**31, 10**30, -(2**63), math.nan, math.inf, -math.inf, 1e308, 1e-308, -1.5, 0.0),
    *(True, "8", "NaN", [], [-1], {}, {"a": 1}),
]
JSON_KEYS = {
    "llama": [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
        *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
        *("tie_word_embeddings", "attention_bias", "mlp_bias", "eos_token_id"),
    ],
    "llama rope_scaling": [
        *("rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ],
    "mistral": ["sliding_window", "num_hidden_layers"],
    "qwen2": ["use_sliding_window", "max_window_layers", "layer_types", "num_hidden_layers"],
    "smollm3": ["no_rope_layers", "no_rope_layer_interval", "sliding_window", "num_hidden_layers"],
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def check(path: Path) -> str:
    """Why a checkpoint is refused; nothing if its network computes finite numbers."""
    try:
        model = load_model(path)
        tokenizer = Tokenizer.from_checkpoint(path)
    except CheckpointError as error:
        reason = str(error)
    else:
        reason = ""
    if reason:
        assert "\n" not in reason
        assert str(path.parent) not in reason
        assert len(reason) < 300
        return reason
    assert all(id_ < model.config.vocab_size for id_ in tokenizer.eos_ids)
    network = Transformer(model.config)
    network.load_state_dict(model.weights)
    with torch.no_grad():
        assert network(torch.tensor([5, 6, 7])).isfinite().all()
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("key", GGUF_KEYS)
def test_in_a_gguf_header(tiny_model: TinyModel, tmp_path: Path, key: str) -> None:
    assert not check(tiny_model.write_gguf(tmp_path / "tiny.gguf"))
    reasons = {}
    for name, value in VALUES.items():
        path = tiny_model.write_gguf(tmp_path / "tiny.gguf", metadata={key: value})
        reasons[name] = check(path)
    assert any(reasons.values())


@pytest.mark.parametrize("base", ["negative", "minus one", "zero float", "huge", "tiny"])
@pytest.mark.parametrize("factors", [False, True])
def test_a_bad_rope_base_is_named(
    tiny_model: TinyModel, tmp_path: Path, base: str, factors: bool
) -> None:
    """A negative one, with frequency factors, was a TypeError about complex numbers."""
    extra = {"rope_freqs.weight": torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]).numpy()}
    path = tiny_model.write_gguf(
        tmp_path / "tiny.gguf",
        extra=extra if factors else None,
        metadata={"llama.rope.freq_base": VALUES[base]},
    )
    with pytest.raises(CheckpointError, match=r"rope_theta|rope\.freq_base"):
        load_model(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "key"), [(place, key) for place, keys in JSON_KEYS.items() for key in keys]
)
def test_in_a_configuration(tiny_model: TinyModel, tmp_path: Path, place: str, key: str) -> None:
    folder = tiny_model.write_folder(tmp_path / "folder")
    model_type, _, inner = place.partition(" ")
    config: dict[str, Any] = {**tiny_model.config(), "model_type": model_type}
    if model_type != "llama":
        config |= {"use_sliding_window": True, "sliding_window": 64}
    if model_type == "qwen2":
        config["attention_bias"] = True
    reasons = []
    for value in JSON_VALUES:
        changed = {inner: {**LLAMA3_ROPE, key: value}} if inner else {key: value}
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        reasons.append(check(folder))
    assert key == "eos_token_id" or any(key in reason for reason in reasons), reasons
