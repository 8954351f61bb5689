"""Perplexity of a text by runner and data type: the cost of 8 and 4 bits.

The text is cut into windows of equal length; each token of a window but the first is predicted from
those before it. One window is one step, so keys and values are read as they are stored.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.batch import Batch, Ints, SamplingBatch
from model.checkpoint import LoadedModel, load_model, open_checkpoint, open_model
from model.checkpoint.four_bit import four_bit_reason
from model.compression import NO_COMPRESSION, Anchors, Compression, Window, parse_compression
from model.kvcache import bytes_per_block
from model.limits import usable_cpus
from model.packed_weights import RoundedWeights
from model.runners import Runner, RunnerOptions
from model.runners.native import NativeRunner
from model.runners.torch import TorchRunner
from model.segments import anchor_ids as anchor_ids_of
from model.segments import segments_batch
from model.text.tokenizer import Tokenizer

_FEW = 100  # tokens whose probabilities are requested first
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


def perplexity(
    runner: Runner, windows: list[Ints], *, anchor_ids: frozenset[int] | None = None
) -> float:
    """Exp of the mean negative log probability of all predicted tokens.

    `anchor_ids`: of a runner whose cache is compressed to anchors.
    """
    total, count = 0.0, 0
    for tokens_T in windows:
        batch = scoring_batch(tokens_T, block_size=runner.block_size)
        if anchor_ids is not None:
            places, tail = _anchors(tokens_T, anchor_ids), batch.block_table_SB.shape[1]
            blocks = range(tail, tail + -(-len(places) // runner.block_size))
            text = (places, range(len(tokens_T)), blocks)
            batch = replace(batch, segments=segments_batch([text]))
        logprobs_Q = runner.run(batch).score_logprobs_Q.astype(np.float64)
        total, count = total - float(logprobs_Q.sum()), count + len(logprobs_Q)
    return math.exp(total / count)


def _anchors(tokens_T: Ints, anchor_ids: frozenset[int]) -> list[int]:
    return [place for place, token in enumerate(tokens_T.tolist()) if token in anchor_ids]


def kept_tokens(
    windows: list[Ints], policy: Compression | None, anchor_ids: frozenset[int]
) -> float:
    """Tokens whose K and V are kept at the end of a window, on average."""
    if policy is None:
        return float(len(windows[0]))
    if isinstance(policy, Window):
        return float(min(len(windows[0]), policy.span))
    kept = 0
    for tokens_T in windows:
        places = _anchors(tokens_T, anchor_ids)
        kept += len(places) + len(tokens_T) - (places[-1] + 1 if places else 0)
    return kept / len(windows)


def compare_compression(model: LoadedModel, path: Path, windows: list[Ints], names: str) -> None:
    """Prints a table: perplexity and the size of the cache under each policy."""
    length, tokenizer = len(windows[0]), Tokenizer.from_checkpoint(path)
    ids = anchor_ids_of(tokenizer.token_bytes, tokenizer.eos_ids)
    print("| KV cache | perplexity | KiB at the end of a window |\n|---|---|---|")
    for name in (NO_COMPRESSION, *names.split(",")):
        policy = parse_compression(name)
        options = RunnerOptions(
            dtype="float32", device="cpu", kv_compression=name, max_batch_tokens=length,
            num_blocks=2 * -(-length // 16),
        )  # fmt: skip
        runner = TorchRunner(model.config, model.weights, options=options, digest=model.digest)
        of_anchors = ids if isinstance(policy, Anchors) else None
        value = perplexity(runner, windows, anchor_ids=of_anchors)
        runner.close()
        size = bytes_per_block(model.config, 1, dtype=torch.float32) / 1024
        kept = size * kept_tokens(windows, policy, ids)
        print(f"| {name} | {value:.2f} | {kept:,.0f} |", flush=True)


def runners(
    model: LoadedModel, window: int, *, path: Path
) -> Iterator[tuple[str, Callable[[], Runner]]]:
    """(name, function that builds the runner); the reference first. `path`: of the model."""

    def options(dtype: str, kv_dtype: str = "auto") -> RunnerOptions:
        return RunnerOptions(
            dtype=dtype, kv_dtype=kv_dtype, device="cpu", num_blocks=-(-window // 16),
            max_batch_tokens=window,
        )  # fmt: skip

    def build(kind: type[TorchRunner | NativeRunner], chosen: RunnerOptions) -> Runner:
        return kind(model.config, model.weights, options=chosen, digest=model.digest)

    yield "torch float32", lambda: build(TorchRunner, options("float32"))
    yield "torch bfloat16", lambda: build(TorchRunner, options("bfloat16"))
    yield (
        "torch bfloat16, weights float8",
        lambda: TorchRunner(
            model.config,
            RoundedWeights(model.weights),
            options=options("bfloat16"),
            digest=model.digest,
        ),
    )
    for kv_dtype in ("bfloat16", "int8"):
        chosen = options("int8", kv_dtype)
        yield f"native int8, KV {kv_dtype}", partial(build, NativeRunner, chosen)
    if four_bit_reason(open_checkpoint(path)) is None:
        opened = open_model(path, four_bit=True)
        yield (
            "native int4, KV int8",
            lambda: NativeRunner(
                opened.config, opened.weights, options=options("int4", "int8"), digest=opened.digest
            ),
        )


def read_windows(
    model: Path, *, window: int, count: int | None = None, text: Path = TEXT
) -> list[Ints]:
    """Tokens of the text, in windows: the first `count`, or all."""
    tokenizer = Tokenizer.from_checkpoint(model)
    ids = np.array(tokenizer.encode(text.read_text(encoding="utf-8")), np.int32)
    count = min(len(ids) // window, count or len(ids))
    return np.split(ids[: count * window], count)


def llama_cpp_perplexity(path: Path, windows: list[Ints], *, vocab: int) -> float:
    """llama.cpp's, over the same tokens. Raises ImportError without `xllamacpp`.

    Its server returns probabilities of the next token only, so each token is a call of its own.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx = 1, len(windows[0]) + 8
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = usable_cpus()
    complete = xllamacpp.Server(params).handle_completions
    total, count = 0.0, 0
    for tokens_T in windows:
        for end in range(1, len(tokens_T)):
            prompt, token = tokens_T[:end].tolist(), int(tokens_T[end])
            few = _next_logprob(complete, prompt, token, num_top=_FEW)
            found = (
                few if few is not None else _next_logprob(complete, prompt, token, num_top=vocab)
            )
            if found is None:
                raise RuntimeError(f"llama.cpp returned no probability of token {token}")
            total, count = total - found, count + 1
    return math.exp(total / count)


