"""The bits of native encoders belong to their kernel version, which names the class of vectors.

Where this fails, results changed: raise KERNEL_VERSION and add the new digests here. All variants
of instructions, all numbers of threads, and all machines give the same ones.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from model.checkpoint.sentence_transformers import SentenceSettings
from model.config import Activation, Classifier, ModelConfig, Norm, Pooling, Position, Problem
from model.native.library import NativeLibrary
from model.runners.encoding import Encoding, describe
from model.runners.native_encoding import KERNEL_VERSION, NativeEncoder
from tests.model.test_native_bits import made_weights

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_model_len": 200,
    "tied_head": True,
}
BIASED: dict[str, Any] = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
CONFIGS = {
    "bert": ModelConfig(
        **SIZES, **BIASED, family="bert", norm=Norm.LAYER, position=Position.LEARNED,
        activation=Activation.GELU, gated_mlp=False, bidirectional=True, post_norm=True,
        embed_norm=True, position_offset=2, num_types=2,
        classifier=Classifier(labels=("a", "b", "c"), problem=Problem.SINGLE_LABEL),
    ),
    "modernbert": ModelConfig(
        **SIZES, family="modernbert", norm=Norm.LAYER, norm_bias=False,
        activation=Activation.GELU_TANH, bidirectional=True, embed_norm=True, sliding_window=20,
        full_attention_layers=frozenset({0}), window_rope_theta=500.0,
    ),
    "qwen3": ModelConfig(**{**SIZES, "num_kv_heads": 2}, family="qwen3", qk_norm=True),
}  # fmt: skip
GOLDEN = {
    1: {
        "bert": {"float32": "83384581e400a73a", "int8": "0140cb42d17f6c68"},
        "modernbert": {"float32": "b01f666e280e888e", "int8": "c30eb272bed746e1"},
        "qwen3": {"float32": "2d5d469e59e4cb9c", "int8": "55b3c2695e9004f3"},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_bits_belong_to_the_version(native_library: NativeLibrary, kind: str, dtype: str) -> None:
    config = CONFIGS[kind]
    weights = {name: tensor.numpy() for name, tensor in made_weights(config).items()}
    info = describe(config, SentenceSettings(normalised=kind == "qwen3"))
    assert info.pooling == {"bert": Pooling.CLS, "qwen3": Pooling.LAST}.get(kind, Pooling.MEAN)
    lengths = (1, 2, 12, 13, 31, 50, 150, 200)
    batch = [Encoding(tuple((7 * i + n) % 97 for i in range(n))) for n in lengths]
    for variant in native_library.variants:
        for threads in (1, 3):
            runner = NativeEncoder(
                config, weights, info=info, digest="0" * 64, eight_bit=dtype == "int8",
                threads=threads, variant=variant, library=native_library,
            )  # fmt: skip
            vectors = np.stack(runner.encode(batch))
            runner.close()
            assert np.isfinite(vectors).all()
            assert len(np.unique(vectors[:, 0])) == len(batch), "inputs make a difference"
            digest = hashlib.sha256(vectors.tobytes()).hexdigest()[:16]
            assert digest == GOLDEN[KERNEL_VERSION][kind][dtype], (variant, threads)
