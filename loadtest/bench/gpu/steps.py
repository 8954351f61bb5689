"""Decode steps of a warm runner, one ahead of the host, against the memory roof.

of roof      time to read weights, keys and values at the chip's bandwidth / time of a step
device us    device time of a step that is queued entirely before it begins
host us      time of the host to launch a step
busy         device us / time of a step

Of a step with a prompt there is the host's time to launch it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from loadtest.bench.gpu.bench import Bench
from loadtest.bench.gpu.models import Shape
from loadtest.bench.gpu.offline import Offline, Workload
from model.runners import StepHandle

_PAUSES = 3  # products that keep the device busy for milliseconds
_SIDE = 8192
_PROMPT = 500  # tokens
_SAMPLING = (("greedy", 0.0, 1.0), ("sampled", 0.6, 1.0), ("top-p", 0.6, 0.9))


def measure(bench: Bench) -> None:
    """Both models at the smallest and largest batch size, with a context of 512 tokens."""
    bandwidth, _ = bench.bandwidth()
    for shape in bench.models:
        bench.check_time()
        runner = bench.runner(shape)
        offline = Offline(runner, budget=bench.budget)
        for batch in sorted({bench.batches[0], bench.batches[-1]}):
            for name, temperature, top_p in _SAMPLING:
                bench.check_time()
                workload = Workload(
                    name=name,
                    lengths=((8, 3) if bench.smoke else (512, 60),) * batch,
                    temperature=temperature,
                    top_p=top_p,
                )
                _row(bench, shape, offline, workload, bandwidth=bandwidth)
        _prompt_row(bench, shape, offline, captured=runner.has_mixed_graphs)
        bench.release(runner)


def _prompt_row(bench: Bench, shape: Shape, offline: Offline, *, captured: bool) -> None:
    """A prompt beside another sequence, several times: the first one captures its graph."""
    bench.check_time()
    length = 5 if bench.smoke else _PROMPT
    times: list[float] = []
    for _ in range(1 if bench.smoke else 5):
        workload = Workload(name="prompt", lengths=((1, 8), (length, 2)))
        times += offline.run(workload).prompt_host_seconds[-1:]
    bench.add(
        "steps with prompts",
        {
            "model": shape.name,
            "rows": length + 1,
            "graph": captured,
            "host us": statistics.median(times) * 1e6,
        },
    )


def _row(
    bench: Bench, shape: Shape, offline: Offline, workload: Workload, *, bandwidth: float
) -> None:
    context, _ = workload.lengths[0]
    offline.run(workload)  # fills the pool, compiles, captures
    outcome = offline.run(workload, start_at=context)
    step = outcome.seconds / outcome.steps
    device = _device_seconds(bench, offline, workload, start_at=context)
    moved = shape.weight_bytes + outcome.kv_tokens / outcome.steps * shape.kv_bytes
    bench.add(
        "steps",
        {
            "model": shape.name,
            "batch": len(workload.lengths),
            "tokens": workload.name,
            "ms": step * 1e3,
            "tokens/s": outcome.tokens / outcome.seconds,
            "of roof": moved / bandwidth / step,
            "device us": None if device is None else device * 1e6,
            "host us": statistics.median(outcome.host_seconds) * 1e6,
            "busy": None if device is None else min(1.0, device / step),
        },
    )


def _device_seconds(
    bench: Bench, offline: Offline, workload: Workload, *, start_at: int
) -> float | None:
    """Median device time of a step, without waits for the host; None on a CPU.

    The device computes something else first, so that a step is launched entirely before it begins.
    """
    if bench.device.type == "cpu":
        return None
    filler = torch.randn(_SIDE, _SIDE, device=bench.device, dtype=torch.bfloat16)
    product = torch.empty_like(filler)
    spans: list[tuple[Any, Any]] = []

    def behind_a_pause(launch: Callable[[], StepHandle]) -> StepHandle:
        for _ in range(_PAUSES):
            torch.mm(filler, filler, out=product)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        handle = launch()
        end.record()
        spans.append((begin, end))
        return handle

    offline.run(workload, start_at=start_at, around=behind_a_pause)
    torch.cuda.synchronize()
    return statistics.median(float(begin.elapsed_time(end)) for begin, end in spans) / 1000
