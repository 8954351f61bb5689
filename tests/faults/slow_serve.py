"""`quire serve` at one token per second: a response that lasts longer than any reader."""

from __future__ import annotations

import sys
import time

import model.runners
from model.batch import Batch, StepOutput
from model.config import ModelConfig
from model.runners import Runner, RunnerOptions
from model.runners.torch import TorchRunner
from model.weights import Weights
from service.__main__ import main

STEP = 1.0  # seconds


class SlowRunner(TorchRunner):
    """A TorchRunner that sleeps before each step."""

    def run(self, batch: Batch) -> StepOutput:
        time.sleep(STEP)
        return super().run(batch)


def _slow(config: ModelConfig, weights: Weights, options: RunnerOptions, digest: str) -> Runner:
    return SlowRunner(config, weights, options=options, digest=digest)


if __name__ == "__main__":
    model.runners.RUNNERS["torch"] = _slow
    sys.argv[1:] = ["serve", "--runner", "torch", "--dtype", "float32", *sys.argv[1:]]
    main()
