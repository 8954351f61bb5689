"""Time of native steps against the lower bound of the machine.

The lower bound is the longer of two times, with rates that are probed in the same run:

    memory       bytes of weights, keys and values read / memory bandwidth
    arithmetic   8-bit products / products per second of the variant's best instructions

Times are the minimum of several runs. On a machine with other load only the ratio is meaningful.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from model.batch import Batch, SamplingBatch
from model.checkpoint import open_model
from model.checkpoint.four_bit import BLOCK_BYTES, BLOCK_INPUTS
from model.limits import usable_cpus
from model.native.roof import count_weights, probe
from model.runners import RunnerOptions
from model.runners.native import NativeRunner

_BLOCK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """`sequences` of length `context`, each of which computes its last `count` tokens."""

    sequences: int
    context: int
    count: int = 1

    @property
    def rows(self) -> int:
        return self.sequences * self.count

    def batch(self, num_blocks: int) -> Batch:
        """Each sequence has its own blocks and samples one token greedily."""
        width = -(-self.context // _BLOCK)
        table = np.arange(self.sequences * width, dtype=np.int32) % num_blocks
        one = np.arange(self.context - self.count, self.context, dtype=np.int32)
        starts = np.arange(self.sequences + 1, dtype=np.int32) * self.count
        return Batch(
            tokens_T=np.ones(self.rows, np.int32),
            positions_T=np.tile(one, self.sequences),
            query_starts_S1=starts,
            context_lens_S=np.full(self.sequences, self.context, np.int32),
            block_table_SB=table.reshape(self.sequences, width),
            batch_slots_S=np.arange(self.sequences, dtype=np.int32),
            sample_rows_R=starts[1:] - 1,
            sampling=SamplingBatch.plain(self.sequences, vocab_size=1),
            score_rows_Q=np.zeros(0, np.int32),
            score_ids_Q=np.zeros(0, np.int32),
        )


def least_time(runner: NativeRunner, work: Work, *, repeats: int) -> float:
    """Seconds of the fastest of several equal steps."""
    batch = work.batch(runner.num_blocks)
    times = []
    for _ in range(repeats + 1):  # the first run touches the memory
        start = time.perf_counter()
        runner.run(batch)
        times.append(time.perf_counter() - start)
    return min(times)


WORKS = (
    *(Work(sequences=m, context=64) for m in (1, 8, 16, 32, 64, 256)),
    *(Work(sequences=1, context=m, count=m) for m in (256, 512)),
    *(Work(sequences=1, context=c) for c in (128, 1024, 4096, 8192)),
    *(Work(sequences=m, context=1024) for m in (8, 32)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--variant", default="")
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--dtype", choices=("int8", "int4"), default="int8")
    parser.add_argument("--repeats", type=int, default=10)


def run(arguments: argparse.Namespace) -> None:
    four_bit = arguments.dtype == "int4"
    model = open_model(arguments.model, four_bit=four_bit)
    weights = count_weights(model.config)
    if four_bit:
        weights = replace(weights, layer_bytes=BLOCK_BYTES / BLOCK_INPUTS)
    options = RunnerOptions(
        num_threads=arguments.threads, dtype=arguments.dtype, kv_dtype=arguments.kv, kv_memory=2**30
    )
    started = time.perf_counter()
    runner = NativeRunner(
        model.config, model.weights, options=options, digest=model.digest,
        variant=arguments.variant,
    )  # fmt: skip
    print(f"{runner.variant}, {arguments.threads} threads, {runner.numeric_class}")
    print(f"weights packed in {time.perf_counter() - started:.1f} s")
    roof = probe(threads=[arguments.threads], variant=runner.variant)
    print(f"memory {roof.bytes_a_second / 1e9:.1f} GB/s", end=", ")
    print(f"{roof.products_a_second / 1e9:.0f} G products/s\n")
    print("| sequences | tokens each | context | ms | tokens/s | roof ms | of roof |")
    print("|---|---|---|---|---|---|---|")
    kv_bytes = 2**30 // (runner.num_blocks * _BLOCK)  # of one token in all layers
    for work in WORKS:
        if work.context > model.config.max_model_len or work.rows > options.max_batch_tokens:
            continue
        seconds = least_time(runner, work, repeats=arguments.repeats)
        least = roof.seconds(
            weights,
            rows=work.rows,
            outputs=work.sequences,
            kv_bytes=work.sequences * work.context * kv_bytes,
        )
        print(
            f"| {work.sequences} | {work.count} | {work.context} | {seconds * 1e3:.2f} "
            f"| {work.rows / seconds:.0f} | {least * 1e3:.2f} | {least / seconds:.2f} |",
            flush=True,
        )
    runner.close()
