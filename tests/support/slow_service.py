"""`python -m tests.support.slow_service SECONDS FILE ...`: `quire ...` whose steps take that long
while FILE exists. What a test does during an answer then happens during it, on any machine.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import model.runners
from model.batch import Batch, StepOutput
from model.runners import Loader, Runner
from service.__main__ import main


def slowed(load: Loader, *, seconds: float, while_exists: Path) -> Loader:
    """A loader of the same runner, which then sleeps before each of its steps."""

    def load_slow(*arguments: Any, **options: Any) -> Runner:
        runner = load(*arguments, **options)
        run = runner.run

        def run_slowly(batch: Batch) -> StepOutput:
            if while_exists.exists():
                time.sleep(seconds)
            return run(batch)

        runner.run = run_slowly  # type: ignore[method-assign]
        return runner

    return load_slow


if __name__ == "__main__":
    pace, file = float(sys.argv.pop(1)), Path(sys.argv.pop(1))
    for name, loader in model.runners.RUNNERS.items():
        model.runners.RUNNERS[name] = slowed(loader, seconds=pace, while_exists=file)
    main()
