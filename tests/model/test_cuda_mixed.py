"""Mixed steps of the cuda runner: padded to token buckets, captured, and with drafts to verify.

Without a GPU: kernels interpreted, captured work called directly.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from model.batch import Batch, StepOutput, mask_of
from model.kernels.tiling import layout_for
from model.runners import RunnerOptions
from model.runners.cuda.accelerator import HostAccelerator
from model.runners.cuda.build import build_runner
from model.runners.cuda.device_memory import MARGIN
from model.runners.cuda.graphs import CapturedGraphs
from model.runners.cuda.mixed import MixedShapes, token_buckets
from model.runners.cuda.runner import CudaRunner
from model.runners.cuda.slots import BatchSlots
from model.runners.exactness import ExactnessCheck
from tests.support.builders import (
    DEVICE,
    Piece,
    at_length,
    make_batch,
    tiny_model_config,
    tiny_weights,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it refuses float32 on a GPU")
slow = pytest.mark.slow

SLOTS, BLOCK, EACH = 5, 4, 6  # batch slots, tokens of a block, blocks of each slot


def build(*, check: ExactnessCheck | None = None, **overrides: Any) -> CudaRunner:
    graphs = overrides.pop("mixed_graphs", True)
    config = tiny_model_config(
        num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1, intermediate_size=24,
        max_model_len=BLOCK * EACH, sliding_window=7,
    )  # fmt: skip
    sizes: dict[str, Any] = {
        "dtype": "float32", "device": DEVICE.type, "block_size": BLOCK,
        "num_blocks": SLOTS * EACH, "max_sequences": SLOTS, "max_batch_tokens": 40,
    }  # fmt: skip
    return build_runner(
        config,
        tiny_weights(config),
        options=RunnerOptions(**{**sizes, **overrides}),
        digest="0" * 64,
        check=check,
        mixed_graphs=graphs,
    )


def assert_same_bits(given: StepOutput, expected: StepOutput) -> None:
    for name in {each.name for each in fields(StepOutput)} - {"seconds"}:
        one, other = getattr(given, name), getattr(expected, name)
        assert one.shape == other.shape, name
        assert one.tobytes() == other.tobytes(), name


def adjusted(batch: Batch, contexts: list[list[int]]) -> Batch:
    """With a mask, a bias and a penalty for each row, all functions of the tokens before it."""
    rows = np.arange(len(contexts), dtype=np.int32)
    masks = [mask_of([t for t in range(97) if (t + len(c)) % 3], vocab_size=97) for c in contexts]
    counted = [sorted({*context}) for context in contexts]
    sampling = replace(
        batch.sampling,
        mask_rows_M=rows,
        masks_MW=np.stack(masks),
        bias_rows_E=rows,
        bias_ids_E=np.array([len(c) % 97 for c in contexts], np.int32),
        bias_values_E=np.full(len(contexts), 0.5, np.float32),
        presence_R=np.full(len(contexts), 0.4, np.float32),
        frequency_R=np.full(len(contexts), 0.2, np.float32),
        penalty_rows_P=np.repeat(rows, list(map(len, counted))),
        penalty_ids_P=np.array([t for ids in counted for t in ids], np.int32),
        penalty_counts_P=np.array(
            [c.count(t) for c, ids in zip(contexts, counted, strict=True) for t in ids], np.int32
        ),
    )
    return replace(batch, sampling=sampling)


# --- the plan of a step ----------------------------------------------------------------------
def test_buckets_end_with_the_ranges_of_one_layout() -> None:
    """So padding changes no layout, and each bucket's kernels are among those of the warm-up."""
    assert token_buckets(3) == (3,)
    assert token_buckets(16) == (16,)
    buckets = token_buckets(8192)
    assert buckets[:3] == (16, 32, 64)
    assert buckets[-1] == 2048
    assert len(buckets) <= 24
    for most in (300, 2048):
        shapes = MixedShapes(
            buckets=token_buckets(most), max_sequences=9, max_context=99, pad_slot=18
        )
        for rows in range(1, most + 1, 7):
            bucket = shapes.bucket(rows)
            assert bucket is not None
            for shape in ((4096, 1024), (1024, 3072), (28672, 4096)):
                assert layout_for(rows, *shape) == layout_for(bucket, *shape)


