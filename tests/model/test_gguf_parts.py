"""Models in several GGUF files: equal to one file, whichever is named; what is missing is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from model.checkpoint import CheckpointError, find_gguf, load_model, open_checkpoint
from model.checkpoint.gguf_parts import first_part, name_without_part
from model.text.tokenizer import Tokenizer
from tests.support.tiny_model import TinyModel


@pytest.fixture
def parts(tiny_model: TinyModel, tmp_path: Path) -> list[Path]:
    """A model in several files, as llama.cpp's own writer splits it."""
    folder = tmp_path / "split"
    folder.mkdir()
    tiny_model.write_gguf(folder / "tiny.gguf", split=6)
    files = sorted(folder.glob("*.gguf"))
    assert [file.name for file in files] == [f"tiny-0000{n}-of-00004.gguf" for n in (1, 2, 3, 4)]
    return files


def test_equals_the_model_in_one_file(
    tiny_model: TinyModel, tmp_path: Path, parts: list[Path]
) -> None:
    whole = tiny_model.write_gguf(tmp_path / "tiny.gguf")
    expected, tokenizer = load_model(whole), Tokenizer.from_checkpoint(whole)
    for path in (*parts, parts[0].parent):
        model = load_model(path)
        assert model.config == expected.config
        assert model.weights.keys() == expected.weights.keys()
        assert all(
            torch.equal(model.weights[name], expected.weights[name]) for name in model.weights
        )
        assert Tokenizer.from_checkpoint(path).token_bytes == tokenizer.token_bytes


def test_digest_is_of_every_file(parts: list[Path]) -> None:
    digest = open_checkpoint(parts[0]).digest
    assert open_checkpoint(parts[2]).digest == digest
    for part in parts:
        content = part.read_bytes()
        part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert open_checkpoint(parts[0]).digest != digest
        part.write_bytes(content)


def test_missing_files_are_named(parts: list[Path]) -> None:
    for missing in (parts[1], parts[3]):
        missing.unlink()
    message = "missing: tiny-00002-of-00004.gguf, tiny-00004-of-00004.gguf$"
    for read in (load_model, Tokenizer.from_checkpoint):
        with pytest.raises(CheckpointError, match=message):
            read(parts[2])
    parts[0].unlink()
    with pytest.raises(CheckpointError, match=r"tiny-00001-of-00004\.gguf"):
        load_model(parts[2])


def test_files_must_belong_together(parts: list[Path]) -> None:
    renamed = parts[0].with_name("renamed.gguf")
    shutil.copy(parts[0], renamed)
    with pytest.raises(CheckpointError, match=r"NAME-00001-of-00004\.gguf"):
        load_model(renamed)
    renamed.unlink()
    shutil.copy(parts[1], parts[2])
    with pytest.raises(CheckpointError, match=r"tiny-00003-of-00004.gguf: it is no part 3 of 4"):
        load_model(parts[0])


def test_a_folder_of_two_models_names_neither(tiny_model: TinyModel, parts: list[Path]) -> None:
    folder = parts[0].parent
    assert find_gguf(folder) == parts[0]
    tiny_model.write_gguf(folder / "other.gguf")
    with pytest.raises(CheckpointError, match="2 GGUF models; name one of them"):
        find_gguf(folder)


def test_names() -> None:
    assert first_part(Path("a/x-00003-of-00012.gguf")) == Path("a/x-00001-of-00012.gguf")
    assert first_part(Path("a/x-3-of-12.gguf")) == Path("a/x-3-of-12.gguf")
    assert name_without_part("x-00001-of-00012.gguf") == "x.gguf"
    assert name_without_part("x-00001-of-00012") == "x"
    assert name_without_part("x-1") == "x-1"
