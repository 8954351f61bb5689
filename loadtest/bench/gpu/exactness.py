"""Exactness on the device: one text computed in several ways, in batches of any size.

    way, batch      1   2   8  ...  256
    alone            =   =   =        =      prompt in one chunk, then token by token
    chunks of 7      =   =   =        =      prompt in chunks
    prefix hit       =   =   =        =      full blocks of the prompt from the prefix cache
    recomputed       =   =   =        =      preempted; prompt and output computed as a prompt
    drafts           =   =   =        =      tokens of the output as drafts, and a wrong one

Chunks end inside of and at token buckets, so that graphs of every size compute some of them.
`=` means: tokens and log probabilities have the same bits as if the text were alone in its batch.
Differences are named, and the stage fails.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

from loadtest.bench.gpu.background import BackgroundLoad
from loadtest.bench.gpu.bench import Bench
from loadtest.bench.gpu.models import Shape
from loadtest.bench.gpu.offline import Offline, Workload
from model.kernels import launch
from model.runners import Runner
from model.runners.exactness import ExactnessCheck, check_exactness

_SIZES = (1, 2, 7, 8, 9, 16, 17, 33, 64, 128, 129, 255, 256)
_SHORT = ExactnessCheck(prompt=40, beside=(), chunks=(1, 7, 17, 33))
_LONG = ExactnessCheck(
    prompt=1100, answer=8, beside=(), chunks=(17, 64, 128, 130, 512, 777)
)  # over several splits


class NotExact(Exception):
    """Bits depend on the batch; the message names model, way and size."""


def measure(bench: Bench) -> None:
    """Each model, and one with 8-bit keys and values. Raises NotExact."""
    plans = [(shape, "auto") for shape in bench.models]
    if not bench.smoke:
        plans.append((bench.models[0], "float8"))
    broken = []
    for shape, kv_dtype in plans:
        if bench.left <= 0:
            break
        name = shape.name if kv_dtype == "auto" else f"{shape.name} {kv_dtype}"
        sizes = (1, 3) if bench.smoke else _SIZES
        runner = bench.runner(
            shape, proven=not bench.smoke, kv_dtype=kv_dtype, max_sequences=max(sizes) + 2
        )
        if bench.smoke:
            broken += matrix(
                bench, runner, name, ExactnessCheck(prompt=9, answer=2, chunks=(4,)), sizes
            )
        else:
            bench.add(
                "exactness: the runner's own result",
                {
                    "model": name,
                    "exact": runner.exact,
                    "mixed graphs": runner.has_mixed_graphs,
                    "numeric class": runner.numeric_class,
                },
            )
            broken += _every_size(bench, runner, name)
            broken += matrix(bench, runner, name, _SHORT, sizes)
            broken += matrix(bench, runner, name, _LONG, (1, 2, 16, 64, 256))
        bench.release(runner)
    if (
        broken and bench.device.type != "cpu"
    ):  # on a CPU the sums are NumPy's, which depend on the rows
        raise NotExact(f"not exact: {'; '.join(broken)}")
    bench.check_time()


def matrix(
    bench: Bench, runner: Runner, name: str, trial: ExactnessCheck, sizes: tuple[int, ...]
) -> list[str]:
    """Tries and prints ways by batch size. Returns the names of unequal ones."""
    found = {}
    for size in sizes:
        if bench.left <= 0:
            break
        room = max(16, runner.block_size)
        background = BackgroundLoad(runner, others=size - 1, alone=trial.answer, room=room)
        found[size] = check_exactness(background, replace(trial, beside=()))
    ways = next(iter(found.values()), {})
    for way in ways:
        cells = {str(size): found[size][way] for size in found}
        bench.add(
            f"exactness: {name}, {trial.prompt} tokens, way by batch size",
            {"way": way, **cells},
        )
    return [
        f"{name}, {trial.prompt} tokens, {way}, batch size {size}"
        for size, equal_by_way in found.items()
        for way, equal in equal_by_way.items()
        if not equal
    ]


def _every_size(bench: Bench, runner: Runner, name: str) -> list[str]:
    """With 1 to 255 others, whose prompts and outputs begin and end at any step."""
    trial = ExactnessCheck(prompt=24, answer=4, beside=tuple(range(1, 256)), chunks=())
    found = check_exactness(runner, trial)
    broken = [way for way, equal in found.items() if not equal]
    bench.add(
        "exactness: every batch size from 1 to 256",
        {"model": name, "tried": len(found), "not equal": len(broken), "equal": not broken},
    )
    return [f"{name}, {way}" for way in broken]


def measure_cost(bench: Bench) -> None:
    """Decode steps with our products and with those of the vendor BLAS, which are not exact."""
    for shape in bench.models:
        ours = _decode_rates(bench, shape, library=False)
        theirs = _decode_rates(bench, shape, library=True)
        for batch, rate in ours.items():
            bench.add(
                "cost of exactness",
                {
                    "model": shape.name,
                    "batch": batch,
                    "exact tokens/s": rate,
                    "library tokens/s": theirs[batch],
                    "cost": 1 - rate / theirs[batch],
                },
            )


def measure_overlap(bench: Bench) -> None:
    """Decode steps whose launches follow one another, and overlap. Raises NotExact."""
    for shape in bench.models:
        rates = _decode_rates(bench, shape)
        launch.OVERLAPPED = True
        overlapped = _decode_rates(bench, shape, proven=not bench.smoke)
        launch.OVERLAPPED = False
        for batch, rate in rates.items():
            bench.add(
                "launches that overlap",
                {
                    "model": shape.name,
                    "batch": batch,
                    "tokens/s": rate,
                    "overlapped tokens/s": overlapped[batch],
                    "gain": overlapped[batch] / rate - 1,
                },
            )


def _decode_rates(
    bench: Bench, shape: Shape, *, library: bool = False, proven: bool = False
) -> dict[int, float]:
    """Tokens/s of decode steps by batch size; a first run fills the pool and captures graphs."""
    bench.check_time()
    runner = bench.runner(shape, library=library, proven=proven)
    if proven and not runner.exact:
        raise NotExact(f"{shape.name} is not exact if launches overlap")
    context, count = (8, 3) if bench.smoke else (512, 40)
    run = Offline(runner, budget=bench.budget).run
    rates = {}
    for batch in bench.batches:
        workload = Workload(name="decode", lengths=((context, count),) * batch)
        run(workload)
        outcomes = [run(workload, start_at=context) for _ in range(1 if bench.smoke else 3)]
        rates[batch] = statistics.median(found.tokens / found.seconds for found in outcomes)
    bench.release(runner)
    return rates