def shapes_of(draw: random.Random) -> MixedShapes:
    most, context = draw.choice([5, 16, 33, 200, 700]), draw.choice([3, 20, 64, 1000])
    sequences = draw.randint(1, 9)
    return MixedShapes(
        buckets=token_buckets(min(most, sequences * context)),
        max_sequences=sequences,
        max_context=context,
        pad_slot=2 * sequences,
    )


def test_a_padded_step_is_the_step_and_padding_rows_of_their_own() -> None:
    """What launches depend on is a function of the bucket; all else is in the columns."""
    padded = 0
    for seed in range(300):
        draw = random.Random(seed)
        shapes = shapes_of(draw)
        slots = draw.sample(range(shapes.max_sequences), draw.randint(1, shapes.max_sequences))
        pieces = []
        for slot in slots:
            context = draw.randint(1, shapes.max_context)
            pieces.append(
                Piece(tokens=[7] * context, count=draw.randint(1, context), blocks=[0], seat=slot)
            )
        batch = make_batch(pieces)
        unread_T = np.array([draw.random() < 0.5 for _ in range(batch.num_tokens)])
        columns = shapes.columns(batch, unread_T)
        plain = replace(shapes, buckets=()).columns(batch, unread_T)
        bucket = shapes.bucket(batch.num_tokens)
        if bucket is None:
            assert batch.num_tokens > shapes.buckets[-1]
            assert all(map(np.array_equal, columns, plain))
            continue
        padded += bucket > batch.num_tokens
        assert [len(column) for column in columns] == shapes.lengths(bucket)
        for column, own in zip(columns, plain, strict=True):
            assert column.dtype == np.int32
            assert np.array_equal(column[: len(own)], own)
        rows = slice(batch.num_tokens, None)
        batch_slots_T, _, positions_T, unread, starts_S1, contexts_S, batch_slots_S = columns
        assert (batch_slots_T[rows] == shapes.pad_slot).all()
        assert not unread[rows].any()
        others = slice(batch.num_sequences, None)
        assert (batch_slots_S[others] == shapes.pad_slot).all()
        counts = np.diff(starts_S1)
        assert (starts_S1[0], starts_S1[-1]) == (0, bucket)
        assert (counts >= 0).all()
        assert np.array_equal(counts[others], contexts_S[others])
        assert contexts_S.max() <= shapes.max_context
        expected = [position for count in counts[others] for position in range(count)]
        assert positions_T[rows].tolist() == expected
    assert padded > 100


def test_rows_that_verify_have_entries_of_their_own() -> None:
    slots = BatchSlots(8, table_width=2)
    assert slots.pad_slot == 16
    pieces = [
        Piece(tokens=[1, 2, 3], count=3, drafts=2, blocks=[0], seat=5),
        Piece(tokens=[4], blocks=[1], seat=2),
        Piece(tokens=[4, 5], count=2, blocks=[2], seat=3, sample=False),
        Piece(tokens=[6, 7], count=2, drafts=1, blocks=[3], seat=0),
    ]
    batch = make_batch(pieces)
    assert slots.sampling_slots(batch).tolist() == [8, 9, 10, 2, 12, 13]
    assert slots.sampling_slots(make_batch(pieces[1:3])).tolist() == [2]


# --- the bits --------------------------------------------------------------------------------
@dataclass
class Text:
    """A sequence in a batch slot; `computed` of its tokens are stored."""

    slot: int
    tokens: list[int]
    computed: int = 0
    answered: int = 0
    way: dict[str, Any] = field(default_factory=dict)

    @property
    def blocks(self) -> range:
        return range(self.slot * EACH, self.slot * EACH + EACH)

    def piece(self, count: int, drafts: list[int]) -> Piece:
        tokens = [*self.tokens, *drafts][: self.computed + count]
        samples = len(tokens) >= len(self.tokens)
        scores = {} if samples or len(tokens) < 2 else {0: self.tokens[self.computed + 1]}
        return Piece(
            tokens=tokens, count=count, drafts=len(drafts), blocks=self.blocks, seat=self.slot,
            sample=samples, scores=scores, sampling=self.way | {"index": self.answered},
        )  # fmt: skip


WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "logprobs": True},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.8},
]


