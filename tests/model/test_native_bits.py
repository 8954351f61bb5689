"""The bits of the native step belong to its kernel version, which names the class of answers.

Where this fails, results changed: raise KERNEL_VERSION, so that an engine of the new build does not
go on with an answer that one of the old began, and add the new digests here. All variants of
instructions, and all machines, give the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from math import prod

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.native.library import NativeStep
from model.native.sampling import logits_room
from model.runners.native import KERNEL_VERSION, NativeRunner
from model.transformer import Transformer

GOLDEN = {  # by the KV cache; int4: the weights of the layers
    1: {"bfloat16": "f737ef793ad35a71", "int8": "3f5f4736193b70f7", "int4": "1e759eedf75b6293"},
    2: {"bfloat16": "f737ef793ad35a71", "int8": "3f5f4736193b70f7", "int4": "1e759eedf75b6293"},
    3: {"bfloat16": "f737ef793ad35a71", "int8": "3f5f4736193b70f7", "int4": "1e759eedf75b6293"},
    4: {"bfloat16": "f737ef793ad35a71", "int8": "789dee65c7069fec", "int4": "1e759eedf75b6293"},
}
TOKENS = 300  # more than one split of the attention


def made_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights by integers alone: a library's random numbers differ between its versions."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    weights = {}
    for seed, name in enumerate(sorted(shapes)):
        mixed = np.arange(1, prod(shapes[name]) + 1, dtype=np.uint64) * np.uint64(2654435761 + seed)
        mixed = (mixed ^ (mixed >> np.uint64(15))) * np.uint64(2246822519)
        parts = (mixed >> np.uint64(24)).astype(np.uint8).astype(np.float32) / 128 - 1
        value = 1 + parts / 16 if "norm.weight" in name else parts / 4
        weights[name] = torch.from_numpy(value.reshape(shapes[name]).astype(np.float32))
    return weights


def made_blocks(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layers in 4 bits: codes from the bits of the weights, scales and minima of few bits."""
    made = {}
    for name, tensor in weights.items():
        if name.startswith("blocks.") and tensor.ndim == 2:
            codes = ((tensor.numpy() + 1) * 128).astype(np.uint8).reshape(-1, 32)
            blocks = np.empty((len(codes), 20), np.uint8)
            scales = (1 + codes[:, 0] % 16).astype(np.float16) / 512
            blocks[:, :2] = scales[:, None].view(np.uint8)
            blocks[:, 2:4] = (-8 * scales)[:, None].view(np.uint8)
            blocks[:, 4:] = codes[:, :16]
            made[name] = torch.from_numpy(blocks.reshape(len(tensor), -1))
        else:
            made[name] = tensor
    return made


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_bits_change_only_with_the_kernel_version(
    native_config: Callable[..., ModelConfig],
    native: Callable[..., NativeRunner],
    native_variants: list[str],
    kind: str,
) -> None:
    config = native_config(qk_norm=True)
    weights = made_weights(config)
    if kind == "int4":
        weights = made_blocks(weights)
    kv_dtype = "int8" if kind == "int8" else "bfloat16"
    ids = (np.arange(TOKENS, dtype=np.int32) * 37 + 11) % config.vocab_size
    for variant in native_variants:
        dtype = "int4" if kind == "int4" else "int8"
        runner = native(config, weights, variant=variant, kv_dtype=kv_dtype, dtype=dtype)
        logits_RV = logits_room(TOKENS, config.vocab_size)
        step = NativeStep(
            tokens_T=ids,
            positions_T=np.arange(TOKENS, dtype=np.int32),
            query_starts_S1=np.array([0, TOKENS], np.int32),
            block_table_SB=np.arange(-(-TOKENS // runner.block_size), dtype=np.int32)[None],
            output_rows_R=np.arange(TOKENS, dtype=np.int32),
            logits=dict(enumerate(logits_RV)),
        )
        runner._model.step(step)
        assert np.isfinite(logits_RV).all()
        assert len(np.unique(logits_RV.argmax(axis=1))) > 10, "the network says something"
        digest = hashlib.sha256(logits_RV.tobytes()).hexdigest()[:16]
        assert digest == GOLDEN[KERNEL_VERSION][kind]
