"""Requantised files: another type, the same model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from loadtest.bench.peers.convert import main_type, path_of, requantise


@pytest.mark.parametrize(("kind", "error"), [("Q4_0", 0.12), ("Q8_0", 0.01)])
def test_a_requantised_file_differs_in_the_type_of_its_layers_alone(
    kind: str, error: float, small_gguf: Path, tmp_path: Path
) -> None:
    target = path_of(small_gguf, kind, folder=tmp_path / "models")
    requantise(small_gguf, target, kind=kind)
    old, new = gguf.GGUFReader(small_gguf), gguf.GGUFReader(target)
    assert main_type(target) == kind
    assert list(old.fields) == list(new.fields)
    changed = [n for n in old.fields if old.fields[n].contents() != new.fields[n].contents()]
    assert changed == ["general.file_type"]
    assert new.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    for before, after in zip(old.tensors, new.tensors, strict=True):
        assert (before.name, list(before.shape)) == (after.name, list(after.shape))
        is_layer = before.name.endswith("ffn_up.weight")
        assert after.tensor_type.name == (kind if is_layer else before.tensor_type.name)
        values = [gguf.quants.dequantize(t.data, t.tensor_type) for t in (before, after)]
        far = np.linalg.norm(values[1] - values[0]) / np.linalg.norm(values[0])
        assert far < (error if is_layer else 1e-9)


def test_the_file_s_own_type_is_the_file_itself(small_gguf: Path, tmp_path: Path) -> None:
    content = small_gguf.read_bytes()
    assert path_of(small_gguf, "Q4_1", folder=tmp_path) == small_gguf
    requantise(small_gguf, small_gguf, kind="Q4_1")
    assert small_gguf.read_bytes() == content
