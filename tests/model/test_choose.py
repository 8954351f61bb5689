"""Sizes that nobody gave fit the runner, and the operator's word is taken."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

import model.runners
from model.adapters import Adapter
from model.config import Activation, Norm, Position
from model.native.library import NativeLibrary
from model.runners import RunnerOptions, choose
from model.runners.choose import choose_runner, choose_sizes
from model.runners.cuda.network import FusedNetwork
from tests.support.builders import tiny_model_config

MIB = 1024**2


def sizes(runner: str, **given: Any) -> tuple[int, float | None, int, int]:
    wanted: dict[str, Any] = {"kv_memory": None, "max_batch_tokens": None, "max_sequences": None}
    wanted |= {"memory_share": 0.8, **given}
    options = choose_sizes(RunnerOptions(), runner=runner, **wanted)
    return (
        options.kv_memory,
        options.memory_share,
        options.max_batch_tokens,
        options.max_sequences,
    )


def test_a_gpu_is_filled_and_a_cpu_is_shared() -> None:
    assert sizes("native") == sizes("torch") == (512 * MIB, None, 512, 64)
    assert sizes("cuda")[1:] == (0.8, 2048, 256)


def test_what_is_given_wins() -> None:
    given = {"kv_memory": 5 * MIB, "max_batch_tokens": 33, "max_sequences": 22}
    for runner in ("native", "cuda"):
        assert sizes(runner, **given) == (5 * MIB, None, 33, 22)


@pytest.mark.parametrize("runner", ["torch", "cuda"])
def test_one_size_gives_way_to_the_other(runner: str) -> None:
    assert sizes(runner, max_sequences=3000)[2:] == (3000, 3000)
    assert sizes(runner, max_batch_tokens=7)[2:] == (7, 7)
    with pytest.raises(ValueError, match="max_sequences is 8"):
        sizes(runner, max_batch_tokens=7, max_sequences=8)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, as far as the choice is concerned."""
    monkeypatch.setattr(choose, "device_type", lambda _name: "cuda")
    monkeypatch.setattr(
        "model.runners.torch.choose_device",
        lambda name: torch.device("cuda" if name == "auto" else name),
    )
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _device: "some GPU")


@pytest.mark.usefixtures("a_gpu")
def test_a_model_that_the_gpu_runner_does_not_support_falls_back() -> None:
    """GPT-2 on a GPU ended the start with an error from deep inside the runner."""
    assert choose_runner("auto", tiny_model_config(), RunnerOptions()).name == "cuda"
    gpt2 = tiny_model_config(
        norm=Norm.LAYER, position=Position.LEARNED, gated_mlp=False, activation=Activation.GELU_TANH
    )
    choice = choose_runner("auto", gpt2, RunnerOptions())
    assert choice.name == "torch"
    assert (
        choice.fallback_reason == "cuda: the cuda runner does not support norms other than RMSNorm"
    )
    assert choose_runner("cuda", gpt2, RunnerOptions()).name == "cuda"  # a name is obeyed
    with pytest.raises(ValueError, match="RMSNorm; for llama use the torch runner"):
        FusedNetwork(gpt2, {}, dtype=torch.bfloat16, device=torch.device("cpu"))


@pytest.mark.usefixtures("a_gpu")
def test_a_gpu_without_bfloat16_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: (7, 5))
    choice = choose_runner("auto", tiny_model_config(), RunnerOptions(device="cuda:1"))
    assert choice.name == "torch"
    assert choice.fallback_reason == (
        "cuda: some GPU has compute capability 7.5 and no bfloat16; 8.0 or higher is needed"
    )


@pytest.mark.usefixtures("a_gpu")
def test_without_triton_the_torch_runner_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(model, "runners", model.runners)  # an import sets it, and undo restores it
    for name in [name for name in sys.modules if name.startswith(("model.kernels", "model.runn"))]:
        if "choose" not in name:
            monkeypatch.delitem(sys.modules, name)
    choice = choose_runner("auto", tiny_model_config(), RunnerOptions())
    assert choice.name == "torch"
    assert choice.fallback_reason == "cuda: the package triton is not installed"


def test_other_accelerators_use_the_torch_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "device_type", lambda _name: "mps")
    choice = choose_runner("auto", tiny_model_config(), RunnerOptions())
    assert choice.name == "torch"
    assert "mps" in choice.fallback_reason


