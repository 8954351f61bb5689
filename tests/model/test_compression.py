"""A compressed KV cache: what the paged backend computes is what the papers define."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.attention.anchored import seen_pairs
from model.attention.compressed import CompressedAttention
from model.compression import (
    MAX_STREAM,
    SINKS,
    Window,
    check_compression,
    compressed_config,
    parse_compression,
)
from model.config import Position
from model.layers import rotate, rotation
from model.runners import RUNNERS, RunnerOptions
from model.runners.choose import choose_runner
from model.runners.torch import TorchRunner
from model.segments import anchor_ids, segments_batch, segments_of
from model.training.network import build_network, states
from tests.model.test_attention import attend, scattered
from tests.support.builders import Piece, make_batch, tiny_model_config, tiny_weights

pytestmark = pytest.mark.usefixtures("one_thread")

Build = Callable[..., TorchRunner]


def streaming_cache(end: int, window: int) -> list[int]:
    """Positions in StreamingLLM's cache after the token before `end`: sinks, then the last ones."""
    return [p for p in range(end) if p < SINKS or p >= end - window]


@pytest.mark.parametrize("seed", range(12))
def test_the_window_is_streaming_llm(seed: int) -> None:
    """Against the paper's own rule: at each token the keys of the cache are turned to their places
    in it, and the query to the last one. Slots that no query may read hold NaN.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    config = tiny_model_config()
    window, block_size = int(rng.integers(1, 40)), int(rng.choice([1, 4, 16]))
    contexts = [int(rng.integers(1, 100)) for _ in range(rng.integers(1, 6))]
    lengths = [(c, int(rng.choice([1, min(3, c), int(rng.integers(1, c + 1))]))) for c in contexts]
    batch = scattered(lengths, block_size, rng)
    raw = torch.randn(batch.num_tokens, 4, 8)
    num_slots = (int(batch.block_table_SB.max()) + 1) * block_size
    keys, values = (torch.full((num_slots, 2, 8), torch.nan) for _ in range(2))
    expected = torch.empty_like(raw)
    for row, (context, count) in enumerate(lengths):
        k, v = torch.randn(context, 2, 8), torch.randn(context, 2, 8)
        table, start = batch.block_table_SB[row], int(batch.query_starts_S1[row])
        read = {
            p
            for end in range(context - count + 1, context + 1)
            for p in streaming_cache(end, window)
        }
        for position in read:
            slot = table[position // block_size] * block_size + position % block_size
            turned = rotate(k[position : position + 1], rotation(torch.tensor([position]), config))
            keys[slot], values[slot] = turned[0], v[position]
        for offset in range(count):
            cache = streaming_cache(context - count + offset + 1, window)
            places = torch.arange(len(cache))
            turned = rotate(k[cache], rotation(places, config)).double()
            query = rotate(raw[None, start + offset], rotation(places[-1:], config))[0].double()
            for head in range(4):
                weights = (turned[:, head // 2] @ query[head] * 0.3).softmax(0)
                expected[start + offset, head] = weights @ v[cache, head // 2].double()
    queries = rotate(raw, rotation(torch.tensor(batch.positions_T), config))
    backend = CompressedAttention(Window(window), config)
    given = attend(backend, batch, block_size, (queries, keys, values), None)
    torch.testing.assert_close(given, expected, atol=2e-5, rtol=2e-5)


def scores(runner: TorchRunner, tokens: list[int], chunks: list[int]) -> np.ndarray[Any, Any]:
    """Log probabilities of the text's tokens, computed in chunks."""
    found, start = [], 0
    for size in chunks:
        end = min(start + size, len(tokens) - 1)
        following = dict(enumerate(tokens[start + 1 : end + 1]))
        piece = Piece(
            tokens=tokens[:end], count=end - start, blocks=range(40), sample=False, scores=following
        )
        found.append(runner.run(make_batch([piece])).score_logprobs_Q)
        start = end
    return np.concatenate(found)


