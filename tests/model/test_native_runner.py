"""The native runner: near the reference, and equal to itself bit by bit however a step is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from model.batch import Batch, Floats
from model.config import ModelConfig, Norm, RopeScaling
from model.families import family_of
from model.native.library import NativeStep
from model.native.sampling import logits_room
from model.runners import RunnerOptions, keeps_logits
from model.runners.choose import choose_runner
from model.runners.exactness import ExactnessCheck, check_exactness
from model.runners.native import COMPUTE_ROWS, NativeRunner, unsupported
from model.runners.torch import TorchRunner
from model.sampler import sample
from tests.support.builders import (
    Piece,
    make_batch,
    make_sampling,
    slowly,
    tiny_model_config,
    tiny_weights,
)

Build = Callable[..., NativeRunner]

LONG = 300  # more than one split of the attention


def tokens(count: int, *, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 97, count)]


def blocks(count: int, *, seed: int = 0, size: int = 16, pool: int = 160) -> list[int]:
    """Scattered blocks, enough for `count` tokens."""
    return [int(b) for b in np.random.default_rng(seed).permutation(pool)[: -(-count // size)]]


def scores(
    runner: NativeRunner | TorchRunner, text: Sequence[int], own: Sequence[int], chunk: int
) -> Floats:
    """Log probabilities of token 5 after each token of a text, computed `chunk` tokens a step."""
    parts = []
    for start in range(0, len(text), chunk):
        part = text[: start + chunk]
        count = len(part) - start
        piece = Piece(
            tokens=part,
            blocks=own,
            count=count,
            sample=False,
            scores=dict.fromkeys(range(count), 5),
        )
        parts.append(runner.run(make_batch([piece])).score_logprobs_Q)
    return np.concatenate(parts)


VARIATIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tied_head": True},
    "odd hidden size": {"hidden_size": 96, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32},
    "wide heads": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64},
    "heads that are no power of two": {"head_dim": 48, "intermediate_size": 112},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "mistral": {"sliding_window": 20},
    "long window": {"sliding_window": 270},
    "smollm3": {"rope_free_layers": frozenset({1})},
    "llama 3": {
        "rope_scaling": RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=32
        )
    },
    "window in one layer": {"sliding_window": 20, "full_attention_layers": frozenset({0})},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_near_the_reference(
    name: str, native_config: Callable[..., ModelConfig], native: Build
) -> None:
    """8 bits are not 32: a wrong mask, angle or norm is far outside what they cost."""
    config = native_config(**VARIATIONS[name])
    weights = tiny_weights(config)
    options = RunnerOptions(dtype="float32", num_blocks=160)
    reference = TorchRunner(config, weights, options=options, digest="0" * 64)
    text, own = tokens(LONG), blocks(LONG)
    exact = scores(reference, text, own, LONG)
    for kv_dtype in ("bfloat16", "int8"):
        found = scores(native(config, weights, kv_dtype=kv_dtype), text, own, LONG)
        error = float(np.sqrt(np.mean((found - exact) ** 2)) / exact.std())
        assert error < 0.12, kv_dtype


def test_the_reference_test_can_fail(
    native_config: Callable[..., ModelConfig], native: Build
) -> None:
    """The same measure, between models that differ in one flag."""
    config = native_config()
    weights = tiny_weights(config)
    text, own = tokens(LONG), blocks(LONG)
    plain = scores(native(config, weights), text, own, LONG)
    for change in ({"sliding_window": 290}, {"rope_free_layers": frozenset({1})}):
        other = scores(native(replace(config, **change), weights), text, own, LONG)
        changed = slice(290, None) if "sliding_window" in change else slice(None)
        assert not np.array_equal(other[changed], plain[changed])
    far = scores(
        native(native_config(rope_free_layers=frozenset({0, 1})), weights), text, own, LONG
    )
    assert np.sqrt(np.mean((far - plain) ** 2)) / plain.std() > 0.3


@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("window", [None, 20, 270])
def test_a_token_is_seen_exactly_where_it_should_be(
    head_dim: int, window: int | None, native_config: Callable[..., ModelConfig], native: Build
) -> None:
    """One layer: another token at p changes answers at p .. p + window - 1, and no other.

    Rounding to 8 bits swallows a change now and then, so not each answer there must change.
    """
    config = native_config(num_layers=1, head_dim=head_dim, sliding_window=window)
    runner = native(config, tiny_weights(config))
    text = tokens(LONG)
    before = scores(runner, text, blocks(LONG), 64)
    at_the_end = 0
    for place in (0, 1, 15, 16, 17, 255, 256, 257, 271, 272, 298, 299):
        changed = [*text]
        changed[place] = (text[place] + 1) % 97
        after = scores(runner, changed, blocks(LONG), 64)
        end = LONG if window is None else min(LONG, place + window)
        seen = np.flatnonzero(after != before)
        assert seen.min(initial=LONG) == place
        assert seen.max(initial=0) < end
        assert len(seen) > 0.7 * (end - place)
        at_the_end += int(seen.max(initial=0) == end - 1)
    assert at_the_end > 6


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    "name", ["llama", *slowly("wide heads", "qwen3", "mistral", "long window")]
)
def test_chunks_blocks_and_threads_change_no_bit(
    name: str, kv_dtype: str, native_config: Callable[..., ModelConfig], native: Build
) -> None:
    config = native_config(**VARIATIONS[name])
    weights = tiny_weights(config)
    text = tokens(LONG)
    runner = native(config, weights, kv_dtype=kv_dtype, num_threads=1)
    whole = scores(runner, text, blocks(LONG, seed=1), LONG)
    for chunk in (1, 7, 64):
        found = scores(runner, text, blocks(LONG, seed=chunk), chunk)
        assert np.array_equal(found, whole), chunk
    threaded = native(config, weights, kv_dtype=kv_dtype, num_threads=3)
    for chunk in (1, 64, LONG):
        assert np.array_equal(scores(threaded, text, blocks(LONG, seed=2), chunk), whole), chunk
    wide = native(config, weights, kv_dtype=kv_dtype, block_size=64)
    assert np.array_equal(scores(wide, text, blocks(LONG, size=64, pool=40), 64), whole)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, *slowly(1)])
def test_every_way_through_every_variant_gives_the_same_bits(
    threads: int,
    native_config: Callable[..., ModelConfig],
    native: Build,
    native_variants: list[str],
) -> None:
    """Tokens and log probabilities, sampled: alone, in a batch, chunked, cached and recomputed."""
    config = native_config(max_model_len=512)
    weights = tiny_weights(config)
    trial = ExactnessCheck(prompt=260, answer=4, beside=(2, 32), chunks=(1, 7, 64))
    for variant in native_variants:
        runner = native(
            config, weights, variant=variant, num_threads=threads, num_blocks=33 * 17,
            max_batch_tokens=33 * 260,
        )  # fmt: skip
        found = check_exactness(runner, trial)
        assert len(found) == 12
        assert all(found.values()), (variant, found)


def test_the_number_of_threads_of_a_step_changes_no_bit(
    native_config: Callable[..., ModelConfig], native: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three threads for a few rows and one for many, as where two processors share a core."""
    config = native_config()
    weights = tiny_weights(config)
    expected = scores(native(config, weights, num_threads=2), tokens(LONG), blocks(LONG), 64)
    monkeypatch.setattr("model.runners.native.usable_cores", lambda: 1)
    runner = native(config, weights, num_threads=3)
    for chunk in (COMPUTE_ROWS - 1, COMPUTE_ROWS, COMPUTE_ROWS + 1, LONG):
        found = scores(runner, tokens(LONG), blocks(LONG), chunk)
        assert np.array_equal(found, expected), chunk


