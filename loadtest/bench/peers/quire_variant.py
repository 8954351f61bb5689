"""Quire restricted to an instruction set, to stand in for a machine that has no better one.

python -m loadtest.bench.peers.quire_variant avx2 serve --model ...
"""

from __future__ import annotations

import sys

from model.config import ModelConfig
from model.runners import RUNNERS, AnyWeights, Runner, RunnerOptions
from model.runners.native import NativeRunner


def restrict(variant: str) -> None:
    """Of the native runners that this process builds."""

    def load(
        config: ModelConfig, weights: AnyWeights, options: RunnerOptions, digest: str
    ) -> Runner:
        return NativeRunner(config, weights, options=options, digest=digest, variant=variant)

    RUNNERS["native"] = load


def main() -> None:
    """The command line of `quire` after the variant."""
    from service.__main__ import main as quire

    restrict(sys.argv.pop(1))
    quire()


if __name__ == "__main__":
    main()
