"""`python -m tests.web.slow_service FILE ...`: `quire ...` with slow steps while FILE exists."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from model.batch import Batch, StepOutput
from model.runners.native import NativeRunner
from service.__main__ import app

PACE = 0.1
"""Seconds of a slow step."""


def main() -> None:
    slow = Path(sys.argv.pop(1))
    run = NativeRunner.run

    def run_slowly(self: NativeRunner, batch: Batch) -> StepOutput:
        if slow.exists():
            time.sleep(PACE)
        return run(self, batch)

    NativeRunner.run = run_slowly  # type: ignore[method-assign]
    app()


if __name__ == "__main__":
    main()