def test_variants_agree_in_every_bit(
    native_config: Callable[..., ModelConfig], native: Build, native_variants: list[str]
) -> None:
    config = native_config(**VARIATIONS["odd hidden size"])
    weights = tiny_weights(config)
    found = [
        scores(native(config, weights, variant=v), tokens(280), blocks(280), 70)
        for v in native_variants
    ]
    assert all(np.array_equal(one, found[0]) for one in found)


def test_neighbours_change_no_bit(native_config: Callable[..., ModelConfig], native: Build) -> None:
    """A sequence alone, and as each of 1..33 sequences of other lengths and chunks."""
    config = native_config()
    runner = native(config, tiny_weights(config), max_batch_tokens=2048)
    rng = np.random.default_rng(3)
    text = tokens(270)
    alone = scores(runner, text, range(17), 270)
    for size in (*range(1, 10), 16, 17, 32, 33):
        place = int(rng.integers(0, size))
        pieces = []
        for s in range(size):
            own = list(range(17 + s * 4, 21 + s * 4))
            length = int(rng.integers(1, 60))
            count = int(rng.integers(1, length + 1))
            pieces.append(Piece(tokens=tokens(length, seed=s), blocks=own, count=count))
        start = int(rng.integers(0, 255))
        scores(runner, text[:start], range(17), 64)
        count = 270 - start
        pieces[place] = Piece(
            tokens=text, blocks=range(17), count=count, scores=dict.fromkeys(range(count), 5)
        )
        output = runner.run(make_batch(pieces))
        assert np.array_equal(output.score_logprobs_Q, alone[start:]), size


