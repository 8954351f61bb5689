"""GGUF models in several files: NAME-00001-of-00003.gguf and its siblings, read as one.

The first file has the metadata, every file has a table of its own tensors. Torch-free.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass, replace
from pathlib import Path

from model.checkpoint import CheckpointError
from model.checkpoint.gguf_header import GgufHeader, TensorEntry, map_file, parse_header

_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>(\.gguf)?)")
_SHOWN = 5  # names in an error message


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One file of a model."""

    data: mmap.mmap
    header: GgufHeader


def first_part(path: Path) -> Path:
    """The first file of the model that a file belongs to, by its name."""
    match = _PART.fullmatch(path.name)
    return path.with_name(_name(match, 1)) if match else path


def name_without_part(name: str) -> str:
    """The name of a file or model without the number of its part."""
    match = _PART.fullmatch(name)
    return match["name"] + match["end"] if match else name


def part_names(name: str) -> list[str]:
    """The names of all files of a model, given any one of them."""
    match = _PART.fullmatch(name)
    return [_name(match, 1 + index) for index in range(int(match["count"]))] if match else [name]


def open_parts(path: Path) -> list[Part]:
    """Maps every file of a model, given its first, and reads the heads. Raises CheckpointError."""
    first = _open(path)
    count = first.header.integer("split.count") or 1
    if count == 1:
        return [first]
    names = part_names(path.name)
    if len(names) != count:
        raise CheckpointError(
            f"{path.name}: it is one of {count} files and must be named"
            f" NAME-00001-of-{count:05}.gguf, as must the other parts in the same folder"
        )
    missing = [name for name in names if not path.with_name(name).exists()]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise CheckpointError(f"files are missing: {', '.join(missing[:_SHOWN])}{more}")
    parts = [first, *(_open(path.with_name(name)) for name in names[1:])]
    for number, part in enumerate(parts):
        stated = part.header.integer("split.no"), part.header.integer("split.count")
        if stated != (number, count):
            raise CheckpointError(f"{part.header.file_name}: it is no part {number + 1} of {count}")
    return parts


def merged(parts: list[Part]) -> GgufHeader:
    """The head of a whole model: the first file's metadata, every file's tensors."""
    first = parts[0].header
    tensors: dict[str, TensorEntry] = {}
    for part in parts:
        repeated = tensors.keys() & part.header.tensors.keys()
        if repeated:
            raise CheckpointError(
                f"{part.header.file_name}: {min(repeated)[:80]!r} is in another file as well"
            )
        tensors |= part.header.tensors
    if first.integer("split.tensors.count") not in (None, len(tensors)):
        raise CheckpointError(f"{first.file_name}: the files have {len(tensors)} tensors in all")
    return replace(first, tensors=tensors)


def read_headers(path: Path) -> GgufHeader:
    """Reads the head of a model, given its first file. Raises CheckpointError."""
    parts = open_parts(path)
    try:
        return merged(parts)
    finally:
        for part in parts:
            part.data.close()


def _open(path: Path) -> Part:
    data = map_file(path)
    return Part(data=data, header=parse_header(data, file_name=path.name))


def _name(match: re.Match[str], number: int) -> str:
    return f"{match['name']}-{number:05}-of-{match['count']}{match['end']}"
