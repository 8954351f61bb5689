"""`quire serve` at one token a second: an answer that outlasts whatever happens to its reader."""

from __future__ import annotations

import sys
import time

from model.batch import Batch, StepOutput
from model.runners.torch import TorchRunner
from service.__main__ import main

STEP = 1.0  # seconds


class SlowRunner(TorchRunner):
    """Computes as its parent does, and takes its time."""

    def run(self, batch: Batch) -> StepOutput:
        """One step."""
        time.sleep(STEP)
        return super().run(batch)


if __name__ == "__main__":
    import model.runners.torch

    model.runners.torch.TorchRunner = SlowRunner  # type: ignore[misc]  # found by name, when loaded
    sys.argv[1:] = ["serve", "--runner", "torch", "--dtype", "float32", *sys.argv[1:]]
    main()
