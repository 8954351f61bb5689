"""Laws of the cuda runner. Without a GPU: kernels interpreted, captured work called directly."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.errors import OutOfResources

from model.batch import Batch, StepOutput
from model.config import ModelConfig, Norm
from model.kernels.inputs import Column
from model.kernels.matmul import multiply_by_vendor_blas
from model.runners import RUNNERS, RunnerOptions
from model.runners.cuda.accelerator import UNREAD, CudaAccelerator, HostAccelerator
from model.runners.cuda.buffers import TokenRing, Upload
from model.runners.cuda.build import _choose_dtype, build_runner
from model.runners.cuda.chip import check_kv_dtype, resource_errors, unsupported_chip
from model.runners.cuda.device_memory import GIB, blocks_that_fit, check_weights_fit
from model.runners.cuda.graphs import CapturedGraphs, bucket_for, bucket_sizes
from model.runners.cuda.runner import CudaRunner
from model.runners.cuda.slots import BatchSlots
from model.runners.exactness import ExactnessCheck, check_exactness, check_for
from model.runners.torch import TorchRunner
from tests.support.builders import DEVICE, Piece, make_batch, tiny_model_config, tiny_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="it refuses float32 on a GPU"),
]


def small_config(**overrides: Any) -> ModelConfig:
    sizes = {
        "num_layers": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "num_kv_heads": 1,
        "intermediate_size": 24,
        "max_model_len": 64,
    }
    return tiny_model_config(**{**sizes, **overrides})


def options(**overrides: Any) -> RunnerOptions:
    fields = {
        "dtype": "float32",
        "device": DEVICE.type,
        "block_size": 4,
        "num_blocks": 32,
        "max_sequences": 8,
        "max_batch_tokens": 64,
    }
    return RunnerOptions(**{**fields, **overrides})


def build(config: ModelConfig | None = None, **overrides: Any) -> CudaRunner:
    config = config or small_config()
    more = {name: overrides.pop(name) for name in ("product", "check") if name in overrides}
    more.setdefault("check", None)
    return build_runner(
        config, tiny_weights(config), options=options(**overrides), digest="0" * 64, **more
    )


def reference(config: ModelConfig | None = None) -> TorchRunner:
    config = config or small_config()
    return TorchRunner(config, tiny_weights(config), options=options(), digest="0" * 64)


SAMPLED = {"temperature": 0.8, "seed": 2**63 + 5, "logprobs": True}


def mixed_step() -> Batch:
    """A chunk that samples with a cut, a chunk that does not, a scored prompt."""
    return make_batch(
        [
            Piece(tokens=[3, 1, 4, 1, 5], count=5, blocks=[9, 2], sampling=SAMPLED | {"top_k": 9}),
            Piece(tokens=[2, 7], count=2, blocks=[4], sample=False),
            Piece(tokens=[6, 6, 8], count=3, blocks=[1], scores={0: 6, 1: 8}),
        ],
        num_top=3,
        score_num_top=2,
    )


def decode_step(tokens: list[list[int]]) -> Batch:
    blocks = [[9, 2], [4], [1]]
    pieces = [
        Piece(tokens=text, blocks=own, seat=seat, sampling=SAMPLED | {"index": 1, "seed": seat})
        for seat, (text, own) in enumerate(zip(tokens, blocks, strict=True))
    ]
    return make_batch(pieces, num_top=3)


def assert_like(given: StepOutput, expected: StepOutput) -> None:
    assert given.tokens_R.tolist() == expected.tokens_R.tolist()
    for field in ("logprobs_R", "top_logprobs_RN", "score_logprobs_Q", "score_top_logprobs_QN"):
        np.testing.assert_allclose(getattr(given, field), getattr(expected, field), atol=1e-4)
    assert np.array_equal(given.top_ids_RN, expected.top_ids_RN)
    assert np.array_equal(given.score_top_ids_QN, expected.score_top_ids_QN)


VARIANTS: list[dict[str, Any]] = [
    {"qk_norm": True, "qkv_bias": True, "tied_head": True},
    {"sliding_window": 3, "num_layers": 2, "full_attention_layers": frozenset({1})},
    {"out_bias": True, "mlp_bias": True, "rope_free_layers": frozenset({0})},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=["qwen", "mistral", "smollm3"])
def test_steps_are_those_of_the_torch_runner(variant: dict[str, Any]) -> None:
    """Mixed, then decoded: tokens, log probabilities and scores."""
    config = small_config(**variant)
    given, expected = build(config), reference(config)
    given._workspace.pool.fill_(torch.nan)
    assert_like(given.run(mixed_step()), expected.run(mixed_step()))
    texts = [[3, 1, 4, 1, 5, 9], [2, 7, 1], [6, 6, 8, 8]]
    assert_like(given.run(decode_step(texts)), expected.run(decode_step(texts)))


def test_penalties_and_biases_are_those_of_the_torch_runner() -> None:
    batch = make_batch([Piece(tokens=[5, 6], count=2, blocks=[n], seat=n) for n in range(3)])
    ints = np.array
    sampling = replace(
        batch.sampling,
        temperatures_R=ints([0.0, 0.9, 0.9], np.float32),
        presence_R=ints([0.5, 0.0, 0.0], np.float32),
        repetition_R=ints([3.0, 1.0, 1.0], np.float32),
        penalty_rows_P=ints([0] * 40, np.int32),
        penalty_ids_P=np.arange(40, dtype=np.int32),
        penalty_counts_P=ints([0, 1] * 20, np.int32),
        bias_rows_E=ints([1, 1, *[2] * 97], np.int32),
        bias_ids_E=ints([7, 8, *range(97)], np.int32),
        bias_values_E=ints([50, 50, *[-np.inf] * 97], np.float32),
        wants_logprobs_R=ints([True, False, True]),
        num_top=2,
    )
    batch = replace(batch, sampling=sampling)
    given, expected = build().run(batch), reference().run(batch)
    assert given.tokens_R[1] in {7, 8}
    assert_like(given, expected)


def test_a_step_can_be_launched_before_the_last_is_read() -> None:
    """Unread tokens come from the batch slot; marked rows ignore what stands in the batch.

    Read-back on the host's accelerator arrives at `collect` and not before.
    """
    first = make_batch(
        [Piece(tokens=[3, 1, 4], count=3, blocks=[3], seat=1, sampling=SAMPLED)], num_top=1
    )

    def then(token: int, length: int, **kwargs: Any) -> Batch:
        tokens = [*[0] * (length - 1), token]
        sampling = SAMPLED | {"index": length - 3}
        piece = Piece(tokens=tokens, blocks=[3, 5], seat=1, sampling=sampling, **kwargs)
        return make_batch([piece], num_top=1)

    plain = build()
    tokens = [int(plain.run(first).tokens_R[0])]
    for length in (4, 5, 6):
        tokens.append(int(plain.run(then(tokens[-1], length)).tokens_R[0]))

    ahead = build()
    unread = np.array([True])
    handles = [ahead.launch(first), ahead.launch(then(0, 4), unread_T=unread)]
    with pytest.raises(ValueError, match="at most 2 steps"):
        ahead.launch(then(0, 5), unread_T=unread)
    with pytest.raises(ValueError, match="in the order"):
        ahead.collect(handles[1])
    given = [int(ahead.collect(handles[0]).tokens_R[0])]
    handles.append(ahead.launch(then(0, 5), unread_T=unread))
    given += [int(ahead.collect(handle).tokens_R[0]) for handle in handles[1:]]
    given.append(int(ahead.run(then(given[-1], 6)).tokens_R[0]))
    assert given == tokens


def test_an_unread_row_beside_a_chunk() -> None:
    first = make_batch([Piece(tokens=[3, 1, 4], count=3, blocks=[3], seat=1)])
    outputs = []
    for overlapped in (False, True):
        runner = build()
        token = 0 if overlapped else int(runner.run(first).tokens_R[0])
        launched = runner.launch(first) if overlapped else None
        batch = make_batch(
            [
                Piece(tokens=[0, 0, 0, token], blocks=[3], seat=1),
                Piece(tokens=[8, 9], count=2, blocks=[6], seat=0),
            ]
        )
        unread = np.array([overlapped, False, False])
        handle = runner.launch(batch, unread_T=unread)
        if launched is not None:
            runner.collect(launched)
        outputs.append(runner.collect(handle).tokens_R.tolist())
    assert outputs[0] == outputs[1]


def test_an_unread_row_has_no_penalties() -> None:
    batch = make_batch([Piece(tokens=[1, 2], blocks=[0])])
    one = np.zeros(1, np.int32)
    sampling = replace(batch.sampling, penalty_rows_P=one, penalty_ids_P=one, penalty_counts_P=one)
    with pytest.raises(ValueError, match="no penalties"):
        build().launch(replace(batch, sampling=sampling), unread_T=np.array([True]))


def answers(runner: CudaRunner, *, chunk: int, sampling: dict[str, Any]) -> list[list[int]]:
    """Three texts of four further tokens each, read by chunks and then decoded side by side."""
    texts = [[3, 1, 4, 1, 5], [2, 7], [6, 6, 8]]
    blocks, computed = [[9, 2, 3], [4, 5], [1, 7]], [0, 0, 0]
    ends = [len(text) + 4 for text in texts]
    while any(len(text) < end for text, end in zip(texts, ends, strict=True)):
        counts = [min(chunk, len(text) - done) for text, done in zip(texts, computed, strict=True)]
        computed = [done + count for done, count in zip(computed, counts, strict=True)]
        samples = [done == len(text) for text, done in zip(texts, computed, strict=True)]
        pieces = [
            Piece(tokens=text[:done], count=count, blocks=own, sample=sample, sampling=sampling)
            for text, done, count, own, sample in zip(
                texts, computed, counts, blocks, samples, strict=True
            )
        ]
        tokens = iter(runner.run(make_batch(pieces)).tokens_R.tolist())
        for text, sample in zip(texts, samples, strict=True):
            if sample:
                text.append(next(tokens))
    return [text[:end] for text, end in zip(texts, ends, strict=True)]


def captured(graphs: CapturedGraphs) -> list[int]:
    return [size for size in bucket_sizes(8) if graphs.is_captured(size)]


@pytest.mark.usefixtures("one_order")
def test_greedy_steps_need_no_logits() -> None:
    """The same answers as where the logits are stored and read, in one piece and in chunks."""
    general = build()
    expected = answers(general, chunk=8, sampling={"logprobs": True})
    assert not captured(general._graphs.greedy)
    for chunk in (8, 2):
        runner = build()
        runner._workspace.logits_RV.fill_(torch.nan)
        assert answers(runner, chunk=chunk, sampling={}) == expected
        assert runner._workspace.logits_RV.isnan().all()
        assert captured(runner._graphs.greedy)
        assert not captured(runner._graphs.forward)


def test_a_step_of_prompts_alone_chooses_nothing() -> None:
    batch = make_batch([Piece(tokens=[2, 7], count=2, blocks=[4], sample=False)])
    assert build().run(batch).tokens_R.shape == (0,)


def test_greedy_rows_beside_drawn_ones() -> None:
    """And rows whose logits are changed: each has the token that the torch runner gives it."""
    texts = [[3, 1, 4, 1, 5, 9], [2, 7, 1], [6, 6, 8, 8]]
    blocks = [[9, 2], [4], [1]]
    given, expected = build(), reference()
    for runner in (given, expected):
        runner.run(mixed_step())
    ways: list[list[dict[str, Any]]] = [
        [{}, {}, {}],
        [{}, SAMPLED, {}],
        [{}, SAMPLED | {"top_k": 4}, SAMPLED],
    ]
    for columns in ways:
        pieces = [
            Piece(tokens=text, blocks=own, seat=seat, sampling=sampling)
            for seat, (text, own, sampling) in enumerate(zip(texts, blocks, columns, strict=True))
        ]
        batch = make_batch(pieces, num_top=3)
        tokens = given.run(batch).tokens_R.tolist()
        assert tokens == expected.run(batch).tokens_R.tolist()
        forbidden = replace(
            batch.sampling,
            bias_rows_E=np.array([0, 2], np.int32),
            bias_ids_E=np.array([tokens[0], tokens[2]], np.int32),
            bias_values_E=np.array([-np.inf, -np.inf], np.float32),
        )
        batch = replace(batch, sampling=forbidden)
        others = given.run(batch).tokens_R.tolist()
        assert others == expected.run(batch).tokens_R.tolist()
        assert others[0] != tokens[0]
        assert others[1] == tokens[1]


CHECK = ExactnessCheck(prompt=9, answer=2, beside=(2,), chunks=(4,))


@pytest.mark.usefixtures("one_order")
def test_an_answers_bits_do_not_depend_on_its_path() -> None:
    """The runner tries it itself before it calls itself exact."""
    runner = build(check=CHECK)
    assert runner.exact
    assert "inexact" not in runner.numeric_class
    assert all(map(captured, runner._graphs.all()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the instruction is the interpreter's")
def test_a_runner_that_fails_its_proof_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix instruction gives a row other bits in another place of its tile.

    By enough that no luck hides it, and always the same, so that only the check can find out.
    """
    product = np.matmul

    def by_place(a: Any, b: Any, dtype: Any = None) -> Any:
        y = product(a.astype(np.float64), b.astype(np.float64))
        return (y * (1 + 1e-4 * np.arange(y.shape[-1]))).astype(dtype or a.dtype)

    monkeypatch.setattr(np, "matmul", by_place)
    runner = build(check=ExactnessCheck(prompt=5, answer=2, beside=(2,), chunks=()))
    assert not runner.exact
    assert "inexact" in runner.numeric_class