def test_a_window_as_long_as_the_text_changes_nothing(tiny_runner: Build) -> None:
    tokens = np.random.default_rng(0).integers(0, 97, 101).tolist()
    plain = scores(tiny_runner(), tokens, [100])
    wide = scores(tiny_runner(kv_compression="window:100"), tokens, [100])
    narrow = scores(tiny_runner(kv_compression="window:8"), tokens, [100])
    np.testing.assert_allclose(wide, plain, atol=1e-4)
    assert np.abs(narrow - plain).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_are_the_whole_text(tiny_runner: Build, dtype: str) -> None:
    """However a text is cut, token by token included: what fell out of the window is overwritten
    by nothing here, so the mask alone decides.
    """
    tokens = np.random.default_rng(1).integers(0, 97, 131).tolist()
    runner = tiny_runner(kv_compression="window:10", dtype=dtype)
    whole = scores(runner, tokens, [130])
    for chunks in ([7] * 19, [60, *[1] * 43, 27]):
        given = scores(runner, tokens, chunks)
        difference = np.abs(given - whole)
        assert difference.max() < (1e-4 if dtype == "float32" else 0.5), chunks
        assert difference.mean() < (1e-4 if dtype == "float32" else 0.05), chunks


def test_the_numeric_class_and_the_context_name_the_policy(tiny_runner: Build) -> None:
    plain, runner = tiny_runner(), tiny_runner(kv_compression="window:8")
    runner.warm_up()
    other = tiny_runner(kv_compression="window:9")
    assert "-window8-" in runner.numeric_class
    assert len({plain.numeric_class, runner.numeric_class, other.numeric_class}) == 3
    assert runner.config.max_model_len == MAX_STREAM
    assert plain.config.max_model_len == 512


@pytest.mark.parametrize(
    "text", ["", "window", "window:", "window:0", "window:-1", "window:x", "on"]
)
def test_unknown_policies_are_errors(text: str) -> None:
    with pytest.raises(ValueError, match="kv_compression"):
        parse_compression(text)


def test_what_cannot_be_compressed_is_refused_in_one_line() -> None:
    window = parse_compression("window:16")
    for fields, match in (
        ({"position": Position.LEARNED}, "rotary positions"),
        ({"rope_free_layers": frozenset({1})}, "rotary positions"),
        ({"sliding_window": 100}, "sliding window"),
        ({"max_model_len": 19}, "at most 15"),
    ):
        with pytest.raises(ValueError, match=match):
            compressed_config(tiny_model_config(**fields), window)
    config, options = tiny_model_config(), RunnerOptions(kv_compression="window:16", device="cpu")
    assert choose_runner("auto", config, options).name == "torch"
    for name in ("native", "cuda"):
        with pytest.raises(ValueError, match=f"needs the torch runner, not {name}"):
            choose_runner(name, config, options)
        with pytest.raises(ValueError, match=f"needs the torch runner, not {name}"):
            RUNNERS[name](config, tiny_weights(config), options, "0" * 64)
    with pytest.raises(ValueError, match="tensor parallelism"):
        check_compression("window:16", runner="torch", num_ranks=2)


def test_anchors_are_the_ends_of_sentences() -> None:
    texts = [
        b".",
        b" end.",
        b"!\n",
        b'."',
        b"a.b",
        b"...",
        b",",
        b"\n",
        b"",
        b"<eos>",
        "。".encode(),
    ]
    assert anchor_ids(texts, {9}) == {0, 1, 2, 3, 5, 9, 10}


