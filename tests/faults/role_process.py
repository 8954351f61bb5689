"""A fork server of real replicas: `quire api` and `quire engine`, forked after the slow imports.

Run as a program it works as `oracle_engine` does. The `arguments` of a line are the name of a
`role` and its `settings`. A test that replaces replicas hundreds of times starts them in
milliseconds.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from service.roles import run_role, serve_api, serve_engine
from service.settings import Settings
from tests.faults.oracle_engine import redirect_output, serve_forks

ROLES = {"api": serve_api, "engine": serve_engine}
SLOW_IMPORTS = ("model.checkpoint", "model.native", "model.parallel.runner", "model.runners.native")


def be_replica(arguments: dict[str, Any]) -> None:
    """Runs one replica until it ends."""
    ports = {"admin_port": 0, "port": 0}
    settings = Settings(log_format="json", **ports | arguments["settings"])
    run_role(ROLES[arguments["role"]], settings, console=Console(stderr=True))


if __name__ == "__main__":
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    mine = serve_forks(sys.stdin)
    if mine is not None:
        redirect_output(Path(mine["log"]))
        be_replica(mine["arguments"])
