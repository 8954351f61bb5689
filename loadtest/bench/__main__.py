"""Benchmarks without a server."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from loadtest.bench import affinity, embeddings, queue
from loadtest.bench.commands import run_command

COMMANDS = {"affinity": affinity, "embeddings": embeddings, "queue": queue}


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(COMMANDS, arguments, prog="bench", about="Benchmarks without a server.")


if __name__ == "__main__":
    main(sys.argv[1:])
