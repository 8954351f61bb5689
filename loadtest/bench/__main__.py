"""Benchmarks without a server: one subcommand per module, each of which prints a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from loadtest.bench import affinity, queue

COMMANDS = {"affinity": affinity, "queue": queue}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        about = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            help=about.partition("\n")[0].rstrip("."),
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    COMMANDS[options.command].run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
