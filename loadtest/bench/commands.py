"""Command lines with one subcommand per module, each of which prints a table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from types import ModuleType


def run_command(
    modules: Mapping[str, ModuleType], arguments: Sequence[str] | None, *, prog: str, about: str
) -> None:
    """Runs the subcommand that the arguments name. A module has `add_arguments` and `run`."""
    parser = argparse.ArgumentParser(prog=prog, description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in modules.items():
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            help=text.partition("\n")[0].rstrip("."),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    modules[options.command].run(options)
