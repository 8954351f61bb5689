"""Runs one stage of the GPU benchmark: `python -m loadtest.bench.gpu.stage NAME`.

A process of its own, so that its memory is given back, its settings are its own, and a fault on
the device ends nothing else. It ends with 0, with 1 where it failed, with `CUT_OFF` where its time
was used up; its rows are in the file either way.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loadtest.bench.gpu.bench import Bench

CUT_OFF = 3

_FUNCTIONS = {  # by stage: module, function
    "ceilings": ("ceilings", "measure"),
    "exact": ("exactness", "measure"),
    "kernels": ("kernels", "measure"),
    "steps": ("steps", "measure"),
    "w1": ("w1", "measure"),
    "http": ("w1", "measure_http"),
    "transformers": ("transformers", "measure"),
    "products": ("products", "measure"),
    "cost": ("exactness", "measure_cost"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it on the GPU; with `--smoke` in miniature, on a CPU where there is no GPU."""
    parser = argparse.ArgumentParser(prog="stage", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--seconds", type=float, default=600.0, help="time it has")
    parser.add_argument("--out", type=Path, required=True, help="its tables, as JSON")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + given.seconds
    signal.signal(signal.SIGTERM, _end)  # so that what it started is ended too

    import torch

    from loadtest.bench.gpu.bench import Bench, OutOfTime

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    bench = Bench(smoke=given.smoke, device=device, out=given.out, deadline=deadline)
    stage = _load(given.name)
    gc.freeze()
    try:
        stage(bench)
    except OutOfTime:
        return CUT_OFF
    return 0


def _load(name: str) -> Callable[[Bench], None]:
    """The function of a stage. What another one needs may be missing here."""
    module, function = _FUNCTIONS[name]
    found: Callable[[Bench], None] = getattr(
        import_module(f"loadtest.bench.gpu.{module}"), function
    )
    return found


def _end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a handler's signature
    sys.exit(CUT_OFF)


if __name__ == "__main__":
    sys.exit(main())
