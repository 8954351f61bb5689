"""The time of a step on paper: what the first measured run is held against.

    roof      weights, keys and values at the bandwidth of the data sheet
    products  weights at the rate of a copy, of which kernels that stream reach a share
    attention keys and values likewise; the longest item at the rate of one program, if that is more
    launches  kernels of a step, each with a gap before it, in a CUDA graph
    sampling  reads of the logits

Of a step with prompts or drafts there is the host's time to launch it, kernel by kernel and with
the network as a graph: a step is as fast as the GPU if that takes longer.

A program's rate is what it keeps in flight over the latency of memory (Little's law). None of these
figures was measured with this program; each is one line above the table, to be replaced by one that
was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from loadtest.bench.gpu.kernels import products_of
from loadtest.bench.gpu.models import LLAMA31_8B, QWEN3_600M, Shape
from model.kernels.attention import STEP
from model.kernels.tiling import estimated_time, layout_for
from model.kernels.work_list import SPLIT, shares_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """An NVIDIA H200 (SXM)."""

    bandwidth: float = 4.8e12  # bytes/s, data sheet
    copy: float = 0.90  # of it, read and written by a large copy
    stream: float = 0.90  # of a copy, by kernels whose loads are in flight
    latency: float = 0.8e-6  # seconds from a load to its data, under load
    multiprocessors: int = 132
    gap: float = 0.85e-6  # seconds per launch in a CUDA graph
    launch: float = 22e-6  # seconds of the host per kernel that Triton launches on its own
    replay: float = 30e-6  # seconds of the host per CUDA graph
    operations: float = 0.99e15  # per second, dense, in bfloat16, data sheet

    @property
    def rate(self) -> float:
        """Bytes/s of our kernels."""
        return self.bandwidth * self.copy * self.stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A decode step of `batch` sequences of `context` tokens. `goal`: share of the roof."""

    shape: Shape
    batch: int
    context: int
    goal: float | None = None
    greedy: bool = True
    float8: bool = False

    @property
    def name(self) -> str:
        return f"{self.shape.name}{', float8' if self.float8 else ''}"

    @property
    def weight_bytes(self) -> int:
        return self.shape.float8_weight_bytes if self.float8 else self.shape.weight_bytes


_QWEN, _LLAMA = Shape("Qwen3-0.6B", QWEN3_600M), Shape("Llama-3.1-8B", LLAMA31_8B)
CASES = (
    Case(shape=_QWEN, batch=1, context=512, goal=0.50),
    Case(shape=_QWEN, batch=256, context=820, goal=0.65, greedy=False),  # W1, while all run
    Case(shape=_LLAMA, batch=1, context=512, goal=0.76),
    Case(shape=_LLAMA, batch=256, context=1536, goal=0.74, greedy=False),
    Case(shape=_QWEN, batch=1, context=512, float8=True),
    Case(shape=_LLAMA, batch=1, context=512, float8=True),
)
_ROWS = (128, 256, 512, 2048)  # of a step, for the products of a layer
_PER_LAYER = 8  # norm, QKV, rotary and store, attention, out, norm, gate-up with SiLU, down
_PER_STEP = 7  # rows, items, embedding; norm, head, argmax, write-back
_SAMPLED = 11  # more: ten of sampling, a copy
_CHANGED = 1  # before a step, and in no graph: what the host changes of the state
_HEAD = 4  # of those per step, in no graph of a mixed step: norm, head, argmax, write-back
_READS = 4  # of a row of logits, without top-k and top-p
_OPTIONS = ("bandwidth", "copy", "stream", "gap", "launch", "replay")


def launches(layers: int, *, greedy: bool) -> int:
    """Kernels of a decode step."""
    return _PER_LAYER * layers + _PER_STEP + (0 if greedy else _SAMPLED)


def host_seconds(layers: int, chip: Chip, *, captured: bool) -> float:
    """To launch a greedy step with prompts or drafts."""
    if captured:
        return (_CHANGED + _HEAD) * chip.launch + chip.replay
    return (_CHANGED + launches(layers, greedy=True)) * chip.launch