def test_the_check_fits_the_runner() -> None:
    """It stays within the options, the pool and the model, however small they are."""
    for most, blocks, length in ((8192, 10_000, 4096), (64, 40, 64), (1, 4, 16), (600, 3, 10_000)):
        given = options(max_batch_tokens=most, max_sequences=min(most, 32), block_size=16)
        check = check_for(given, num_blocks=blocks, max_model_len=length)
        each = -(-(check.prompt + check.answer) // 16)
        assert (max(check.beside, default=0) + 1) * each <= max(blocks, 2 * each)
        assert check.prompt + check.answer <= length
        assert check.prompt + check.answer <= max(most, 6)
        assert max(check.beside, default=0) < given.max_sequences


@pytest.mark.kernels
@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("variant", VARIANTS, ids=["qwen", "mistral", "smollm3"])
def test_bits_over_more_ways_and_models(variant: dict[str, Any]) -> None:
    check = ExactnessCheck(prompt=21, answer=4, beside=(1, 5), chunks=(1, 7))
    found = check_exactness(build(small_config(**variant), num_blocks=64), check)
    assert all(found.values()), found


def test_inexact_products_are_named_in_the_class() -> None:
    runner = build(product=multiply_by_vendor_blas)
    assert not runner.exact
    assert "inexact" in runner.numeric_class
    expected = reference()
    assert_like(runner.run(mixed_step()), expected.run(mixed_step()))
    texts = [[3, 1, 4, 1, 5, 9], [2, 7, 1], [6, 6, 8, 8]]
    assert_like(runner.run(decode_step(texts)), expected.run(decode_step(texts)))
    assert answers(runner, chunk=8, sampling={}) == answers(build(), chunk=8, sampling={})
    assert runner._graphs.greedy not in runner._graphs.all()


def test_warm_up_leaves_no_trace() -> None:
    runner = build(max_sequences=2, max_batch_tokens=3)
    state = runner._workspace.state.clone()
    runner.warm_up()
    assert torch.equal(runner._workspace.state, state)
    graphs = runner._graphs
    assert {*graphs.sizes} == {1, 2}
    assert all(graph.is_captured(size) for graph in graphs.all() for size in graphs.sizes)
    assert graphs.greedy in graphs.all()
    runner.close()


def test_eight_bit_keys_and_values_halve_the_pool() -> None:
    few: dict[str, Any] = {"num_blocks": None, "max_batch_tokens": 10}
    wide = build(kv_memory=4096, **few)
    narrow = build(kv_memory=4096, kv_dtype="float8", **few)
    assert narrow.num_blocks == 4 * wide.num_blocks
    assert "kv8" in narrow.numeric_class
    assert narrow.run(mixed_step()).tokens_R.shape == (2,)


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(ValueError, match="use the torch runner"):
        build(small_config(norm=Norm.LAYER))
    with pytest.raises(ValueError, match="dtype must be"):
        build(dtype="int4")
    with pytest.raises(ValueError, match="kv_dtype must be"):
        build(kv_dtype="int4")
    with pytest.raises(ValueError, match="at most 2 tokens"):
        build(max_batch_tokens=2, max_sequences=2).run(mixed_step())
    with pytest.raises(ValueError, match="at most 2 sequences"):
        build(max_sequences=2).run(mixed_step())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_served_on_a_gpu_only() -> None:
    config = small_config()
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        RUNNERS["cuda"](config, tiny_weights(config), options(), "0" * 64)


def test_every_size_has_a_bucket() -> None:
    assert bucket_sizes(1) == (1,)
    assert bucket_sizes(6) == (1, 2, 4, 6)
    assert bucket_sizes(256) == (1, 2, 4, *range(8, 257, 8))
    for count in range(1, 31):
        size = bucket_for(count, bucket_sizes(30))
        assert size >= count
        assert size <= max(4, count + 7)


def test_batch_slots_send_only_what_changed() -> None:
    slots = BatchSlots(4, table_width=3)
    sampled = np.array([2], np.int32)
    first = make_batch([Piece(tokens=[5, 6], count=2, blocks=[7], seat=2, sampling=SAMPLED)])
    places, values = slots.changes(first, sampled, unread_T=None, decode=False)
    flat = np.zeros_like(slots.mirror)
    flat.reshape(-1)[places] = values
    assert np.array_equal(flat, slots.mirror)
    assert slots.mirror[2, Column.TABLE] == 7
    assert not slots.mirror[[0, 1, 3]].any()
    slots.sampled(sampled, step=0, decode=False)
    slots.read(sampled, np.array([9], np.int32), step=0)

    def decoded(token: int, index: int, blocks: list[int]) -> tuple[list[int], list[int]]:
        tokens = [*[0] * (index + 1), token]
        piece = Piece(tokens=tokens, blocks=blocks, seat=2, sampling=SAMPLED | {"index": index})
        places, values = slots.changes(make_batch([piece]), sampled, unread_T=None, decode=True)
        slots.sampled(sampled, step=index, decode=True)
        return (places % slots.mirror.shape[1]).tolist(), values.tolist()

    assert decoded(9, 1, [7]) == ([Column.LENGTH], [2])
    slots.read(sampled, np.array([4], np.int32), step=1)
    assert decoded(4, 2, [7]) == ([], [])
    assert decoded(8, 3, [7, 3]) == ([Column.TABLE + 1, Column.LAST], [3, 8])
    slots.read(sampled, np.array([1], np.int32), step=2)  # step 3 has sampled since
    assert decoded(1, 4, [7, 3]) == ([Column.LAST], [1])


def test_what_is_read_back_arrives_when_it_is_waited_for() -> None:
    ring = TokenRing(HostAccelerator(), width=4, num_buffers=2)
    first = ring.read(torch.tensor([1, 2], dtype=torch.int32))
    buffer = ring._buffers[0]
    assert buffer[:2].tolist() == [UNREAD, UNREAD]
    second = ring.read(torch.tensor([3], dtype=torch.int32))
    assert first().tolist() == [1, 2]
    assert second().tolist() == [3]


def test_an_upload_has_its_limit() -> None:
    upload = Upload(HostAccelerator(), capacity=5, num_arrays=3, num_buffers=2)
    parts = upload.send(
        [np.array([1, 2], np.int32), np.zeros(0, np.int32), np.array([3], np.int32)]
    )
    assert [part.tolist() for part in parts] == [[1, 2], [], [3]]
    assert all((part.data_ptr() - upload.target.data_ptr()) % 16 == 0 for part in parts)
    with pytest.raises(ValueError, match="at most 5"):
        upload.send([np.zeros(6, np.int32)])


def test_every_call_uses_the_runners_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's current device belongs to a thread: of `cuda:1` the engine's thread knew nothing."""
    threads: list[int] = []
    monkeypatch.setattr(
        HostAccelerator, "activate", lambda _: threads.append(threading.get_ident())
    )
    runner = build()
    assert threads == [threading.get_ident()]
    batch = make_batch([Piece(tokens=[5, 6], count=2, blocks=[0])])
    with ThreadPoolExecutor(max_workers=1) as pool:
        (ident,) = pool.map(lambda _: threading.get_ident(), range(1))
        pool.submit(runner.run, batch).result()
    assert threads[1:] == [ident, ident]


def test_an_index_is_given_to_a_gpu_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", used.append)
    for name in ("cuda", "cuda:1"):
        CudaAccelerator(torch.device(name)).activate()
    assert used == [torch.device("cuda:3"), torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nMore."), "too little memory"),
        (OutOfResources(240_000, 101_376, "shared memory"), "use the torch runner"),
    ],
)
def test_exhausted_resources_are_one_line(error: Exception, said: str) -> None:
    with pytest.raises(ValueError, match=said) as found, resource_errors():
        raise error
    assert "\n" not in str(found.value)


def test_which_gpus_are_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Tesla T4")
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, c=capability: c)
        assert unsupported_chip(torch.device("cuda")) is None
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 5))
    reason = unsupported_chip(torch.device("cuda"))
    assert reason == "Tesla T4 has compute capability 7.5 and no bfloat16; 8.0 or higher is needed"


def test_float8_needs_a_gpu_that_converts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ampere, ada = torch.device("cuda:0"), torch.device("cuda:1")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda d: (8, 9 if d == ada else 6))
    for device, dtype in ((ampere, torch.bfloat16), (ada, torch.float8_e4m3fn)):
        check_kv_dtype(device, dtype)
    with pytest.raises(ValueError, match=r"float8 needs compute capability 8\.9 or higher"):
        check_kv_dtype(ampere, torch.float8_e4m3fn)


def test_float32_is_the_interpreters() -> None:
    assert _choose_dtype("float32", on_gpu=False) is torch.float32
    with pytest.raises(ValueError, match="use bfloat16"):
        _choose_dtype("float32", on_gpu=True)


def test_memory_is_planned_and_refused_with_figures() -> None:
    plan: dict[str, Any] = {"work": GIB, "block_bytes": 1024, "share": None, "wanted": 2 * GIB}
    assert blocks_that_fit(free=8 * GIB, **plan) == 2 * GIB // 1024
    assert blocks_that_fit(free=8 * GIB, **{**plan, "share": 0.5}) == 3 * GIB // 1024
    assert blocks_that_fit(free=None, **plan) == 2 * GIB // 1024
    with pytest.raises(ValueError, match=r"kv_memory is 2\.00 GiB and at most 1\.50 GiB"):
        blocks_that_fit(free=3 * GIB + GIB // 2, **plan)
    with pytest.raises(ValueError, match="no memory is left"):
        blocks_that_fit(free=2 * GIB, **plan)
    with pytest.raises(ValueError, match="at least 1024 bytes"):
        blocks_that_fit(free=None, **{**plan, "wanted": 1000})
    check_weights_fit(GIB, 3 * GIB)
    check_weights_fit(GIB, None)
    with pytest.raises(ValueError, match=r"need 16\.0 GiB and the device has 15\.5 GiB"):
        check_weights_fit(16 * GIB, 15 * GIB + GIB // 2)