def random_step(draw: random.Random, texts: list[Text]) -> tuple[Batch, list[tuple[Text, int]]]:
    """Chunks, decoded tokens and drafts in any mixture; and (text, drafts) of those that sample."""
    pieces, sampling, contexts = [], [], []
    left = SLOTS  # rows that sample
    for text in draw.sample(texts, draw.randint(1, len(texts))):
        pending = len(text.tokens) - text.computed
        count, drafts = draw.randint(1, pending), list[int]()
        if count == pending:
            room = min(BLOCK * EACH - len(text.tokens) - 1, left - 1, 3)
            if room < 0:
                continue
            drafts = [draw.randrange(97) for _ in range(draw.randint(0, room))]
            sampling.append((text, len(drafts)))
            left -= 1 + len(drafts)
            contexts += [[*text.tokens, *drafts[:row]] for row in range(1 + len(drafts))]
        pieces.append(text.piece(count + len(drafts), drafts))
        text.computed += count
    batch = make_batch(pieces, num_top=2, score_num_top=1)
    return (adjusted(batch, contexts) if contexts and draw.random() < 0.4 else batch), sampling


@slow
@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("seed", [0, *at_length(*range(1, 8))])
def test_a_padded_step_has_the_bits_of_an_unpadded_one(seed: int) -> None:
    """Random mixtures, one after another, and the same K and V afterwards in every block but that
    of padding rows, which is full of NaN at first: none of it reaches a row of a sequence.
    """
    graphs, plain = build(), build(mixed_graphs=False)
    assert graphs._mixed_graphs.shapes.buckets == (16, 32, 40)
    assert not plain._mixed_graphs.shapes.buckets
    own = slice(0, SLOTS * EACH * BLOCK)
    for runner in (graphs, plain):
        runner._workspace.pool.fill_(0)
    graphs._workspace.pool[:, :, own.stop :] = torch.nan
    draw = random.Random(seed)
    texts = [
        Text(
            slot,
            [draw.randrange(97) for _ in range(draw.randint(1, 12))],
            way=way | {"seed": draw.randrange(2**63)},
        )
        for slot, way in enumerate(draw.choices(WAYS, k=SLOTS))
    ]
    padded = 0
    for _ in range(5):
        batch, sampling = random_step(draw, texts)
        padded += batch.num_tokens not in graphs._mixed_graphs.shapes.buckets
        output = graphs.run(batch)
        assert_same_bits(output, plain.run(batch))
        rows = iter(output.tokens_R.tolist())
        for text, drafts in sampling:
            text.tokens.append(next(rows))
            text.answered += 1
            for _ in range(drafts):  # none of them is accepted
                next(rows)
    assert padded
    assert torch.equal(graphs._workspace.pool[:, :, own], plain._workspace.pool[:, :, own])


@slow
@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize(
    ("way", "adjust"), [(WAYS[1], True), *at_length((WAYS[0], False), (WAYS[2], False))]
)
def test_verified_rows_have_the_bits_of_decoded_ones(way: dict[str, Any], *, adjust: bool) -> None:
    """Two right drafts and a wrong one, beside a sequence without drafts; and the decode step after
    them, whose parameters the host must send anew.
    """
    way = way | {"seed": 5, "logprobs": True}
    prompt, other = [3, 1, 4, 1, 5], [2, 7]

    def step(runner: CudaRunner, text: Text, drafts: list[int]) -> StepOutput:
        beside = Text(1, [*other, 8], computed=2, answered=1, way=way)
        count = len(text.tokens) - text.computed + len(drafts)
        pieces = [text.piece(count, drafts), beside.piece(1, [])]
        contexts = [[*text.tokens, *drafts[:row]] for row in range(1 + len(drafts))]
        batch = make_batch(pieces, num_top=2)
        return runner.run(adjusted(batch, [*contexts, beside.tokens]) if adjust else batch)

    def prefill(runner: CudaRunner) -> Text:
        runner.run(make_batch([Text(1, other).piece(2, [])]))
        text = Text(0, list(prompt), way=way)
        text.tokens.append(int(step(runner, text, []).tokens_R[0]))
        text.computed, text.answered = len(prompt), 1
        return text

    plain = build()
    text = prefill(plain)
    expected = []
    for _ in range(4):
        expected.append(step(plain, text, []))
        text.tokens.append(int(expected[-1].tokens_R[0]))
        text.computed, text.answered = text.computed + 1, text.answered + 1
    tokens = text.tokens

    drafting = build()
    text = prefill(drafting)
    first = len(prompt) + 1
    drafts = [*tokens[first : first + 2], (tokens[first + 2] + 1) % 97]
    output = step(drafting, text, drafts)
    for row in range(3):
        for name in ("tokens_R", "logprobs_R", "top_ids_RN", "top_logprobs_RN"):
            given, wanted = getattr(output, name), getattr(expected[row], name)
            assert given[row].tobytes() == wanted[0].tobytes(), (row, name)
    text.tokens += tokens[first : first + 3]
    text.computed, text.answered = len(text.tokens) - 1, 4
    assert_same_bits(step(drafting, text, []), expected[3])


