"""Fixtures for the tests of the network. The builders themselves are plain functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.runners import RunnerOptions
from model.runners.torch import TorchRunner
from tests.builders import tiny_model_config, tiny_weights


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