def _next_logprob(
    complete: Callable[[dict[str, object]], dict[str, Any]],
    prompt: list[int],
    token: int,
    *,
    num_top: int,
) -> float | None:
    """The log probability of a token after a prompt, if it is among the first `num_top`."""
    wanted = {"prompt": prompt, "n_predict": 1, "n_probs": num_top, "cache_prompt": True}
    # The probabilities are those of the logits. There are none if the end of the text is drawn,
    # which is the likeliest token at some places: so any token is drawn.
    reply = complete({**wanted, "temperature": 1e4, "samplers": ["temperature"], "seed": 1})
    top = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return next((float(entry["logprob"]) for entry in top if entry["id"] == token), None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, help="number of windows; default: the whole text")
    parser.add_argument(
        "--kv-compression",
        metavar="POLICY,...",
        help="compare these, in float32: window:64,anchors",
    )
    parser.add_argument("--llama-cpp", action="store_true", help="also llama.cpp; slow")


def run(arguments: argparse.Namespace) -> None:
    model = load_model(arguments.model)
    windows = read_windows(
        arguments.model, window=arguments.window, count=arguments.windows, text=arguments.text
    )
    print(f"{len(windows)} windows of {arguments.window} tokens\n")
    if arguments.kv_compression:
        compare_compression(model, arguments.model, windows, arguments.kv_compression)
        return
    print("| runner | perplexity | relative to float32 |\n|---|---|---|")
    first: float | None = None
    for name, build in runners(model, arguments.window, path=arguments.model):
        runner = build()
        value = perplexity(runner, windows)
        runner.close()
        first = first or value
        print(f"| {name} | {value:.4f} | {value / first - 1:+.2%} |", flush=True)
    if arguments.llama_cpp:
        vocab = model.config.vocab_size
        value = llama_cpp_perplexity(arguments.model, windows, vocab=vocab)
        print(f"| llama.cpp | {value:.4f} | {value / (first or math.nan) - 1:+.2%} |")
