"""Command line of the CPU benchmark: one subcommand per module, each of which prints a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

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
    parser = argparse.ArgumentParser(prog="cpu", description="Measures the CPU engine.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        about = (module.__doc__ or "").strip()
        summary = about.partition("\n")[0].rstrip(".")
        command = commands.add_parser(
            name,
            help=summary,
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    COMMANDS[options.command].run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