def test_a_prefix_is_shared(native_config: Callable[..., ModelConfig], native: Build) -> None:
    """Two sequences on the same first blocks, one of which computed them."""
    runner = native(native_config(), tiny_weights(native_config()))
    text, other = tokens(100), [*tokens(64), *tokens(36, seed=9)]
    scores(runner, text, range(7), 100)
    shared = [0, 1, 2, 3, 40, 41, 42]
    piece = Piece(tokens=other, blocks=shared, count=36, scores=dict.fromkeys(range(36), 5))
    found = runner.run(make_batch([piece])).score_logprobs_Q
    assert np.array_equal(found, scores(runner, other, range(60, 67), 100)[64:])


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama", "wide heads"])
def test_what_stands_in_foreign_slots_does_not_matter(
    name: str, kv_dtype: str, native_config: Callable[..., ModelConfig], native: Build
) -> None:
    """Blocks that held NaN before: an embedding that is not finite fills them with it."""
    config = native_config(**VARIATIONS[name])
    weights = tiny_weights(config)
    weights["embed.weight"][7] = float("nan")
    runner = native(config, weights, kv_dtype=kv_dtype)
    text = [t if t != 7 else 8 for t in tokens(100)]
    clean = scores(runner, text, range(7), 33)
    assert np.isfinite(clean).all()
    assert np.isnan(scores(runner, [7] * 112, range(7), 112)).all()
    assert np.array_equal(scores(runner, text, range(7), 33), clean)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_one_element_of_a_value_that_is_not_finite_gives_no_number(
    kv_dtype: str, native_config: Callable[..., ModelConfig], native: Build
) -> None:
    config = native_config(qkv_bias=True)
    weights = tiny_weights(config)
    weights["blocks.0.attention.qkv.bias"][-1] = float("nan")
    runner = native(config, weights, kv_dtype=kv_dtype)
    assert np.isnan(scores(runner, tokens(20), range(2), 20)).all()


