"""Measures the GPU engine against the roof of the chip: `python -m loadtest.bench.gpu`.

    ceilings      bytes/s of a copy, operations/s of a matrix product: what the rest is held against
    exact         bits of an answer by way and by batch size from 1 to 256
    kernels       attention over batch and context, products of few rows, in GB/s and share of copy
    steps         decode steps at several batch sizes: time, share of roof, host time, busy share
    w1            nano-vllm's workload offline: on the runner, and through the service's engine
    http          the same workload through `quire serve` and our client
    transformers  its continuous batching on the same models and workload, in the same run
    products      which of the library's products have one order of sums, and how fast they are
    cost          decode steps by our products beside the library's

`--only` takes a list of these. Each runs in a process of its own and has a share of the time; one
that fails or is cut off is named at the end, and the next is begun. Tables are printed as they
grow. The JSON file holds every stage's last run, so stages may be run one by one. It ends with 0
where every stage asked for was done. `--smoke` is the whole thing in miniature, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loadtest.bench.gpu.stage import CUT_OFF
from loadtest.bench.machine import this_machine
from service.settings import WHOLE_SUMS

_MINUTES = 8.5
_GRACE = 10.0  # seconds that a stage has to start, and, asked to end, to end


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the measurement. Seconds are of an H200 whose kernels are not compiled yet."""

    least: float  # with less left it is not begun
    most: float  # after that it is cut off
    variables: Mapping[str, str] = field(default_factory=dict)  # of its environment


# With `WHOLE_SUMS`, which a server sets itself, the library cannot split sums; it reads them
# when it is first called.
STAGES: dict[str, Stage] = {
    "ceilings": Stage(least=10, most=40),
    "exact": Stage(least=30, most=210, variables=WHOLE_SUMS),
    "kernels": Stage(least=15, most=90),
    "steps": Stage(least=20, most=90, variables=WHOLE_SUMS),
    "w1": Stage(least=20, most=90, variables=WHOLE_SUMS),
    "http": Stage(least=45, most=120),
    "transformers": Stage(least=45, most=120),
    "products": Stage(least=15, most=60, variables=WHOLE_SUMS),
    "cost": Stage(least=30, most=90),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What came of a stage. `state`: done, failed, cut off or left out, and why."""

    state: str
    seconds: float = 0.0
    tables: Mapping[str, Any] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages asked for, one after another."""
    parser = argparse.ArgumentParser(
        prog="gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(STAGES), help="stages, separated by commas")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="for all of them")
    parser.add_argument("--out", type=Path, default=Path("results/gpu_bench.json"))
    parser.add_argument("--smoke", action="store_true", help="in miniature, also on a CPU")
    given = parser.parse_args(arguments)
    names = given.only.split(",")
    if unknown := set(names) - STAGES.keys():
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if not given.smoke and not _has_gpu():
        print("no GPU here; --smoke runs in miniature", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * given.minutes
    found = {}
    for name in names:
        left = deadline - time.monotonic() - 2 * _GRACE
        if left < STAGES[name].least:
            found[name] = Found(state=f"left out: {max(left, 0):.0f} s are left")
        else:
            found[name] = _run(name, seconds=min(left, STAGES[name].most), smoke=given.smoke)
        _keep(given.out, name, found[name])
        print(f"({name}: {found[name].state}, {found[name].seconds:.0f} s)", flush=True)
    print("\npieces")
    for name, stage in found.items():
        print(f"{name:>14}  {stage.seconds:6.0f} s  {stage.state}")
    return int(any(stage.state != "done" for stage in found.values()))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _run(name: str, *, seconds: float, smoke: bool) -> Found:
    """A stage in its own process, ended where it does not end itself."""
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        out, errors = Path(folder) / "tables.json", Path(folder) / "errors.log"
        command = [sys.executable, "-m", "loadtest.bench.gpu.stage", name]
        command += ["--seconds", str(seconds), "--out", str(out), *(["--smoke"] if smoke else [])]
        with errors.open("wb") as log:
            process = subprocess.Popen(
                command,
                stderr=log,
                env=os.environ | STAGES[name].variables,
                start_new_session=True,  # what it starts is ended with it
            )
        try:
            status = process.wait(seconds + _GRACE)
        except subprocess.TimeoutExpired:
            status = CUT_OFF
        finally:
            _end(process)
        tables = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
        state = "done"
        if status == CUT_OFF:
            state = f"cut off: {seconds:.0f} s are used up"
        elif status:
            said = errors.read_text(encoding="utf-8", errors="replace").strip()
            print(said[-4000:], file=sys.stderr, flush=True)
            state = f"failed: {said.splitlines()[-1] if said else f'ended with {status}'}"
    return Found(state=state, seconds=time.monotonic() - began, tables=tables)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and after a while SIGKILL to its whole session."""
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _keep(out: Path, name: str, found: Found) -> None:
    """Puts a stage's run in the place of its last one."""
    stages = json.loads(out.read_text(encoding="utf-8")).get("stages", {}) if out.is_file() else {}
    stages[name] = asdict(found) | {"ended": time.strftime("%Y-%m-%d %H:%M:%S")}
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = {"machine": asdict(this_machine()), "stages": stages}
    out.write_text(json.dumps(kept, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