def predict(case: Case, chip: Chip, *, in_flight: int = 2) -> dict[str, float]:
    """Microseconds of each part, their sum, the roof, and its share.

    `in_flight`: steps of attention whose loads are in flight.
    """
    config = case.shape.config
    weights, kv = case.weight_bytes, case.batch * case.context * case.shape.kv_bytes
    layer_kv = kv / config.num_layers
    splits, programs = -(-case.context // SPLIT), 2 * chip.multiprocessors
    is_cut = splits > 1 and shares_for(programs, config.num_kv_heads) > case.batch
    longest = min(case.context, SPLIT) if is_cut else case.context
    item = longest * 2 * 2 * config.head_dim  # bytes of one program's work
    of_program = in_flight * STEP * 2 * 2 * config.head_dim / chip.latency
    items = case.batch * config.num_kv_heads * (splits if is_cut else 1)
    rounds = -(-items // programs)
    attention = config.num_layers * max(layer_kv / chip.rate, rounds * item / of_program)
    logits = 0 if case.greedy else _READS * 4 * case.batch * config.vocab_size
    seconds = {
        "products": weights / chip.rate,
        "attention": attention,
        "launches": launches(config.num_layers, greedy=case.greedy) * chip.gap,
        "sampling": logits / chip.rate,
    }
    total, roof = sum(seconds.values()), (weights + kv) / chip.bandwidth
    parts = {name: 1e6 * value for name, value in seconds.items()}
    return parts | {"step": 1e6 * total, "roof": 1e6 * roof, "of roof": roof / total}


def lines(chip: Chip) -> Iterator[str]:
    """The table, in Markdown: microseconds. Waiting: the share without loads ahead of a step."""
    names = ("products", "attention", "launches", "sampling", "step", "roof")
    yield f"| model | batch x context | {' | '.join(names)} | waiting | of roof | goal |"
    yield "|---|---|" + "---|" * (len(names) + 3)
    for case in CASES:
        found = predict(case, chip)
        cells = " | ".join(f"{found[name]:.0f}" for name in names)
        goal = "-" if case.goal is None else f"{case.goal:.2f}"
        waiting = predict(case, chip, in_flight=1)
        yield (
            f"| {case.name} | {case.batch} x {case.context} | {cells} "
            f"| {waiting['of roof']:.2f} | {found['of roof']:.2f} | {goal} |"
        )


def host_lines(chip: Chip) -> Iterator[str]:
    """The host's time for a step with prompts, in Markdown: microseconds."""
    yield "| model | kernel by kernel | network as a graph |"
    yield "|---|---|---|"
    for shape in (_QWEN, _LLAMA):
        layers = shape.config.num_layers
        times = (host_seconds(layers, chip, captured=captured) for captured in (False, True))
        yield f"| {shape.name} | {' | '.join(f'{1e6 * seconds:.0f}' for seconds in times)} |"


def product_lines(chip: Chip) -> Iterator[str]:
    """Products of one layer by rows of a step, in Markdown: how they are laid out, microseconds.

    The roof of many rows is that of the instructions.
    """
    weights = ("qkv", "out", "gate-up", "down")
    yield f"| model | rows | {' | '.join(weights)} | µs | roof |\n|---|---|" + "---|" * 6
    for shape in (_QWEN, _LLAMA):
        sizes = [size[1:] for size in products_of(shape) if size[0] in weights]
        for rows in _ROWS:
            found = [
                layout_for(rows, *size, multiprocessors=chip.multiprocessors) for size in sizes
            ]
            seconds = sum(
                1e-9 * estimated_time(layout, rows, *size, chip.multiprocessors)
                for layout, size in zip(found, sizes, strict=True)
            )
            count = sum(outputs * inputs for outputs, inputs in sizes)
            roof = max(2 * count / chip.bandwidth, 2 * rows * count / chip.operations)
            cells = " | ".join(
                f"{layout.tiling.rows}x{layout.tiling.outputs}{' parts' if layout.is_apart else ''}"
                for layout in found
            )
            yield f"| {shape.name} | {rows} | {cells} | {1e6 * seconds:.0f} | {1e6 * roof:.0f} |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in _OPTIONS:
        parser.add_argument(
            f"--{name}", type=float, default=getattr(Chip(), name), help="see `Chip`"
        )


def run(options: argparse.Namespace) -> None:
    chip = Chip(**{name: getattr(options, name) for name in _OPTIONS})
    print(*lines(chip), "", *host_lines(chip), "", *product_lines(chip), sep="\n")