@slow
def test_a_step_samples_as_many_rows_as_there_are_batch_slots() -> None:
    piece = Piece(tokens=[1] * 8, count=8, drafts=SLOTS, blocks=range(3), seat=0)
    with pytest.raises(ValueError, match=f"samples at most {SLOTS} rows"):
        build().run(make_batch([piece]))


# --- capture -----------------------------------------------------------------------------------
PROMPT = make_batch([Piece(tokens=[3, 1, 4, 1, 5], count=5, blocks=[9, 2], seat=1)])
CHECK = ExactnessCheck(prompt=5, answer=2, beside=(), chunks=(2,))


def capture_mixed_by(
    monkeypatch: pytest.MonkeyPatch, replay: Callable[[], Callable[[], None]]
) -> None:
    """Captures mixed steps as `replay`, and decode steps as they are."""
    capture = CapturedGraphs.capture

    def patched(graphs: CapturedGraphs, size: int) -> None:
        if graphs._work.__qualname__.startswith("MixedGraphs"):
            graphs._replay[size] = replay()
        else:
            capture(graphs, size)

    monkeypatch.setattr(CapturedGraphs, "capture", patched)


@slow
def test_a_failed_capture_leaves_launches_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One try, one line in the log, the same answers."""
    expected = build().run(PROMPT)
    tried = []

    def fail() -> Callable[[], None]:
        tried.append(1)
        raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")

    capture_mixed_by(monkeypatch, fail)
    runner = build()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same_bits(runner.run(PROMPT), expected)
        runner.capture_graphs()
    assert len(tried) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "mixed steps are launched without CUDA graphs: CUDA error: operation not permitted"
    ]
    assert all(graph.is_captured(size) for graph in runner._graphs.all() for size in (1, SLOTS))


@slow
def test_graphs_are_captured_before_the_runner_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none over the pool that only the measurement of memory has. Graphs of mixed steps are
    given up first if the check fails.
    """
    checks: list[list[int]] = []

    def check_with_graphs(runner: CudaRunner, _: ExactnessCheck) -> dict[str, bool]:
        graphs = runner._mixed_graphs
        checks.append([size for size in graphs.shapes.buckets if graphs.graphs.is_captured(size)])
        assert all(graph.is_captured(SLOTS) for graph in runner._graphs.all())
        return {"alone": not graphs.enabled}

    monkeypatch.setattr("model.runners.cuda.build.check_exactness", check_with_graphs)
    runner = build(check=CHECK)
    assert checks == [[16, 32, 40]] * 2
    assert runner.exact
    assert not runner.has_mixed_graphs
    unchecked = build()
    unchecked.padding_step(3)
    assert not unchecked._mixed_graphs.graphs.is_captured(16)
    unchecked.run(PROMPT)
    assert unchecked._mixed_graphs.graphs.is_captured(16)


@pytest.mark.longer
@pytest.mark.usefixtures("one_order")
def test_graphs_that_give_other_bits_are_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A replay that leaves out what it was given is found by the runner's own check."""
    capture_mixed_by(monkeypatch, lambda: lambda: None)
    # Later steps read keys that no step has written: numbers, lest the interpreter overflows.
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: allocate(*args, **kwargs).zero_())
    with caplog.at_level(logging.WARNING):
        runner = build(check=CHECK)
    assert runner.exact
    assert not runner._mixed_graphs.enabled
    assert "answers were not exact" in caplog.text


@slow
def test_memory_of_graphs_is_part_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs keep their memory, whatever a later step needs: both are left free."""
    spent = {"padding_step": 5 * 2**20, "launch_largest": 3 * 2**20}

    def peak_of(_: HostAccelerator, work: Any) -> int:
        work()
        return spent[getattr(work, "func", work).__name__]

    monkeypatch.setattr(HostAccelerator, "peak_of", peak_of)
    room = 100 * 2**10
    free = sum(spent.values()) + MARGIN + room
    monkeypatch.setattr(HostAccelerator, "free_memory", lambda _: free)
    runner = build(num_blocks=None, memory_share=1.0)
    block = 2 * BLOCK * 8 * 4  # K and V, tokens, head, float32
    assert runner.num_blocks == room // block
