"""Fixtures for the tests of the network. The builders themselves are plain functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.native import NativeUnavailable
from model.native.library import NO_WINDOW, NativeLibrary, Shape
from model.runners import RunnerOptions
from model.runners.native import NativeRunner
from model.runners.torch import TorchRunner
from tests.support.builders import tiny_model_config, tiny_weights


@pytest.fixture
def tiny_config() -> ModelConfig:
    return tiny_model_config()


@pytest.fixture
def tiny_runner() -> Callable[..., TorchRunner]:
    """Builds a runner over a tiny random model; keywords are options of the runner."""

    def build(
        config: ModelConfig | None = None,
        weights: dict[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> TorchRunner:
        config = config or tiny_model_config()
        fields = {"dtype": "float32", "device": "cpu", "block_size": 4, "num_blocks": 64, **options}
        weights = tiny_weights(config) if weights is None else weights
        return TorchRunner(config, weights, options=RunnerOptions(**fields), digest="0" * 64)

    return build


@pytest.fixture(scope="session")
def native_library() -> NativeLibrary:
    """The native library, compiled where it is not in the cache; skips where it cannot be."""
    try:
        return NativeLibrary()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def native_variants(native_library: NativeLibrary) -> list[str]:
    """Variants this machine can run, best first."""
    return native_library.variants


@pytest.fixture
def native_config() -> Callable[..., ModelConfig]:
    """Builds the smallest model that the native step serves; keywords are its fields."""

    def build(**overrides: Any) -> ModelConfig:
        sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
        return tiny_model_config(**{**sizes, **overrides})

    return build


@pytest.fixture
def tiny_shape() -> Shape:
    """A native model with no weights loaded."""
    return Shape(
        vocab=8, hidden=32, layers=2, heads=2, kv_heads=1, dim=16, width=32, block_size=16,
        num_blocks=2, max_rows=4, hadamard=32, qkv_bias=False, qk_norm=False, wide_cache=True,
        threads=1, compute_threads=1, compute_rows=32, norm_eps=1e-5, windows=[NO_WINDOW] * 2,
        has_rotary=[True] * 2, cosines=np.ones((32, 8), np.float32),
        sines=np.zeros((32, 8), np.float32),
    )  # fmt: skip


@pytest.fixture
def native(native_library: NativeLibrary) -> Iterator[Callable[..., NativeRunner]]:
    """Builds native runners, closed at the end; keywords are options, and `variant`."""
    opened: list[NativeRunner] = []

    def build(
        config: ModelConfig, weights: dict[str, torch.Tensor], *, variant: str = "", **options: Any
    ) -> NativeRunner:
        fields = {"num_blocks": 160, "num_threads": 2, **options}
        opened.append(
            NativeRunner(
                config, weights, options=RunnerOptions(**fields), digest="0" * 64,
                variant=variant, library=native_library,
            )
        )  # fmt: skip
        return opened[-1]

    yield build
    for runner in opened:
        runner.close()
