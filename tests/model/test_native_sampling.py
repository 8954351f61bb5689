"""The native sampler against the torch sampler, bit by bit, in every variant of instructions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.batch import Floats, Ints, SamplingBatch, Words, mask_of
from model.config import ModelConfig
from model.native.library import NativeLibrary
from model.runners.native import NativeRunner
from model.sampler import sample, score
from tests.model.test_sampler import Row, make_sampling
from tests.support.builders import Piece, at_length, make_batch, slowly, tiny_weights

SIZES = (1, 2, 7, 31, 32, 33, 97, 300, 1023, 1025, 2050, 6001)
EACH = 20  # cases of an id


def random_row(rng: np.random.Generator, size: int) -> Row:
    """Parameters of every kind, and the ends of their ranges."""
    fields: dict[str, Any] = {
        "seed": int(rng.integers(0, 2**63)),
        "choice": int(rng.integers(0, 4)),
        "index": int(rng.integers(0, 5000)),
        "temperature": float(rng.choice([0, 0, 1e-4, 0.2, 0.7, 1, 1.3, 3, 20])),
        "logprobs": bool(rng.random() < 0.4),
    }
    if rng.random() < 0.4:
        fields["top_k"] = int(rng.choice([1, 2, 5, 40, max(1, size // 2), size, size + 7]))
    if rng.random() < 0.4:
        fields["top_p"] = float(rng.choice([0, 1e-6, 0.1, 0.5, 0.9, 0.99, 0.999999]))
    if rng.random() < 0.3:
        fields["min_p"] = float(rng.choice([0.001, 0.05, 0.5, 1]))
    if rng.random() < 0.4:
        fields |= {"presence": float(rng.normal()), "frequency": float(rng.normal())}
        fields["repetition"] = float(rng.choice([1, 0.7, 1.3]))
        seen = rng.choice(size, size=min(size, int(rng.integers(1, 20))), replace=False)
        fields["seen"] = {int(token): int(rng.integers(0, 4)) for token in seen}
    if rng.random() < 0.4:
        ids = range(size) if size < 400 and rng.random() < 0.2 else rng.integers(0, size, size=8)
        values = [-math.inf] if isinstance(ids, range) else [-math.inf, 1.5, -3, 100]
        fields["bias"] = tuple((int(token), float(rng.choice(values))) for token in ids)
    return Row(**fields)


def random_mask(rng: np.random.Generator, size: int) -> Words:
    """One token, a few, half of them, or all but one."""
    count = (1, min(5, size), max(1, size // 2), max(1, size - 1))[rng.integers(4)]
    return mask_of(rng.choice(size, size=count, replace=False).tolist(), vocab_size=size)


def random_logits(rng: np.random.Generator, rows: int, size: int) -> Floats:
    """Normal ones, flat or steep; rounded, so that many are equal; all equal; with minus zeros; or
    a few far above the others.
    """
    logits = rng.normal(size=(rows, size)) * rng.choice([0.1, 1, 3, 10])
    kind = rng.integers(5)
    if kind == 1:
        logits = np.round(logits)
    if kind == 2:
        logits = np.zeros_like(logits)
    if kind == 3:
        logits[logits < 0] = -0.0
    if kind == 4:
        places = rng.integers(0, size, size=(rows, 6))
        high = logits.max() + rng.uniform(0, 15, size=(rows, 6))
        np.put_along_axis(logits, places, high, axis=1)
    single: Floats = logits.astype(np.float32)
    return single


def random_case(seed: int, sizes: tuple[int, ...]) -> tuple[Floats, SamplingBatch]:
    rng = np.random.default_rng(seed)
    size, rows = int(rng.choice(sizes)), int(rng.integers(1, 7))
    sampling = make_sampling(
        [random_row(rng, size) for _ in range(rows)],
        vocab_size=size,
        num_top=int(rng.choice([0, 1, 5, 20])),
    )
    masked = [row for row in range(rows) if rng.random() < 0.4]
    if masked:
        masks = np.stack([random_mask(rng, size) for _ in masked])
        rows_M = np.array(masked, np.int32)
        sampling = replace(sampling, mask_rows_M=rows_M, masks_MW=masks)
    return random_logits(rng, rows, size), sampling


def check(library: NativeLibrary, seed: int, sizes: tuple[int, ...]) -> None:
    logits, sampling = random_case(seed, sizes)
    expected = sample(torch.from_numpy(logits.copy()), sampling)
    wants = sampling.wants_logprobs_R
    for variant in library.variants:
        found = library.sample(logits.copy(), sampling, variant=variant)
        assert np.array_equal(found.tokens_R, expected.tokens_R.numpy()), (seed, variant)
        if wants.any():
            columns = (expected.logprobs_R, expected.top_ids_RN, expected.top_logprobs_RN)
            for ours, theirs in zip(found.logprobs, columns, strict=True):
                assert np.array_equal(ours[wants], theirs.numpy()[wants]), (seed, variant)


@pytest.mark.parametrize("block", [*range(4), *slowly(*range(4, 10)), *at_length(*range(10, 50))])
def test_tokens_and_log_probabilities_are_those_of_the_torch_sampler(
    block: int, native_library: NativeLibrary
) -> None:
    """Random parameters over random logits. Of flat ones, whose borders are closer together than an
    approximate mass is exact, many draws take the exact mass.
    """
    for seed in range(block * EACH, (block + 1) * EACH):
        check(native_library, seed, SIZES)


@pytest.mark.parametrize("block", [0, *slowly(1), *at_length(*range(2, 10))])
def test_so_they_are_over_a_large_vocabulary(block: int, native_library: NativeLibrary) -> None:
    for seed in range(block * 5, (block + 1) * 5):
        check(native_library, 10_000 + seed, (49_157,))


def test_given_tokens_are_scored(native_library: NativeLibrary) -> None:
    rng = np.random.default_rng(0)
    for size in (*SIZES, 49_157):
        logits = random_logits(rng, 5, size)
        given: Ints = rng.integers(0, size, 5).astype(np.int32)
        expected = score(torch.from_numpy(logits), given, num_top=7)
        plain = SamplingBatch.plain(5, vocab_size=size, num_top=7)
        for variant in native_library.variants:
            found = native_library.sample(logits.copy(), plain, variant=variant, given_R=given)
            assert np.array_equal(found.tokens_R, given)
            assert np.array_equal(found.logprobs.logprobs, expected.logprobs_Q.numpy())
            assert np.array_equal(found.logprobs.top_ids, expected.top_ids_QN.numpy())
            assert np.array_equal(found.logprobs.top_logprobs, expected.top_logprobs_QN.numpy())


@pytest.mark.parametrize("step", [10_007, *at_length(1)])
def test_weights_are_exponentials_rounded_to_float(
    step: int, native_library: NativeLibrary
) -> None:
    """Of every `step`-th float from -2**-26 to -28.5: of all, at length."""
    first, end = (int(np.float32(x).view(np.uint32)) for x in (2**-26, 28.5))
    for start in range(first, end, step << 20):
        bits = np.arange(start, min(end, start + (step << 20)), step, dtype=np.uint32)
        x = -bits.view(np.float32)
        expected = (np.exp(x.astype(np.float64)).astype(np.float32) * 2.0**40).astype(np.int64)
        for variant in native_library.variants:
            assert np.array_equal(native_library.weigh(x, variant=variant), expected), variant


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.7])
def test_what_is_left_out_weighs_between_its_bounds(
    temperature: float, native_library: NativeLibrary
) -> None:
    """Which are so close that log probabilities are known from them, as a rule."""
    rng = np.random.default_rng(0)
    for size in (1, 16, 127, 128, 1000, 49_157):
        for scale in (1, 3, 6):
            x = -np.abs(rng.normal(size=size) * scale * temperature).astype(np.float32)
            x[rng.integers(size)] = 0.0
            bound = np.float32(-8.5 * temperature)
            rest = x[x <= bound] / np.float32(temperature)
            for variant in native_library.variants:
                places, low, high = native_library.partition(
                    x, temperature=temperature, bound=float(bound), variant=variant
                )
                assert np.array_equal(places, np.flatnonzero(x > bound))
                exact = int(native_library.weigh(rest, variant=variant).sum())
                assert low <= exact <= high <= exact * (1 + 2**-15) + 1, (size, scale, variant)


@pytest.mark.slow
def test_top_p_draws_from_a_few_far_above_the_others(native_library: NativeLibrary) -> None:
    """An estimate of how deep top-p reaches missed them, and one of them was counted twice."""
    rng = np.random.default_rng(0)
    size = 49_152
    logits = (rng.normal(size=(6, size)) - 18).astype(np.float32)
    logits[:, 39:42] = (-3.01, -0.95, 0.0)  # the estimate reads the first 16 of each 256
    rows = [Row(seed=i, temperature=1.0, top_p=0.99, min_p=1e-11 * (i % 2)) for i in range(6)]
    for seed in range(10):
        sampling = make_sampling([replace(row, index=seed) for row in rows], vocab_size=size)
        expected = sample(torch.from_numpy(logits), sampling).tokens_R.numpy()
        for variant in native_library.variants:
            found = native_library.sample(logits.copy(), sampling, variant=variant)
            assert np.array_equal(found.tokens_R, expected), (seed, variant)


def test_invalid_columns_are_refused(native_library: NativeLibrary) -> None:
    """Each would be an index outside of an array."""
    plain = SamplingBatch.plain(2, vocab_size=40)
    one, far = np.ones(1, np.int32), np.full(1, 40, np.int32)
    falling = np.array([1, 0], np.int32)
    floats, masks = np.zeros(2, np.float32), np.ones((2, 2), np.uint32)
    bad: list[dict[str, Any]] = [
        {"top_ks_R": np.zeros(2, np.int32)},
        {"bias_rows_E": one * 2, "bias_ids_E": one, "bias_values_E": floats},
        {"bias_rows_E": -one, "bias_ids_E": one, "bias_values_E": floats},
        {"bias_rows_E": one, "bias_ids_E": far, "bias_values_E": floats},
        {"bias_rows_E": falling, "bias_ids_E": falling, "bias_values_E": floats},
        {"penalty_rows_P": one, "penalty_ids_P": -one, "penalty_counts_P": one},
        {"mask_rows_M": falling, "masks_MW": masks},
        {"mask_rows_M": one * 2, "masks_MW": masks},
    ]
    for columns in bad:
        with pytest.raises(ValueError, match="invalid"):
            native_library.sample(
                np.zeros((2, 40), np.float32), replace(plain, **columns), variant="portable"
            )


def test_a_row_that_is_not_finite_gives_some_token(native_library: NativeLibrary) -> None:
    rng = np.random.default_rng(1)
    for seed in range(60):
        rows = [random_row(rng, 300) for _ in range(3)]
        logits = random_logits(rng, 3, 300)
        logits[:, :: (1, 2, 7)[seed % 3]] = np.nan
        sampling = make_sampling(rows, vocab_size=300, num_top=5)
        for variant in native_library.variants:
            found = native_library.sample(logits.copy(), sampling, variant=variant)
            assert ((found.tokens_R >= 0) & (found.tokens_R < 300)).all()


def test_forced_tokens_need_no_logits_and_change_no_other_row(
    native_config: Callable[..., ModelConfig], native: Callable[..., NativeRunner]
) -> None:
    """Rows with a single allowed token are left out of the head, first, last and in between."""
    config = native_config()
    runner = native(config, tiny_weights(config))
    columns: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 3}, {"logprobs": True}]
    pieces = [
        Piece(tokens=[3, 1 + i, 4], blocks=[i], count=3, sampling=columns[i % 3]) for i in range(9)
    ]
    free = make_batch(pieces, num_top=2)
    expected = runner.run(free)
    for forced in ({0}, {8}, {3, 4}, {0, 1, 2, 5, 8}, set(range(9))):
        rows_M = np.array(sorted(forced), np.int32)
        masks_MW = np.stack([mask_of([90 - row], vocab_size=97) for row in sorted(forced)])
        sampling = replace(free.sampling, mask_rows_M=rows_M, masks_MW=masks_MW)
        found = runner.run(replace(free, sampling=sampling))
        for row in range(9):
            token = 90 - row if row in forced else expected.tokens_R[row]
            assert found.tokens_R[row] == token
            if columns[row % 3].get("logprobs"):
                assert np.array_equal(found.top_logprobs_RN[row], expected.top_logprobs_RN[row])
