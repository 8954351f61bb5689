"""safetensors folders as checkpoints: config.json, and one file or several with an index.

The `safetensors` library validates each file's head (sizes, offsets, overlaps) before it gives out
a tensor. An index may only name files in its own folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from model.checkpoint import CheckpointError, Layout
from model.checkpoint.json_file import read_json
from model.weights import BFLOAT16, Array

if TYPE_CHECKING:
    from model.families import Family

INDEX = "model.safetensors.index.json"
_DTYPES: dict[str, npt.DTypeLike] = {"F32": "<f4", "F16": "<f2", "BF16": BFLOAT16}


class StoredTensor(NamedTuple):
    data: mmap.mmap
    start: int  # bytes
    storage: str
    shape: tuple[int, ...]

    def read(self, name: str) -> Array:
        """A view of it in its file."""
        dtype = _DTYPES.get(self.storage)
        if dtype is None:
            raise CheckpointError(f"{name}: weights are float32, float16 or bfloat16")
        count = math.prod(self.shape)
        array: Array = np.frombuffer(self.data, dtype, count=count, offset=self.start)
        return array.reshape(self.shape)


class SafetensorsCheckpoint:
    """A folder as Hugging Face lays it out, or its only weights file."""

    def __init__(self, path: Path) -> None:
        folder = path if path.is_dir() else path.parent
        self.tokenizer = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self._files = _weight_files(path)
        self._config_file = folder / "config.json"
        self._tensors: dict[str, StoredTensor] = {}
        for file in self._files:
            tensors = open_tensors(file)
            if tensors.keys() & self._tensors.keys():
                raise CheckpointError(f"{file.name}: a tensor is in another file as well")
            self._tensors |= tensors
        self._check_index(folder / INDEX)

    def _check_index(self, index: Path) -> None:
        if index not in {file.parent / INDEX for file in self._files} or len(self._files) == 1:
            return
        absent = set(read_json(index)["weight_map"]) ^ set(self._tensors)
        if absent:
            raise CheckpointError(f"{index.name}: {len(absent)} tensors differ from the files'")

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the SHA-256 of config.json and of each weights file, in order."""
        whole = hashlib.sha256()
        for path in (self._config_file, *self._files):
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()

    def layout(self, family: Family) -> Layout:
        """The family's own names, with its prefix and without."""
        prefix = family.prefix
        bare = {name.removeprefix(prefix): ours for name, ours in family.names.items()}
        turned = {name.removeprefix(prefix) for name in family.transposed}
        return Layout(names={**bare, **family.names}, transposed=family.transposed | turned)

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def load(self, name: str) -> Array:
        """A view of one tensor in its file."""
        return self._tensors[name].read(name)


def _weight_files(path: Path) -> tuple[Path, ...]:
    if not path.is_dir():
        return (path,)
    if not (path / INDEX).exists():
        files = tuple(path.glob("*.safetensors"))
        if len(files) != 1:
            raise CheckpointError(f"{path.name}: {len(files)} safetensors files and no index")
        return files
    names = read_json(path / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{INDEX}: no weight_map")
    for name in names.values():
        # A plain name: no folder, no parent, no root. The file itself may be a link, as in caches.
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise CheckpointError(f"{INDEX}: names a file outside its folder")
    return tuple(path / name for name in sorted(set(names.values())))


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """Maps a file and reads its head, which the library has validated."""
    try:
        safe_open(path, framework="np")
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(data[:8], "little")
        head: dict[str, dict[str, Any]] = json.loads(data[8:start])
        return {
            name: StoredTensor(
                data, start + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"])
            )
            for name, entry in head.items()
            if name != "__metadata__"
        }
    except SafetensorError:
        raise CheckpointError(f"{path.name}: not a safetensors file, or cut short") from None
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror or 'cannot be read'}") from None
