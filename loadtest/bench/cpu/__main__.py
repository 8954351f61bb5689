"""Command line of the CPU benchmark."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from loadtest.bench.commands import run_command
from loadtest.bench.cpu import kernels, overhead, perplexity, promises, sampling, serving

COMMANDS = {
    "kernels": kernels,
    "overhead": overhead,
    "sampling": sampling,
    "serving": serving,
    "promises": promises,
    "perplexity": perplexity,
}


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(COMMANDS, arguments, prog="cpu", about="Measures the CPU engine.")


if __name__ == "__main__":
    main(sys.argv[1:])