@pytest.mark.parametrize("seed", range(10))
def test_segments_are_those_of_the_mask(seed: int) -> None:
    """What a chunk of any place sees is its part of the mask of the whole text."""
    draw = random.Random(seed)
    length = draw.randint(1, 40)
    flags = [draw.random() < draw.choice([0, 0.2, 0.9]) for _ in range(length)]
    anchors = [position for position, flag in enumerate(flags) if flag]
    seen_TT = seen_pairs(torch.tensor(flags))
    start = draw.randrange(length)
    end = draw.randint(start + 1, length)
    known = [position for position in anchors if position < draw.choice([end, length])]
    starts, seen, offsets, numbers = segments_of(known, range(start, end))
    for row, position in enumerate(range(start, end)):
        far, own = anchors[: seen[row]], range(starts[row], position + 1)
        assert seen_TT[position].nonzero().flatten().tolist() == [*far, *own]
    assert [start + offset for offset in offsets] == [p for p in anchors if start <= p < end]
    assert [anchors[number] for number in numbers] == [start + offset for offset in offsets]


IDS = frozenset({3, 50, 51, 52, 53, 54, 55, 56})


def served_scores(
    runner: TorchRunner, tokens: list[int], chunks: list[int]
) -> np.ndarray[Any, Any]:
    """Log probabilities over a cache that forgets: before each step, every slot but those of
    anchors and of the segment that is not finished holds NaN.
    """
    anchors = [position for position, token in enumerate(tokens) if token in IDS]
    found, start = [], 0
    for size in chunks:
        end = min(start + size, len(tokens) - 1)
        before = [position for position in anchors if position < start]
        kept = [
            *range(before[-1] + 1 if before else 0, start),
            *(160 + n for n in range(len(before))),
        ]
        forgotten = np.setdiff1d(np.arange(256), kept)
        runner._cache.pool[:, :, torch.from_numpy(forgotten)] = torch.nan
        piece = Piece(
            tokens=tokens[:end], count=end - start, blocks=range(40), sample=False,
            scores=dict(enumerate(tokens[start + 1 : end + 1])),
        )  # fmt: skip
        segments = segments_batch([(anchors, range(start, end), range(40, 64))])
        batch = replace(make_batch([piece]), segments=segments)
        found.append(runner.run(batch).score_logprobs_Q)
        start = end
    return np.concatenate(found)


@pytest.mark.slow
@pytest.mark.parametrize("position", list(Position))
def test_the_mask_of_training_is_that_of_serving(tiny_runner: Build, position: Position) -> None:
    """A text as training sees it, and in chunks over a cache of anchors: the same probabilities,
    and others than without the mask.
    """
    config = tiny_model_config(position=position)
    network = build_network(config, tiny_weights(config))
    tokens = np.random.default_rng(1).integers(0, 97, 151).tolist()
    tokens_1T = torch.tensor([tokens[:-1]])
    with torch.no_grad():
        trained, plain = (
            network.logits(states(network, tokens_1T, anchor_ids=ids))[0]
            .log_softmax(-1)[torch.arange(150), torch.tensor(tokens[1:])]
            .numpy()
            for ids in (IDS, frozenset[int]())
        )
    runner = tiny_runner(config, kv_compression="anchors")
    runner.warm_up()
    for chunks in ([150], [7] * 22, [60, *[1] * 43, 40, 7]):
        given = served_scores(runner, tokens, chunks)
        np.testing.assert_allclose(given, trained, atol=1e-4, err_msg=str(chunks))
    assert np.abs(trained - plain).max() > 0.1
    assert "-anchors1-" in runner.numeric_class
    assert runner.config.max_model_len == config.max_model_len


def test_gradients_pass_through_anchors_alone() -> None:
    """What a finished segment says reaches later ones through its anchor alone."""
    config = tiny_model_config(num_layers=1)
    network = build_network(config, tiny_weights(config))
    tokens_NT = torch.tensor([[1, 2, 3, 4, 5, 3, 6, 7, 8]])
    x = network.embed(tokens_NT).detach()
    network.embed.register_forward_hook(lambda *_: x.requires_grad_())
    states(network, tokens_NT, anchor_ids=IDS)[0, 7].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(-1) > 0
    assert seen.nonzero().flatten().tolist() == [2, 5, 6, 7]