def test_greedy_rows_get_what_the_sampler_would_choose(
    native_config: Callable[..., ModelConfig], native: Build
) -> None:
    config = native_config()
    runner = native(config, tiny_weights(config))
    for seed in range(20):
        text = tokens(9, seed=seed)
        piece = Piece(tokens=text, blocks=[0], count=9)
        greedy = runner.run(make_batch([piece]))
        assert greedy.logprobs_R.size == 0
        wants = replace(piece, sampling={"logprobs": True})
        chosen = runner.run(make_batch([wants], num_top=3))
        assert greedy.tokens_R == chosen.tokens_R == chosen.top_ids_RN[0, 0]
        assert chosen.logprobs_R[0] == chosen.top_logprobs_RN[0, 0]


@pytest.mark.parametrize("threads", [1, 2])
def test_open_rows_return_the_logits_whose_argmax_they_take(
    native_config: Callable[..., ModelConfig], native: Build, threads: int
) -> None:
    """The same bits alone and among rows that are sampled and scored; no other row changes."""
    config = native_config()
    runner = native(config, tiny_weights(config), num_threads=threads)
    assert keeps_logits(runner)
    kinds: list[dict[str, Any]] = [{}, {}, {"temperature": 1.0}, {"logprobs": True}, {}]
    pieces = [
        Piece(tokens=tokens(9, seed=seed), blocks=[seed], count=9, sampling=kind)
        for seed, kind in enumerate(kinds)
    ]
    alone = []
    for piece in (pieces[0], pieces[1], pieces[4]):
        output = runner.run(opened(make_batch([piece]), [0]))
        alone.append(output.open_logits_LV[0].copy())
    for num, rows in enumerate(([0], [0, 1], [0, 1, 4]), start=1):
        plain = runner.run(make_batch(pieces, num_top=3))
        output = runner.run(opened(make_batch(pieces, num_top=3), rows))
        assert np.array_equal(output.open_logits_LV, alone[:num])
        assert output.tokens_R[rows].tolist() == output.open_logits_LV.argmax(-1).tolist()
        assert np.array_equal(output.tokens_R, plain.tokens_R)
        assert np.array_equal(output.top_logprobs_RN[3], plain.top_logprobs_RN[3])
    assert runner.run(make_batch(pieces)).open_logits_LV.size == 0


def opened(batch: Batch, rows: list[int]) -> Batch:
    open_rows_L = np.array(rows, np.int32)
    return replace(batch, sampling=replace(batch.sampling, open_rows_L=open_rows_L))


@pytest.mark.parametrize("threads", [1, 2])
def test_what_the_last_layer_leaves_out_is_not_missed(
    native_config: Callable[..., ModelConfig], native: Build, threads: int
) -> None:
    """It computes rows that choose a token, and all of them where any is scored: the same bits."""
    config = native_config()
    lean, whole = (
        native(config, tiny_weights(config), num_threads=threads, num_blocks=160) for _ in "ab"
    )
    for seed in range(12):
        rng = np.random.default_rng(seed)
        pieces = []
        for index in range(int(rng.integers(1, 6))):
            count = int(rng.choice([1, 2, 20, 70]))
            text = tokens(count + int(rng.integers(0, 90)), seed=seed + index)
            own = [10 * index + block for block in range(10)]
            if before := len(text) - count:  # a chunk that chooses nothing
                chunk = Piece(tokens=text[:before], blocks=own, count=before, sample=False)
                lean.run(make_batch([chunk]))
                whole.run(make_batch([replace(chunk, scores={0: 5})]))
            sampling: dict[str, Any] = {"logprobs": True} if rng.random() < 0.5 else {}
            pieces.append(
                Piece(
                    tokens=text,
                    blocks=own,
                    count=count,
                    sampling=sampling,
                    sample=bool(rng.random() < 0.8),
                )
            )
        left = lean.run(make_batch(pieces, num_top=3))
        scored = [replace(pieces[0], scores={0: 5}), *pieces[1:]]
        right = whole.run(make_batch(scored, num_top=3))
        assert np.array_equal(left.tokens_R, right.tokens_R)
        wanted = make_batch(pieces).sampling.wants_logprobs_R
        if wanted.any():
            assert np.array_equal(left.logprobs_R[wanted], right.logprobs_R[wanted])
            assert np.array_equal(left.top_logprobs_RN[wanted], right.top_logprobs_RN[wanted])


