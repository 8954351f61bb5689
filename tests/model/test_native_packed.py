"""Packed weights on disk: a runner that reads them is the runner that computed them, bit by bit."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.config import ModelConfig
from model.native import packed
from model.native.library import NativeLibrary
from model.runners import RunnerOptions
from model.runners.native import NativeRunner
from tests.support.builders import Piece, make_batch, tiny_weights

TEXT = [*range(97)] * 2


class Unread(Mapping[str, Any]):
    """Weights that must not be read."""

    def __getitem__(self, name: str) -> Any:
        raise AssertionError(f"{name} was read")

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def _small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_STORED", 1)


@pytest.fixture
def config(native_config: Callable[..., ModelConfig]) -> ModelConfig:
    """With everything that a checkpoint can bring."""
    return native_config(qkv_bias=True, qk_norm=True)


@pytest.fixture
def bits(native_library: NativeLibrary, config: ModelConfig) -> Callable[..., bytes]:
    """The bits of a step of a new runner, by default over weights that must be in the cache."""

    def compute(
        cache: Path | None, weights: Mapping[str, Any] | None = None, *, digest: str = "0" * 64
    ) -> bytes:
        runner = NativeRunner(
            config, Unread() if weights is None else weights, digest=digest,
            options=RunnerOptions(num_blocks=16, num_threads=2, weights_cache=cache),
            library=native_library,
        )  # fmt: skip
        try:
            scores = dict.fromkeys(range(len(TEXT)), 5)
            output = runner.run(
                make_batch([Piece(tokens=TEXT, blocks=range(13), count=len(TEXT), scores=scores)])
            )
            return output.score_logprobs_Q.tobytes()
        finally:
            runner.close()

    return compute


def test_a_hit_gives_the_same_bits_and_reads_no_weights(
    bits: Callable[..., bytes], config: ModelConfig, tmp_path: Path
) -> None:
    weights, cache = tiny_weights(config), tmp_path / "cache"
    computed = bits(None, weights)
    assert bits(cache, weights) == computed
    assert bits(cache) == computed
    other = tiny_weights(config, seed=1)
    assert bits(cache, other, digest="1" * 64) == bits(None, other) != computed


@pytest.mark.parametrize("damage", ["a bit", "cut", "head", "longer head", "empty", "other key"])
def test_a_damaged_file_is_computed_again(
    damage: str,
    bits: Callable[..., bytes],
    config: ModelConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also if the damage is in padding, which no result shows: it is the memory's from then on."""
    weights = tiny_weights(config)
    computed = bits(tmp_path, weights)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    start = whole.index(b"\n") + 1
    for seed in range(3):
        draw = random.Random(seed)
        at = draw.randrange(start, len(whole))
        file.write_bytes({
            "a bit": whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :],
            "cut": whole[:at],
            "head": whole[: draw.randrange(start - 1)] + b"x" + whole[start:],
            "longer head": b" " * 100_000 + whole,
            "empty": b"",
            "other key": whole.replace(b'"key": "', b'"key": "x', 1),
        }[damage])  # fmt: skip
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert bits(tmp_path, weights) == computed
        assert "damaged" in caplog.text
        assert file.read_bytes() == whole
        assert bits(tmp_path) == computed


def test_without_a_folder_to_write_to_weights_are_computed(
    bits: Callable[..., bytes], config: ModelConfig, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    weights = tiny_weights(config)
    for cache in (file, file / "below"):
        assert bits(cache, weights) == bits(None, weights)


def test_the_folder_stays_small(
    bits: Callable[..., bytes], config: ModelConfig, tmp_path: Path
) -> None:
    """The files used last are kept, whole, and nothing else is left over."""
    weights = tiny_weights(config)
    for index in range(7):
        bits(tmp_path, weights, digest=str(index) * 64)
        for order, path in enumerate(sorted(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime)):
            assert path.suffix == ".weights"
            os.utime(path, (order, order))  # clocks of file systems are coarse
        bits(tmp_path, digest="0" * 64)
    assert len(list(tmp_path.iterdir())) == 4
    for index in (0, 4, 5, 6):
        bits(tmp_path, digest=str(index) * 64)


def test_small_models_are_not_stored(
    bits: Callable[..., bytes], config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "LEAST_STORED", 10**9)
    bits(tmp_path, tiny_weights(config))
    assert not list(tmp_path.iterdir())


def test_every_byte_that_a_step_reads_is_stored(
    native_library: NativeLibrary, config: ModelConfig, tmp_path: Path
) -> None:
    """Memory is compared, not results: padding counts, and so does what this text never reads."""
    memories = []
    for weights in (tiny_weights(config), Unread()):
        runner = NativeRunner(
            config, weights, digest="0" * 64, library=native_library,
            options=RunnerOptions(num_blocks=1, num_threads=1, weights_cache=tmp_path),
        )  # fmt: skip
        memories.append([memory.copy() for memory in runner._model.weights()])
        runner.close()
    assert all(np.array_equal(*pair) for pair in zip(*memories, strict=True))
    assert sum(memory.nbytes for memory in memories[0]) > 100_000
