"""The model of the roof on paper: its arithmetic, its launches, and the table in the docs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from loadtest.bench.gpu.roof_model import (
    CASES,
    Chip,
    host_lines,
    host_seconds,
    launches,
    lines,
    predict,
    product_lines,
)
from model.runners import RunnerOptions
from model.runners.cuda.build import build_runner
from tests.support.builders import Piece, make_batch, tiny_model_config, tiny_weights

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_docs_have_the_models_table() -> None:
    text = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    for table in (lines(Chip()), host_lines(Chip()), product_lines(Chip())):
        assert "\n".join(table) in text, "python -m loadtest.bench gpu-model"


def test_float8_halves_what_a_step_reads() -> None:
    """But for embedding and head, which a small model has most of."""
    for case in CASES:
        if case.float8:
            plain = replace(case, float8=False)
            saved = predict(plain, Chip())["products"] / predict(case, Chip())["products"]
            assert 1.5 < saved < 2


@pytest.mark.slow
def test_no_step_is_above_the_roof_and_an_ideal_chip_is_at_it() -> None:
    ideal = Chip(copy=1.0, stream=1.0, gap=0.0, latency=1e-12)
    for case in CASES:
        assert 0 < predict(case, Chip())["of roof"] < 1
        greedy = replace(case, greedy=True)
        assert predict(greedy, ideal)["of roof"] == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it counts launches of the interpreter")
@pytest.mark.parametrize("layers", [1, 2])
def test_a_step_launches_as_many_kernels_as_the_model_says(
    monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    """Of our own kernels; a sampled step has a copy of torch's as well."""
    config = tiny_model_config(num_layers=layers, hidden_size=16, intermediate_size=24)
    options = RunnerOptions(
        dtype="float32", device="cpu", block_size=4, num_blocks=4, max_sequences=1,
        max_batch_tokens=4,
    )  # fmt: skip
    runner = build_runner(
        config, tiny_weights(config), options=options, digest="0" * 64, check=None
    )
    counted: list[str] = []
    launch = GridExecutor.__call__

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counting)
    with torch.inference_mode():
        runner._graphs.greedy.run(1)
        assert len(counted) == launches(layers, greedy=True), counted
        counted.clear()
        runner._graphs.forward.run(1)
        runner._graphs.sample.run(1)
        assert len(counted) == launches(layers, greedy=False) - 1, counted
    counted.clear()
    monkeypatch.setattr(runner._mixed_graphs.graphs, "replay", lambda _: None)
    runner.run(make_batch([Piece(tokens=[1, 2, 3], count=3, blocks=[0])]))
    alone = Chip(launch=1.0, replay=0.0)
    assert len(counted) == host_seconds(layers, alone, captured=True), counted
