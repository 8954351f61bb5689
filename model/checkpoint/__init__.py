"""Checkpoints: files on disk -> a ModelConfig, canonical weights and a digest of what was read.

`open_checkpoint` looks at the bytes, not at the file's name, and refuses what it cannot trust
before anything large is allocated. Importing this package does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from model.config import ModelConfig
    from model.families import Family
    from model.weights import Array, Arrays


class CheckpointError(ValueError):
    """A checkpoint that is malformed, incomplete or of no known kind. Names files, not folders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one kind of file names and lays out a family's tensors; fields as in `Family`."""

    names: Mapping[str, str | tuple[str, ...] | None]
    transposed: frozenset[str] = frozenset()


class Checkpoint(Protocol):
    """An opened checkpoint: sizes are known and checked, tensors are read one by one."""

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json or its equivalent: `model_type` and the family's own keys."""
        ...

    @property
    def tokenizer(self) -> Path:
        """Where `model.text.tokenizer` reads the vocabulary: a GGUF file, or a folder."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 over every byte of configuration and weights, in hexadecimal.

        Of a GGUF file, the file's own. Costs about 0.5 s per gigabyte if the CPU hashes in
        hardware; it is computed on first use.
        """
        ...

    def layout(self, family: Family) -> Layout:
        """The names under which the tensors of `family` are stored here."""
        ...

    def names(self) -> Collection[str]:
        """Every tensor in the checkpoint, under its stored name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor; reads no data."""
        ...

    def load(self, name: str) -> Array:
        """Reads one tensor: as stored, quantised ones in float32. It may be a read-only view of the
        file.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """Everything a runner is built from."""

    config: ModelConfig
    weights: dict[str, torch.Tensor]  # canonical names, fused, on the host
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """The same without tensors in memory: each is read when it is accessed."""

    config: ModelConfig
    weights: Arrays
    digest: str


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a GGUF file, a safetensors file (config.json in its folder), or a folder of either."""
    from model.checkpoint.gguf import GgufCheckpoint
    from model.checkpoint.safetensors import SafetensorsCheckpoint

    gguf = find_gguf(path)
    return GgufCheckpoint(gguf) if gguf else SafetensorsCheckpoint(path)


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is or, if it is a folder without safetensors, contains.

    Of a model that is split into several files, the first one.
    """
    from model.checkpoint.gguf_parts import first_part

    try:
        if path.is_dir():
            files = {first_part(file) for file in path.glob("*.gguf")}
            if not files or any(path.glob("*.safetensors")):
                return None
            if len(files) > 1:
                raise CheckpointError(f"{path.name}: {len(files)} GGUF models; name one of them")
            return files.pop()
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror or 'cannot be read'}") from None
    if magic[:2] == b"PK" or magic[:1] == b"\x80":
        raise CheckpointError(f"{path.name}: zip and pickle files run code when read; refused")
    return first_part(path) if magic == b"GGUF" else None


def configure(checkpoint: Checkpoint) -> tuple[Family, ModelConfig]:
    """The family of a checkpoint and its configuration. Raises CheckpointError."""
    from model.families import family_of

    try:
        family = family_of(str(checkpoint.config.get("model_type")))
    except KeyError as error:
        raise CheckpointError(str(error.args[0])) from None
    try:
        config = family.configure(checkpoint.config)
    except KeyError as error:
        raise CheckpointError(f"the configuration lacks {error}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"the configuration is not valid for {family.name}: {error}"
        ) from None
    if family.own_head:
        config = replace(config, tied_head=family.own_head not in checkpoint.names())
    return family, config


def open_model(path: Path, *, four_bit: bool = False, headless: bool = False) -> OpenedModel:
    """Opens and checks a model without reading its tensors. Raises CheckpointError.

    `four_bit`: matrices of layers are the file's own blocks; see `model.checkpoint.four_bit`.
    `headless` leaves out the head that predicts tokens: encodings do not need it.
    """
    checkpoint = open_checkpoint(path)
    if four_bit:
        from model.checkpoint.four_bit import as_four_bit

        checkpoint = as_four_bit(checkpoint)
    config, weights = _assemble(checkpoint, headless=headless)
    return OpenedModel(config=config, weights=weights, digest=checkpoint.digest)


def load_model(
    path: Path,
    *,
    dtype: torch.dtype | str | None = None,
    keep: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    eight_bit: bool = False,
) -> LoadedModel:
    """Reads a model as torch tensors, or the part that `keep` selects. Raises CheckpointError.

    `eight_bit`: matrices of layers are the file's own blocks, see `model.checkpoint.eight_bit`.
    dtype: torch's or its name; None: as stored. `keep` gives what is kept of each tensor, as soon
    as it is there: a share needs no memory for the whole.
    """
    from concurrent.futures import ThreadPoolExecutor

    from model.weights import to_tensor

    checkpoint = open_checkpoint(path)
    if eight_bit:
        from model.checkpoint.eight_bit import as_eight_bit

        checkpoint = as_eight_bit(checkpoint)
    config, arrays = _assemble(checkpoint)
    weights: dict[str, torch.Tensor] = {}
    with ThreadPoolExecutor(max_workers=1) as hasher:  # hashing lets go of the interpreter lock
        digest = hasher.submit(lambda: checkpoint.digest)
        for name in arrays:
            tensor = to_tensor(arrays[name], dtype)
            weights[name] = tensor if keep is None else keep(name, tensor)
        return LoadedModel(config=config, weights=weights, digest=digest.result())


def _assemble(checkpoint: Checkpoint, *, headless: bool = False) -> tuple[ModelConfig, Arrays]:
    from model.checkpoint.assemble import AssembledWeights

    family, config = configure(checkpoint)
    if headless:
        config = replace(config, tied_head=True)
    return config, AssembledWeights(family, config, checkpoint=checkpoint)
