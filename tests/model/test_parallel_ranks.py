"""Ranks: what cannot be shared is refused at once, and each reads its share and no more."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import load_model
from model.parallel import RankLost
from model.parallel.ranks import FollowerProcesses, RankSpec, check_ranks, start_parallel
from model.parallel.shares import share_tensor
from model.runners import RunnerOptions, overlapped
from tests.support.builders import Piece, make_batch, tiny_model_config
from tests.support.tiny_model import TinyModel
from tests.support.weights import share_weights

OPTIONS = RunnerOptions(
    dtype="float32", device="cpu", block_size=8, num_blocks=8, max_sequences=4, max_batch_tokens=32
)


def test_a_spec_survives_json() -> None:
    spec = RankSpec(
        path="/a b/é",
        runner="torch",
        dtype=None,
        options=replace(OPTIONS, memory_share=0.5),
        rank=3,
        num_ranks=4,
        port=1,
    )
    assert RankSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("num_ranks", "given", "said"),
    [
        (4, {}, "over 4 must divide num_kv_heads 2"),
        (2, {"runner": "native"}, "the native runner does not support tensor parallelism"),
        (2, {"options": replace(OPTIONS, device="cuda:1")}, "devices"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int, given: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("model.parallel.ranks.choose_device", torch.device)
    known: dict[str, Any] = {"runner": "torch", "config": tiny_model_config(), "options": OPTIONS}
    check_ranks(2, **known)
    with pytest.raises(ValueError, match=said):
        check_ranks(num_ranks, **known | given)


def test_too_few_gpus_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.parallel.ranks.choose_device", torch.device)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    options = replace(OPTIONS, device="cuda")
    with pytest.raises(ValueError, match="over 2 needs as many GPUs; there are 1"):
        check_ranks(2, runner="cuda", config=tiny_model_config(), options=options)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_rank_reads_its_share_and_keeps_no_more(
    tiny_model: TinyModel, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "tiny.gguf"
    path = tiny_model.write_gguf(path) if kind == "gguf" else tiny_model.write_folder(tmp_path)
    whole = load_model(path)
    for rank in range(2):
        keep = partial(share_tensor, config=whole.config, rank=rank, num_ranks=2)
        share = load_model(path, keep=keep)
        expected = share_weights(whole.config, whole.weights, rank=rank, num_ranks=2)
        assert share.digest == whole.digest
        assert share.weights.keys() == expected.keys()
        for name, tensor in share.weights.items():
            assert torch.equal(tensor, expected[name]), name
            if tensor.shape != whole.weights[name].shape:
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def steps() -> Any:
    prompt = Piece(tokens=list(range(9)), count=9, blocks=[5, 1], sampling={"logprobs": True})
    yield make_batch([prompt, Piece(tokens=[4], blocks=[2])], num_top=2)
    for length in range(2, 5):
        yield make_batch([Piece(tokens=[4] * length, count=1, blocks=[2])])


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["torch", "cuda"])
def test_processes_do_the_steps_of_one_runner(
    tiny_model: TinyModel, tmp_path: Path, runner: str
) -> None:
    """Over the cuda runner, in Triton's interpreter, they are launched ahead."""
    path = tiny_model.write_folder(tmp_path)
    model = load_model(path)
    alone = alone_runner(runner, model)
    leader, followers = start_parallel(
        path, runner=runner, dtype="float32", options=OPTIONS, num_ranks=2
    )
    lost: list[str] = []
    followers.when_lost(lost.append)
    try:
        assert leader.config == model.config
        assert "tp2" in leader.numeric_class
        for batch in steps():
            expected, found = alone.run(batch), leader.run(batch)
            np.testing.assert_array_equal(found.tokens_R, expected.tokens_R)
            np.testing.assert_allclose(found.logprobs_R, expected.logprobs_R, atol=1e-4)
        ahead = overlapped(leader)
        assert (ahead is not None) == (runner == "cuda")
        if ahead is not None:
            first, *others = steps()
            handles = [ahead.launch(first), ahead.launch(others[0])]
            for handle, batch in zip(handles, [first, others[0]], strict=True):
                tokens = ahead.collect(handle).tokens_R
                np.testing.assert_array_equal(tokens, alone.run(batch).tokens_R)
    finally:
        leader.close()
    assert lost == []
    assert "ranks" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.slow
def test_a_rank_that_cannot_load_says_why(tmp_path: Path) -> None:
    spec = RankSpec(
        path=str(tmp_path / "nothing.gguf"),
        runner="torch",
        dtype=None,
        options=OPTIONS,
        rank=1,
        num_ranks=2,
        port=1,
    )
    followers = FollowerProcesses([spec])
    try:
        with pytest.raises(RankLost, match=r"rank 1: nothing\.gguf: No such file"):
            followers.wait_until_loaded()
    finally:
        followers.end()


def alone_runner(name: str, model: Any) -> Any:
    if name == "cuda":
        from model.runners.cuda.build import build_runner

        return build_runner(
            model.config, model.weights, options=OPTIONS, digest=model.digest, check=None
        )
    from model.runners.torch import TorchRunner

    return TorchRunner(model.config, model.weights, options=OPTIONS, digest=model.digest)
