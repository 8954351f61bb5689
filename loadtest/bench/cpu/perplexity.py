"""Perplexity of a text by runner and data type: the cost of 8 bits.

The text is cut into windows of equal length; each token of a window but the first is predicted from
those before it. One window is one step, so keys and values are read as they are stored.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from model.batch import Batch, Ints, SamplingBatch
from model.checkpoint import LoadedModel, load_model
from model.runners import Runner, RunnerOptions
from model.runners.native import NativeRunner
from model.runners.torch import TorchRunner
from model.text.tokenizer import Tokenizer

TEXT = Path(__file__).parents[3] / "tests" / "data" / "perplexity.txt"


def scoring_batch(tokens_T: Ints, *, block_size: int) -> Batch:
    """One sequence; scores every token but the first."""
    count, zero = len(tokens_T), np.zeros(1, np.int32)
    return Batch(
        tokens_T=tokens_T,
        positions_T=np.arange(count, dtype=np.int32),
        query_starts_S1=np.array([0, count], np.int32),
        context_lens_S=np.array([count], np.int32),
        block_table_SB=np.arange(-(-count // block_size), dtype=np.int32)[None],
        batch_slots_S=zero,
        sample_rows_R=zero[:0],
        sampling=SamplingBatch.plain(0, vocab_size=1),
        score_rows_Q=np.arange(count - 1, dtype=np.int32),
        score_ids_Q=tokens_T[1:],
    )


def perplexity(runner: Runner, windows: list[Ints]) -> float:
    """Exp of the mean negative log probability of all predicted tokens."""
    total, count = 0.0, 0
    for tokens_T in windows:
        batch = scoring_batch(tokens_T, block_size=runner.block_size)
        logprobs_Q = runner.run(batch).score_logprobs_Q.astype(np.float64)
        total, count = total - float(logprobs_Q.sum()), count + len(logprobs_Q)
    return math.exp(total / count)


def runners(model: LoadedModel, window: int) -> Iterator[tuple[str, Callable[[], Runner]]]:
    """(name, function that builds the runner); the reference first."""

    def options(dtype: str, kv_dtype: str = "auto") -> RunnerOptions:
        return RunnerOptions(
            dtype=dtype, kv_dtype=kv_dtype, device="cpu", num_blocks=-(-window // 16),
            max_batch_tokens=window,
        )  # fmt: skip

    def build(kind: type[TorchRunner | NativeRunner], chosen: RunnerOptions) -> Runner:
        return kind(model.config, model.weights, options=chosen, digest=model.digest)

    yield "torch float32", lambda: build(TorchRunner, options("float32"))
    yield "torch bfloat16", lambda: build(TorchRunner, options("bfloat16"))
    yield "native int8, KV bfloat16", lambda: build(NativeRunner, options("int8"))
    yield "native int8, KV int8", lambda: build(NativeRunner, options("int8", "int8"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--window", type=int, default=512)


def run(arguments: argparse.Namespace) -> None:
    model = load_model(arguments.model)
    tokenizer = Tokenizer.from_checkpoint(arguments.model)
    ids = np.array(tokenizer.encode(arguments.text.read_text(encoding="utf-8")), np.int32)
    count = len(ids) // arguments.window
    windows = np.split(ids[: count * arguments.window], count)
    print(f"{count} windows of {arguments.window} tokens\n")
    print("| runner | perplexity | relative to float32 |\n|---|---|---|")
    first: float | None = None
    for name, build in runners(model, arguments.window):
        runner = build()
        value = perplexity(runner, windows)
        runner.close()
        first = first or value
        print(f"| {name} | {value:.4f} | {value / first - 1:+.2%} |", flush=True)
