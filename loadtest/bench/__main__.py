"""Benchmarks without a server."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from loadtest.bench.commands import run_command

COMMANDS = {
    "affinity": "loadtest.bench.affinity",
    "embeddings": "loadtest.bench.embeddings",
    "gpu-model": "loadtest.bench.gpu.roof_model",
    "gpu-variants": "loadtest.bench.gpu.variants",
    "queue": "loadtest.bench.queue",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """`gpu` has a command line of its own. A module is imported only if it is run: a machine with a
    GPU may lack the packages of the others.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["gpu"]:
        from loadtest.bench.gpu.__main__ import main as gpu

        sys.exit(gpu(given[1:]))
    names = given[:1] if given[:1] and given[0] in COMMANDS else COMMANDS
    modules = {name: import_module(COMMANDS[name]) for name in names}
    run_command(modules, given, prog="bench", about="Benchmarks without a server.")


if __name__ == "__main__":
    main()