def test_a_shared_network_is_not_for_the_native_runner() -> None:
    options = RunnerOptions(device="cpu")
    choice = choose_runner("auto", tiny_model_config(), options, num_ranks=2)
    assert choice.name == "torch"
    assert "tensor parallelism" in choice.fallback_reason


@pytest.mark.usefixtures("a_gpu")
def test_weights_of_8_bits_on_a_gpu_need_the_cuda_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    config, options = tiny_model_config(), RunnerOptions(dtype="float8")
    for name in ("auto", "cuda"):
        choice = choose_runner(name, config, options, num_ranks=2)
        assert (choice.name, choice.dtype) == ("cuda", "bfloat16")
    eight = replace(options, dtype="int8")
    for name in ("auto", "cuda"):
        with pytest.raises(ValueError, match="int8 is not possible: the checkpoint is not known"):
            choose_runner(name, config, eight)
        choice = choose_runner(name, config, eight, eight_bit_reason=None)
        assert (choice.name, choice.keeps_blocks) == ("cuda", True)
        with pytest.raises(ValueError, match="does not support tensor parallelism on GPUs"):
            choose_runner(name, config, eight, num_ranks=2, eight_bit_reason=None)
    for name in ("torch", "native"):
        with pytest.raises(ValueError, match="dtype float8 needs the cuda runner, not"):
            choose_runner(name, config, options)
    with pytest.raises(ValueError, match=r"not possible: .*RMSNorm; use --dtype auto"):
        choose_runner("auto", tiny_model_config(norm=Norm.LAYER), options)
    adapted = replace(options, adapters=(Adapter(digest="", factors={}),))
    assert choose_runner("auto", config, adapted).name == "cuda"
    assert choose_runner("auto", config, replace(adapted, dtype="auto")).name == "cuda"
    compressed = replace(options, kv_compression="window:64")
    with pytest.raises(ValueError, match="which has no dtype float8"):
        choose_runner("auto", config, compressed)
    monkeypatch.setattr(choose, "device_type", lambda _name: "cpu")
    with pytest.raises(ValueError, match="it needs an NVIDIA GPU, and the device is cpu"):
        choose_runner("auto", config, options)


def test_four_bits_need_the_native_runner_and_a_file_that_has_them() -> None:
    options = RunnerOptions(dtype="int4", device="cpu")
    config = tiny_model_config(head_dim=16)
    for name in ("torch", "cuda"):
        with pytest.raises(ValueError, match="dtype int4 needs the native runner"):
            choose_runner(name, config, options, four_bit_reason=None)
    with pytest.raises(ValueError, match="tensor parallelism"):
        choose_runner("auto", config, options, num_ranks=2, four_bit_reason=None)
    with pytest.raises(ValueError, match="not possible: they are too wide; use --dtype int8"):
        choose_runner("auto", config, options, four_bit_reason="they are too wide")
    with pytest.raises(ValueError, match="RMSNorm"):
        choose_runner("auto", tiny_model_config(norm=Norm.LAYER), options, four_bit_reason=None)
    if choose._native_reason(config) is None:
        for name in ("auto", "native"):
            choice = choose_runner(name, config, options, four_bit_reason=None)
            assert (choice.name, choice.keeps_blocks) == ("native", True)


@pytest.mark.parametrize(
    ("variant", "is_alone", "reason", "dtype", "keeps"),
    [
        ("avx2", True, None, "auto", True),
        ("avx512", True, None, "auto", False),
        ("portable", True, None, "auto", False),
        ("avx2", False, None, "auto", False),
        ("avx2", True, "it has 6 bits", "auto", False),
        ("avx2", True, None, "int8", False),
    ],
)
def test_four_bits_are_the_default_where_they_are_always_faster(
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    is_alone: bool,
    reason: str | None,
    dtype: str,
    keeps: bool,
) -> None:
    """But not if engines on other machines continue the answers: they may have other CPUs."""
    monkeypatch.setattr(choose, "_native_reason", lambda _config: None)
    monkeypatch.setattr(NativeLibrary, "variants", [variant, "portable"])
    options = RunnerOptions(dtype=dtype, device="cpu")
    for name in ("auto", "native"):
        choice = choose_runner(
            name, tiny_model_config(), options, is_alone=is_alone, four_bit_reason=reason
        )
        assert (choice.name, choice.keeps_blocks) == ("native", keeps)