def test_rows_that_are_sampled_do_not_depend_on_greedy_ones(
    native_config: Callable[..., ModelConfig], native: Build
) -> None:
    config = native_config()
    runner = native(config, tiny_weights(config))
    columns: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 3},
        {"logprobs": True},
        {},
        {"temperature": 1.5, "seed": 2**63, "top_k": 20, "logprobs": True},
    ]
    pieces = [
        Piece(tokens=tokens(12, seed=i), blocks=[i], count=12, sampling=column)
        for i, column in enumerate(columns)
    ]
    together = runner.run(make_batch(pieces, num_top=2))
    for i, piece in enumerate(pieces):
        alone = runner.run(make_batch([piece], num_top=2))
        assert alone.tokens_R[0] == together.tokens_R[i]
        if columns[i].get("logprobs"):
            assert alone.logprobs_R[0] == together.logprobs_R[i]
            assert np.array_equal(alone.top_ids_RN[0], together.top_ids_RN[i])


def test_penalties_and_biases_follow_their_rows(
    native_config: Callable[..., ModelConfig], native: Build
) -> None:
    """Entries name rows of the whole step; the sampler sees only the rows that need it."""
    config = native_config()
    runner = native(config, tiny_weights(config))
    pieces = [Piece(tokens=tokens(5, seed=i), blocks=[i], count=5) for i in range(4)]
    batch = make_batch(pieces)
    rows = np.array([2, 3], np.int32)
    sampling = replace(
        batch.sampling,
        bias_rows_E=rows,
        bias_ids_E=np.array([11, 13], np.int32),
        bias_values_E=np.full(2, 1e4, np.float32),
    )
    plain = runner.run(batch).tokens_R
    biased = runner.run(replace(batch, sampling=sampling)).tokens_R
    assert biased.tolist() == [plain[0], plain[1], 11, 13]


def test_ties_go_to_the_lowest_token(
    native_config: Callable[..., ModelConfig], native: Build
) -> None:
    """All rows of the head equal: every logit is the same number."""
    config = native_config(vocab_size=97)
    weights = tiny_weights(config)
    weights["head.weight"][:] = weights["head.weight"][3]
    for threads in (1, 3):
        runner = native(config, weights, num_threads=threads)
        output = runner.run(make_batch([Piece(tokens=[1, 2], blocks=[0], count=2)]))
        assert output.tokens_R.tolist() == [0]
    logits = torch.zeros(1, 97)
    assert sample(logits, make_sampling([{}])).tokens_R.tolist() == [0]


