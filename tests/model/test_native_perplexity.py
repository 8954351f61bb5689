"""What 8 and 4 bits cost the default model, on a fixed text, and its answers bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loadtest.bench.cpu.perplexity import TEXT, perplexity, runners, scoring_batch
from model.batch import Ints
from model.checkpoint import LoadedModel, load_model, open_model
from model.native.library import NativeLibrary
from model.runners import RunnerOptions
from model.runners.native import NativeRunner
from model.text.tokenizer import Tokenizer
from tests.support.builders import at_length

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

WINDOW = 512


@pytest.fixture(scope="module")
def model(default_model: Path) -> LoadedModel:
    return load_model(default_model)


@pytest.fixture(scope="module")
def windows(default_model: Path) -> list[Ints]:
    text = TEXT.read_text(encoding="utf-8")
    ids = np.array(Tokenizer.from_checkpoint(default_model).encode(text), np.int32)
    assert len(ids) > 10_000
    count = len(ids) // WINDOW
    return np.split(ids[: count * WINDOW], count)


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize(("count", "within"), [(2, 0.02), *at_length((None, 0.01))])
def test_perplexity_stays_the_same(
    model: LoadedModel,
    windows: list[Ints],
    default_model: Path,
    count: int | None,
    within: float,
) -> None:
    """Of the whole text within one percent, of its first two windows within two."""
    found = {}
    for name, build in runners(model, WINDOW, path=default_model):
        if name.startswith("torch bfloat16"):
            continue
        runner = build()
        found[name] = perplexity(runner, windows[:count])
        runner.close()
    exact = found.pop("torch float32")
    assert len(found) == 3
    for name, value in found.items():
        assert abs(value / exact - 1) < within, (name, value, exact)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_real_shapes_give_equal_bits(
    default_model: Path, windows: list[Ints], native_library: NativeLibrary, dtype: str
) -> None:
    """Every variant but the slow portable one, with one thread and with two."""
    model = open_model(default_model, four_bit=dtype == "int4")
    batch = scoring_batch(windows[0][:300], block_size=16)
    found = []
    for variant in native_library.variants[:-1]:
        for threads in (1, 2):
            options = RunnerOptions(dtype=dtype, num_blocks=32, num_threads=threads)
            runner = NativeRunner(
                model.config, model.weights, digest=model.digest, variant=variant,
                options=options, library=native_library,
            )  # fmt: skip
            found.append(runner.run(batch).score_logprobs_Q)
            runner.close()
    assert all(np.array_equal(one, found[0]) for one in found)
