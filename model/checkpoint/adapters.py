"""Reads low-rank adapters from folders of PEFT.

The network holds some matrices of a checkpoint fused; their adapters are fused here, too: A's rows
one below another, B's blocks on a diagonal.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model.adapters import Adapter, Factors
from model.batch import Floats
from model.checkpoint import CheckpointError, configure, open_checkpoint
from model.checkpoint.json_file import read_json
from model.checkpoint.safetensors import open_tensors
from model.checkpoint.stored import Stored, stored_tensors
from model.config import ModelConfig
from model.weights import float_copy

MAX_RANK = 256
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<kind>[AB])\.weight")
_REFUSED = (
    "use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern",
    "layer_replication", "trainable_token_indices",
)  # fmt: skip
"""Fields of PEFT's configuration that change what is computed; unset or empty ones do not."""


def _digest(folder: Path) -> str:
    """SHA-256 over the SHA-256 of each file of an adapter. Raises CheckpointError."""
    whole = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        try:
            with (folder / name).open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            reason = error.strerror or "cannot be read"
            raise CheckpointError(f"{folder.name}: {name}: {reason}") from None
    return whole.hexdigest()


def read_adapter(folder: Path, base: Path) -> Adapter:
    """Reads a folder as PEFT writes it. `base`: the files of the model that it is for.

    Raises CheckpointError if it is malformed, for another model, or more than a low-rank product
    of matrices of the layers.
    """
    digest = _digest(folder)
    scale = _scale(read_json(folder / CONFIG))
    family, config = configure(open_checkpoint(base))
    matrices = {each.module: each for each in stored_tensors(family, config) if _is_matrix(each)}
    found: dict[str, dict[str, Floats]] = {}
    for key, tensor in open_tensors(folder / WEIGHTS).items():
        match = _KEY.fullmatch(key)
        if match is None or match["module"] not in matrices:
            raise CheckpointError(
                f"{folder.name}: {key} adapts what cannot be adapted here; possible are "
                f"{', '.join(sorted({module.rpartition('.')[2] for module in matrices}))}"
            )
        values = float_copy(tensor.read(key))
        if not np.isfinite(values).all():
            raise CheckpointError(f"{folder.name}: {key} has values that are not finite")
        found.setdefault(match["module"], {})[match["kind"]] = values
    if not found:
        raise CheckpointError(f"{folder.name}: {WEIGHTS} has no tensors")
    parts = {module: _part(folder, module, pair, scale) for module, pair in found.items()}
    return Adapter(digest=digest, factors=dict(_fused(folder, parts, matrices, config)))


def _is_matrix(stored: Stored) -> bool:
    """Whether a tensor is a matrix of a layer's attention or MLP."""
    in_sublayer = ".attention." in stored.fused or ".mlp." in stored.fused
    return in_sublayer and stored.name.endswith(".weight") and "_norm." not in stored.fused


def _scale(settings: Mapping[str, Any]) -> float:
    """The factor of B A. Raises CheckpointError for adapters of other kinds."""
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{CONFIG}: peft_type must be LORA")
    for name in _REFUSED:
        if settings.get(name):
            raise CheckpointError(f"{CONFIG}: {name} is not supported: serve the merged model")
    if settings.get("bias", "none") != "none":
        raise CheckpointError(f"{CONFIG}: bias must be none: serve the merged model")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise CheckpointError(f"{CONFIG}: r must be from 1 to {MAX_RANK}: serve the merged model")
    if type(alpha) not in {int, float} or not math.isfinite(float(str(alpha))):
        raise CheckpointError(f"{CONFIG}: lora_alpha must be a number")
    return float(str(alpha)) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _part(folder: Path, module: str, pair: Mapping[str, Floats], scale: float) -> Factors:
    """The product for one stored matrix."""
    if pair.keys() != {"A", "B"}:
        raise CheckpointError(f"{folder.name}: {module} lacks lora_A or lora_B")
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or len(a) > MAX_RANK:
        raise CheckpointError(
            f"{folder.name}: {module} is no product of matrices of a rank up to {MAX_RANK}"
        )
    return Factors(a, b * np.float32(scale))


def _fused(
    folder: Path,
    parts: Mapping[str, Factors],
    matrices: Mapping[str, Stored],
    config: ModelConfig,
) -> Iterator[tuple[str, Factors]]:
    """The products for the network's matrices, by their names."""
    by_fused: dict[str, list[tuple[Stored, Factors]]] = {}
    for module, factors in parts.items():
        by_fused.setdefault(matrices[module].fused, []).append((matrices[module], factors))
    heights: dict[str, int] = {}
    for stored in matrices.values():
        heights[stored.fused] = max(heights.get(stored.fused, 0), stored.stop)
    for name, pairs in by_fused.items():
        pairs.sort(key=lambda pair: pair[0].start)
        inputs = _inputs(name, config)
        b = np.zeros((heights[name], sum(len(each.a) for _, each in pairs)), np.float32)
        row = 0
        for stored, each in pairs:
            if each.a.shape[1] != inputs or len(each.b) != stored.stop - stored.start:
                raise CheckpointError(
                    f"{folder.name}: {stored.module} is of another model: it is for a matrix of "
                    f"{len(each.b)} x {each.a.shape[1]}, and the model's has "
                    f"{stored.stop - stored.start} x {inputs}"
                )
            b[stored.start : stored.stop, row : row + len(each.a)] = each.b
            row += len(each.a)
        yield name, Factors(np.concatenate([each.a for _, each in pairs]), b)


def _inputs(name: str, config: ModelConfig) -> int:
    """Columns of a matrix."""
    if name.endswith("attention.out.weight"):
        return config.query_size
    return config.intermediate_size if name.endswith("mlp.down.weight") else config.hidden_size
