"""How near the native step comes to what the machine can give.

    python -m loadtest.bench.cpu_bench MODEL [--threads N] [--variant NAME] [--kv int8]

A step cannot take less than the longer of two times, both probed in the same run:

    memory       bytes of weights and of keys and values that are read / bytes a second
    arithmetic   8-bit multiplications / multiplications a second

Times are the least of several runs. On a machine with other work, only the ratio means something.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.batch import Batch, SamplingBatch
from model.checkpoint import load_model
from model.config import ModelConfig
from model.native.library import NativeLibrary, usable_cpus
from model.runners import RunnerOptions
from model.runners.native import NativeRunner

_BLOCK = 16
_PROBED_BYTES = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """`sequences` of equal length, each of which computes its last `count` tokens."""

    sequences: int
    context: int
    count: int = 1

    @property
    def rows(self) -> int:
        """T."""
        return self.sequences * self.count

    def batch(self, num_blocks: int) -> Batch:
        """Every sequence on blocks of its own, sampled greedily at its end."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """What was probed."""

    bytes_a_second: float
    products_a_second: float

    def seconds(self, work: Work, config: ModelConfig, *, kv_bytes: int) -> float:
        """The least time of a step; `kv_bytes` are those of one token in all layers."""
        layers, head = weights_of(config)
        read = layers + head + work.sequences * work.context * kv_bytes
        products = layers * work.rows + head * work.sequences
        return max(read / self.bytes_a_second, products / self.products_a_second)


def weights_of(config: ModelConfig) -> tuple[int, int]:
    """Numbers in the matrices of all layers, and of the head."""
    attention = config.hidden_size * (2 * config.query_size + 2 * config.kv_size)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * (attention + mlp), config.vocab_size * config.hidden_size


def least_time(runner: NativeRunner, work: Work, *, repeats: int) -> float:
    """Seconds of the fastest of several equal steps."""
    batch = work.batch(runner.num_blocks)
    times = []
    for _ in range(repeats + 1):  # the first touches memory
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


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--variant", default="")
    parser.add_argument("--kv", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    model, library = load_model(arguments.model), NativeLibrary()
    options = RunnerOptions(num_threads=arguments.threads, kv_dtype=arguments.kv, kv_memory=2**30)
    started = time.perf_counter()
    runner = NativeRunner(
        model.config, model.weights, options=options, digest=model.digest,
        variant=arguments.variant, library=library,
    )  # fmt: skip
    print(f"{runner.variant}, {arguments.threads} threads, {runner.numeric_class}")
    print(f"weights rotated and packed in {time.perf_counter() - started:.1f} s")
    calls, threads, rows = library.calls, arguments.threads, 32
    roof = Roof(
        bytes_a_second=calls.quire_probe_memory(threads, _PROBED_BYTES, 5),
        products_a_second=calls.quire_probe_products(runner.variant.encode(), threads, rows, 100),
    )
    print(f"memory {roof.bytes_a_second / 1e9:.1f} GB/s", end=", ")
    print(f"{roof.products_a_second / 1e9:.0f} G products/s\n")
    print("| sequences | tokens each | context | ms | tokens/s | roof ms | of roof |")
    print("|---|---|---|---|---|---|---|")
    kv_bytes = 2**30 // (runner.num_blocks * _BLOCK)
    for work in WORKS:
        if work.context > model.config.max_model_len or work.rows > options.max_batch_tokens:
            continue
        seconds = least_time(runner, work, repeats=arguments.repeats)
        least = roof.seconds(work, model.config, kv_bytes=kv_bytes)
        print(
            f"| {work.sequences} | {work.count} | {work.context} | {seconds * 1e3:.2f} "
            f"| {work.rows / seconds:.0f} | {least * 1e3:.2f} | {least / seconds:.2f} |",
            flush=True,
        )
    runner.close()


if __name__ == "__main__":
    main()