def test_a_step_that_does_not_fit_is_refused(
    native_config: Callable[..., ModelConfig], native: Build
) -> None:
    runner = native(native_config(), tiny_weights(native_config()), max_batch_tokens=8)
    with pytest.raises(ValueError, match="more rows"):
        runner.run(make_batch([Piece(tokens=tokens(9), blocks=[0], count=9)]))
    with pytest.raises(ValueError, match="outside the pool"):
        runner.run(make_batch([Piece(tokens=tokens(3), blocks=[160], count=3)]))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        runner.run(make_batch([Piece(tokens=[97], blocks=[0])]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_rows_R": [2, 5]}, "output row outside the step"),
        ({"output_rows_R": [-1]}, "output row outside the step"),
        ({"output_rows_R": [2**31 - 1]}, "output row outside the step"),
        ({"output_rows_R": [0] * 9}, "more outputs"),
        ({"query_starts_S1": [0, 3, 6]}, "query_starts"),
        ({"query_starts_S1": [0, 3, 4]}, "query_starts"),
        ({"query_starts_S1": [1, 3, 5]}, "query_starts"),
        ({"query_starts_S1": [0, 2**31 - 1, 5]}, "query_starts"),
        ({"query_starts_S1": [0, -(2**31), 5]}, "query_starts"),
        ({"query_starts_S1": [0, 0, 5]}, "query_starts"),
        ({"query_starts_S1": [0, 5, 5]}, "query_starts"),
        ({"query_starts_S1": [0, 1, 2, 3, 4, 5, 5]}, "at most a sequence per row"),
        ({"positions_T": [9, 0, 1, 0, 1]}, "rise one by one"),
        ({"positions_T": [0, 1, 2, 16, 17]}, "shorter than its context"),
        ({"positions_T": [0, 1, 2, -1, 0]}, "rotary table"),
        ({"tokens_T": [1, 2, 3, 4, -1]}, "outside the vocabulary"),
        ({"block_table_SB": [[1], [-1]]}, "outside the pool"),
    ],
)
def test_every_index_of_a_step_is_checked(
    native_config: Callable[..., ModelConfig],
    native: Build,
    changes: dict[str, list[Any]],
    message: str,
) -> None:
    """The library alone, without `Batch.check`: it must not read or write outside its memory."""
    runner = native(native_config(), tiny_weights(native_config()), max_batch_tokens=8)
    fitting: dict[str, list[Any]] = {
        "tokens_T": [1, 2, 3, 4, 5],
        "positions_T": [0, 1, 2, 0, 1],
        "query_starts_S1": [0, 3, 5],
        "block_table_SB": [[1], [2]],
        "output_rows_R": [2, 4],
    }

    def step(fields: dict[str, list[Any]]) -> Any:
        arrays: dict[str, Any] = {name: np.array(value, np.int32) for name, value in fields.items()}
        return runner._model.step(NativeStep(**arrays))

    nothing: dict[str, list[Any]] = {
        "tokens_T": [],
        "positions_T": [],
        "query_starts_S1": [0],
        "block_table_SB": [[]],
    }
    with pytest.raises(ValueError, match="output row outside the step"):
        step({**nothing, "output_rows_R": [0]})  # there is no step before
    expected = step(fitting).tolist()
    with pytest.raises(ValueError, match=message):
        step({**fitting, **changes})
    assert step({**nothing, "output_rows_R": [2, 4]}).tolist() == expected
    with pytest.raises(ValueError, match="output row outside the step"):
        step({**nothing, "output_rows_R": [5]})


def test_logits_are_written_to_whole_cache_lines_only(
    native_config: Callable[..., ModelConfig], native: Build
) -> None:
    config = native_config()
    runner = native(config, tiny_weights(config))
    room_LV = logits_room(2, config.vocab_size)
    for logits_V in room_LV[0], room_LV[1], np.full(config.vocab_size + 1, np.nan, np.float32)[1:]:
        step = NativeStep(
            tokens_T=np.array([3], np.int32),
            positions_T=np.array([0], np.int32),
            query_starts_S1=np.array([0, 1], np.int32),
            block_table_SB=np.array([[0]], np.int32),
            output_rows_R=np.array([0], np.int32),
            logits={0: logits_V},
        )
        if logits_V.ctypes.data % 64 == 0:
            assert runner._model.step(step)[0] == logits_V.argmax()
        else:
            with pytest.raises(ValueError, match="must begin a cache line"):
                runner._model.step(step)


def test_families_that_fit_the_step_are_served_and_others_fall_back_with_the_reason() -> None:
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
        "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "head_dim": 16, "sliding_window": None,
    }  # fmt: skip
    for name in ("llama", "mistral", "qwen2", "qwen3"):
        family = family_of(name)
        assert unsupported(family.configure({"model_type": name, **sizes})) is None, name
    other = tiny_model_config(norm=Norm.LAYER)
    choice = choose_runner("auto", other, RunnerOptions(device="cpu"))
    assert choice.name == "torch"
    assert "RMSNorm" in choice.fallback_reason


