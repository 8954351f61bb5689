"""Measures the GPU engine against the roof of the chip: `python -m loadtest.bench.gpu`.

    precompile    the kernels of all stages, compiled in parallel
    ceilings      bytes/s of a copy, operations/s of a matrix product: the reference for the rest
    sanitize      one attention and one product under memcheck and racecheck
    tests         the kernels' tests, compiled, in bfloat16
    exact         bits of an output by method and by batch size from 1 to 256
    kernels       attention over batch and context, products of few rows, in GB/s and share of copy
    steps         decode steps at several batch sizes: time, share of roof, host time, busy share
    w1            nano-vllm's workload on the runner, offline
    long          the larger model with 256 prompts of 1,024 tokens and as many output tokens each
    engine        W1 through the service's engine
    http          W1 through `quire serve` and our client
    transformers  its continuous batching on the same models and workload, in the same run
    products      products of full steps by our kernel and by the vendor BLAS
    cost          decode steps by our products and by those of the vendor BLAS

Each stage runs in a process of its own, so that its memory is released, its settings are its own,
and a device fault ends nothing else. Its time limit leaves what later stages need at least. Stages
that fail or run out of time are named at the end. The JSON file holds the last run of each stage,
so stages may be run one by one, and what they wrote to stderr is in a log beside it. Exits with 0
if every stage was done. All but the service's stages (engine, http) run without its packages;
`gpu_first.sh` and `gpu_second.sh` beside this file are the commands for a machine that lacks them.
`--smoke` runs everything in miniature, on a CPU too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from model.runners import WHOLE_SUMS
from service.doctor.machine import this_machine

_MINUTES = 8.5
_GRACE = 10.0  # seconds for a stage to start, and to end after SIGTERM
_CUT_OFF = 3  # exit status of a stage that ran out of time


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Seconds are those of an H200 whose kernels are not compiled yet."""

    function: str  # module.function
    least: float  # with less time left it is not started
    most: float  # its time limit
    variables: Mapping[str, str] = field(default_factory=dict)  # environment


# With `WHOLE_SUMS`, which a server sets itself, the vendor BLAS cannot split sums; it reads these
# variables at its first call.
STAGES: dict[str, Stage] = {
    "precompile": Stage(function="first.precompile", least=20, most=150, variables=WHOLE_SUMS),
    "ceilings": Stage(function="ceilings.measure", least=10, most=40),
    "sanitize": Stage(function="first.sanitize", least=20, most=90),
    "tests": Stage(function="first.test_kernels", least=20, most=120),
    "exact": Stage(function="exactness.measure", least=30, most=210, variables=WHOLE_SUMS),
    "kernels": Stage(function="kernels.measure", least=15, most=90),
    "steps": Stage(function="steps.measure", least=20, most=90, variables=WHOLE_SUMS),
    "w1": Stage(function="w1.measure", least=20, most=90, variables=WHOLE_SUMS),
    "long": Stage(function="w1.measure_long", least=20, most=60, variables=WHOLE_SUMS),
    "engine": Stage(function="w1.measure_engine", least=20, most=90, variables=WHOLE_SUMS),
    "http": Stage(function="w1.measure_http", least=45, most=120),
    "transformers": Stage(function="transformers.measure", least=45, most=120),
    "products": Stage(function="products.measure", least=15, most=60, variables=WHOLE_SUMS),
    "cost": Stage(function="exactness.measure_cost", least=30, most=90),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Result of a stage. `state`: done, or failed, cut off or left out with the reason."""

    state: str
    seconds: float = 0.0
    tables: Mapping[str, Any] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(STAGES), help="stages, separated by commas")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="for all of them")
    parser.add_argument("--out", type=Path, default=Path("results/gpu_bench.json"))
    parser.add_argument("--smoke", action="store_true", help="in miniature, also on a CPU")
    parser.add_argument("--stage-seconds", type=float, help=argparse.SUPPRESS)  # in its process
    options = parser.parse_args(arguments)
    if options.stage_seconds is not None:
        return _run_here(
            options.only, seconds=options.stage_seconds, out=options.out, smoke=options.smoke
        )
    names = options.only.split(",")
    if unknown := set(names) - STAGES.keys():
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if not options.smoke and not _has_gpu():
        print("no GPU here; --smoke runs in miniature", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    found = {}
    for index, name in enumerate(names):
        left = deadline - time.monotonic() - 2 * _GRACE
        least = STAGES[name].least
        spare = left - sum(STAGES[later].least for later in names[index:])
        if left < least:
            found[name] = Found(state=f"left out: {max(left, 0):.0f} s are left")
        else:
            log = options.out.with_name(f"{options.out.stem}-{name}.log")
            found[name] = _run(
                name,
                seconds=min(least + max(spare, 0), STAGES[name].most),
                smoke=options.smoke,
                log=log,
            )
        _keep(options.out, name, found[name])
        print(f"({name}: {found[name].state}, {found[name].seconds:.0f} s)", flush=True)
    print("\nstages")
    for name, stage in found.items():
        print(f"{name:>14}  {stage.seconds:6.0f} s  {stage.state}")
    return int(any(stage.state != "done" for stage in found.values()))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _run(name: str, *, seconds: float, smoke: bool, log: Path) -> Found:
    """Runs a stage in its own process, which is ended if it takes too long."""
    began = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "tables.json"
        command = [sys.executable, "-m", "loadtest.bench.gpu", "--only", name, "--out", str(out)]
        command += ["--stage-seconds", str(seconds), *(["--smoke"] if smoke else [])]
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command,
                stderr=errors,
                env=os.environ | STAGES[name].variables,
                start_new_session=True,  # its children are ended with it
            )
        try:
            status = process.wait(seconds + _GRACE)
        except subprocess.TimeoutExpired:
            status = _CUT_OFF
        finally:
            _end(process)
        tables = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
        state = "done"
        if status == _CUT_OFF:
            state = f"cut off after {seconds:.0f} s"
        elif status:
            output = log.read_text(encoding="utf-8", errors="replace").strip()
            print(output[-4000:], file=sys.stderr, flush=True)
            state = f"failed: {output.splitlines()[-1] if output else f'exit status {status}'}"
    return Found(state=state, seconds=time.monotonic() - began, tables=tables)


def _run_here(name: str, *, seconds: float, out: Path, smoke: bool) -> int:
    """Runs a stage in this process. Its rows are in the file however it ends."""
    deadline = time.monotonic() + seconds
    signal.signal(signal.SIGTERM, _exit)  # cleans up what the stage started

    import torch

    from loadtest.bench.gpu.bench import Bench, OutOfTime

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Imported by name: what another stage needs may be missing here.
    module, function = STAGES[name].function.split(".")
    measure = getattr(import_module(f"loadtest.bench.gpu.{module}"), function)
    gc.freeze()
    try:
        measure(Bench(smoke=smoke, device=device, out=out, deadline=deadline))
    except OutOfTime:
        return _CUT_OFF
    return 0


def _exit(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a handler's signature
    sys.exit(_CUT_OFF)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and after a while SIGKILL to its whole session."""
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _keep(out: Path, name: str, found: Found) -> None:
    """Replaces the stage's last run in the file."""
    stages = json.loads(out.read_text(encoding="utf-8")).get("stages", {}) if out.is_file() else {}
    stages[name] = asdict(found) | {"ended": time.strftime("%Y-%m-%d %H:%M:%S")}
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = {"machine": asdict(this_machine()), "stages": stages}
    out.write_text(json.dumps(kept, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
