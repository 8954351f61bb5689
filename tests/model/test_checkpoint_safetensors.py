"""safetensors folders: one file or several, three dtypes, and refusals."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import CheckpointError, load_model, open_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_model: Any, tmp_path: Path) -> Path:
    path: Path = tiny_model.write_folder(tmp_path / "folder")
    return path


def _shard(folder: Path) -> dict[str, str]:
    """Splits the folder's weights over two files; returns the index's map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shards_equal_one_file(folder: Path) -> None:
    whole = load_model(folder)
    _shard(folder)
    sharded = load_model(folder)
    assert sharded.weights.keys() == whole.weights.keys()
    assert all(torch.equal(sharded.weights[name], whole.weights[name]) for name in whole.weights)


def test_a_file_is_read_with_the_configuration_beside_it(folder: Path) -> None:
    assert load_model(folder / "model.safetensors").digest == load_model(folder).digest


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_dtypes(folder: Path, stored: torch.dtype, asked: torch.dtype | None) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.to(stored) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    weights = load_model(folder, dtype=asked).weights
    assert {tensor.dtype for tensor in weights.values()} == {asked or stored}
    expected = tensors["model.norm.weight"].to(asked or stored)
    assert torch.equal(weights["norm.weight"], expected)


def test_weights_outlive_their_file(folder: Path) -> None:
    weights = load_model(folder).weights
    before = weights["norm.weight"].clone()
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert torch.equal(weights["norm.weight"], before)


def test_digest_changes_with_weights_and_configuration(folder: Path) -> None:
    digest = open_checkpoint(folder).digest
    assert open_checkpoint(folder).digest == digest
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace("10000.0", "20000.0"))
    assert open_checkpoint(folder).digest != digest
    config.write_text(text)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    assert open_checkpoint(folder).digest != digest


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "..",
        "",
        5,
        None,
        "a\0",
        "gone.safetensors",
    ],
)
def test_index_names_only_files_beside_it(folder: Path, name: object) -> None:
    weight_map = {**_shard(folder), "model.norm.weight": name}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError) as refused:
        load_model(folder)
    assert str(folder.parent) not in str(refused.value)


@pytest.mark.parametrize("place", ["..", "sub"])
def test_a_whole_file_elsewhere_is_not_taken(folder: Path, place: str) -> None:
    """The file is valid and complete, so only the check of its name can refuse it."""
    weight_map = _shard(folder)
    (folder / place).mkdir(exist_ok=True)
    (folder / "b.safetensors").rename(folder / place / "b.safetensors")
    moved = {
        name: f"{place}/{file}" if file == "b.safetensors" else file
        for name, file in weight_map.items()
    }
    (folder / INDEX).write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_model(folder)


def test_index_and_files_must_agree(folder: Path) -> None:
    weight_map = _shard(folder)
    removed = weight_map.pop("model.norm.weight")
    assert removed == "b.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="1 tensors differ"):
        load_model(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"weight_map": []}', "[" * 200_000, "\xff"]
)
def test_malformed_json_is_refused(folder: Path, text: str) -> None:
    _shard(folder)
    for name in (INDEX, "config.json"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError):
            load_model(folder)
        (folder / name).write_bytes(kept)


def _safetensors(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95pickle",
        b"PK\x03\x04 a zip",
        b"GGML" + bytes(64),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**8) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        _safetensors({"t": _entry([4], 0, 16)}),
        _safetensors({"t": _entry([4], 0, 2**62)}, bytes(16)),
        _safetensors({"t": _entry([4], -16, 0)}, bytes(16)),
        _safetensors({"t": _entry([2**40, 2**40], 0, 16)}, bytes(16)),
        _safetensors({"t": _entry([5], 0, 16)}, bytes(16)),
        _safetensors({"a": _entry([4], 0, 16), "b": _entry([4], 8, 24)}, bytes(24)),
        _safetensors({"t": _entry([4], 16, 32)}, bytes(32)),
        _safetensors({"t": _entry([2], 0, 16, "I64")}, bytes(16)),
    ],
)
def test_malformed_files_are_refused(folder: Path, content: bytes) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(content)
    for path in (folder, file):
        with pytest.raises(CheckpointError) as refused:
            load_model(path)
        assert str(folder.parent) not in str(refused.value)


def test_integers_are_no_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="float32, float16 or bfloat16"):
        load_model(folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", ""])
def test_missing_files_are_refused(folder: Path, missing: str) -> None:
    if missing:
        (folder / missing).unlink()
    with pytest.raises(CheckpointError) as refused:
        load_model(folder if missing else folder / "no-such-folder")
    assert str(folder.parent) not in str(refused.value)


@pytest.mark.parametrize("seed", range(5))
def test_mutations_load_or_are_refused(folder: Path, seed: int) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(seed)
    for _ in range(25):
        mutated = bytearray(whole)
        at = rng.choice([rng.randrange(16), rng.randrange(header)])
        mutated[at] = rng.choice([mutated[at] ^ 1 << rng.randrange(8), 0, 0xFF])
        if rng.random() < 0.2:
            del mutated[rng.randrange(len(mutated)) :]
        file.write_bytes(mutated)
        with contextlib.suppress(CheckpointError):
            load_model(folder)