def test_what_is_not_served_is_said(
    native_config: Callable[..., ModelConfig], native: Build
) -> None:
    assert unsupported(native_config()) is None
    assert "RMSNorm" in (unsupported(native_config(norm=Norm.LAYER)) or "")
    assert "multiple of 16" in (unsupported(native_config(head_dim=24)) or "")
    assert "biases" in (unsupported(native_config(out_bias=True)) or "")
    config = native_config()
    for options in (
        {"dtype": "bfloat16"},
        {"block_size": 8},
        {"kv_dtype": "int4"},
        {"device": "cuda"},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            native(config, tiny_weights(config), **options)


def test_keys_have_8_bits_only_where_they_can_be_spread(
    native_config: Callable[..., ModelConfig], native: Build
) -> None:
    for config, kv_dtype in (
        (native_config(head_dim=64), "int8"),
        (native_config(head_dim=80), "bfloat16"),
        (native_config(qkv_bias=True), "bfloat16"),
    ):
        weights = tiny_weights(config)
        found, named = (native(config, weights, kv_dtype=kind) for kind in ("auto", kv_dtype))
        assert found.numeric_class == named.numeric_class


def test_classes_name_what_answers_depend_on(
    native_config: Callable[..., ModelConfig], native: Build, native_variants: list[str]
) -> None:
    config = native_config()
    weights = tiny_weights(config)
    classes = {native(config, weights, variant=v).numeric_class for v in native_variants}
    assert len(classes) == 1
    assert native(config, weights, kv_dtype="int8").numeric_class in classes
    assert native(config, weights, kv_dtype="bfloat16").numeric_class not in classes
    assert native(config, weights, num_threads=2).exact


def test_memory_decides_the_number_of_blocks(
    native_config: Callable[..., ModelConfig], native: Build
) -> None:
    """In 8 bits a key and a value have a scale each."""
    config = native_config()
    weights, slots = tiny_weights(config), 2 * config.num_layers * 16
    for kv_dtype, size in (
        ("bfloat16", slots * config.kv_size * 2),
        ("int8", slots * (config.kv_size + config.num_kv_heads * 4)),
    ):
        build = partial(native, config, weights, num_blocks=None, kv_dtype=kv_dtype)
        runner = build(kv_memory=5 * size + size // 2)
        assert runner.num_blocks == 5
        runner.warm_up()
        with pytest.raises(ValueError, match=f"at least {size} bytes"):
            build(kv_memory=size - 1)


@pytest.mark.slow
def test_many_small_steps_from_many_runners(
    native_config: Callable[..., ModelConfig], native: Build
) -> None:
    """Teams begin and end, and late threads meet the next step, of another shape, when the arrays
    of their own are gone: nothing hangs or differs.
    """
    config = native_config()
    weights = tiny_weights(config)
    scored = Piece(tokens=[1], blocks=[0], scores={0: 5})
    prompt = Piece(tokens=tokens(40), blocks=[1, 2, 3], count=40)
    chunk = replace(prompt, blocks=[4, 5, 6], sample=False)
    decode = Piece(tokens=[2], blocks=[7])
    shapes = ([scored], [prompt], [chunk], [prompt, decode, chunk], [prompt, scored, chunk])
    alone = native(config, weights, num_threads=1)
    expected = [alone.run(make_batch(pieces)) for pieces in shapes]
    for threads in (2, 3, 4):
        runner = native(config, weights, num_threads=threads)
        for step in range(500):
            batch = make_batch(shapes[step % len(shapes)])
            output, right = runner.run(batch), expected[step % len(shapes)]
            assert np.array_equal(output.tokens_R, right.tokens_R)
            assert np.array_equal(output.score_logprobs_Q, right.score_logprobs_Q)
            for gone in (batch.sample_rows_R, batch.positions_T, batch.query_starts_S1):
                gone[::-1] = np.arange(len(gone))
        runner.close()
