"""GGUF files as checkpoints: tensors are read from mapped files and dequantised one by one.

The head is walked and bounds-checked in `gguf_header`; nothing here trusts a number that was not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from model.checkpoint import CheckpointError, Layout
from model.checkpoint.dequantize import Bytes, dequantize
from model.checkpoint.gguf_config import INTERLEAVED, NAMES, rope_scaling, translate
from model.checkpoint.gguf_parts import merged, open_parts
from model.weights import BFLOAT16, Array

if TYPE_CHECKING:
    from model.families import Family

_PLAIN: dict[str, npt.DTypeLike] = {"F32": "<f4", "F16": "<f2", "BF16": BFLOAT16}


class GgufCheckpoint:
    """One GGUF file, or one model that is split into several."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = path
        self._parts = open_parts(path)
        self.header = merged(self._parts)
        self._data = {name: part.data for part in self._parts for name in part.header.tensors}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The file's metadata as the fields of config.json."""
        config = translate(self.header)
        entry = self.header.tensors.get("rope_freqs.weight")
        if entry is not None and len(entry.shape) == 1 and entry.storage.name == "F32":
            factors = self.load("rope_freqs.weight").tolist()
            scaling = rope_scaling(factors, theta=config.get("rope_theta", 1e4))
            if scaling and config.get("rope_scaling"):
                raise CheckpointError(
                    f"{self.header.file_name}: rope_freqs.weight and a linear scaling exclude"
                    " each other"
                )
            config["rope_scaling"] = scaling or config.get("rope_scaling")
        elif entry is not None:
            raise CheckpointError(f"{self.header.file_name}: rope_freqs.weight is malformed")
        return config

    @cached_property
    def digest(self) -> str:
        """The file's SHA-256; of several files, that over their SHA-256 in order."""
        digests = [hashlib.sha256(part.data) for part in self._parts]
        if len(digests) == 1:
            return digests[0].hexdigest()
        return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()

    def layout(self, family: Family) -> Layout:  # noqa: ARG002  (the same for all of them)
        """GGUF's own names; matrices are always [out, in]."""
        return Layout(names=NAMES)

    def names(self) -> Collection[str]:
        return self.header.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.header.tensors[name].shape

    def load(self, name: str) -> Array:
        """Reads, dequantises and, where rotary pairs are interleaved, reorders one tensor."""
        entry, stored = self.header.tensors[name], self.stored(name)
        plain = _PLAIN.get(entry.storage.name)
        if plain is None:
            array: Array = dequantize(stored, entry.storage.name)
        else:
            array = stored.view(plain)
        return self.in_order(name, array.reshape(entry.shape))

    def in_order(self, name: str, rows: Array) -> Array:
        """The rows of a tensor, with the pairs of rotary dimensions as Hugging Face has them."""
        heads = self._interleaved_heads(name)
        return rows if heads is None else _separated(rows, heads)

    def stored(self, name: str) -> Bytes:
        """The blocks of one tensor, [n, bytes per block], in the mapped file."""
        entry = self.header.tensors[name]
        data = np.frombuffer(self._data[name], np.uint8, count=entry.size, offset=entry.start)
        return data.reshape(-1, entry.storage.size)

    def _interleaved_heads(self, name: str) -> int | None:
        """The heads of a tensor whose rotary pairs have to be taken apart; None for others."""
        architecture = self.header.text("general.architecture")
        if architecture not in INTERLEAVED or ".attn_" not in name:
            return None
        queries = self.header.integer(f"{architecture}.attention.head_count")
        keys = self.header.integer(f"{architecture}.attention.head_count_kv")
        return {"attn_q": queries, "attn_k": keys or queries}.get(name.split(".")[-2])


def _separated(rows: Array, heads: int) -> Array:
    """Rows d0 e0 d1 e1 ... of each head -> d0 d1 ... e0 e1 ..., as Hugging Face has them."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
