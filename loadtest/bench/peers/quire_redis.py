"""Quire as replicas on one machine, until SIGTERM: a Redis, one API replica, one engine.

Redis keeps an append-only file, synced every second, in a temporary folder. If one of the three
processes ends, the others are stopped too.
"""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from loadtest.bench.servers import find_program, free_port, wait_until_healthy

_GRACE = 2.0  # seconds for each process to end
_START = 60.0  # seconds for the engine to start


def main(arguments: Sequence[str]) -> int:
    """Serves one GGUF file on 127.0.0.1. Returns 1 if a process ended unexpectedly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--model-name", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("engine_flags", nargs="*")
    options = parser.parse_args(arguments)
    redis_port = free_port()
    shared = ["--model", options.model, "--model-name", options.model_name]
    shared += ["--queue", f"redis://127.0.0.1:{redis_port}/0"]
    quire = [sys.executable, "-m", "service"]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    parts: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            parts.append(start_redis(redis_port, folder))
            engine_port = free_port()
            engine = [*quire, "engine", *shared, "--admin-port", str(engine_port)]
            parts.append(subprocess.Popen([*engine, *options.engine_flags]))
            url = f"http://127.0.0.1:{engine_port}/health/ready"
            wait_until_healthy(url, parts[-1], timeout=_START, log=Path("above"))
            where = ["--host", "127.0.0.1", "--port", str(options.port)]
            parts.append(subprocess.Popen([*quire, "api", *shared, "--admin-port", "0", *where]))
            while all(part.poll() is None for part in parts):
                time.sleep(0.5)
            return 1
        finally:
            _end(parts[::-1])


def start_redis(port: int, folder: str) -> subprocess.Popen[bytes]:
    """A server that listens, with its append-only file in `folder`."""
    command = [find_program("redis-server") or "redis-server", "--bind", "127.0.0.1"]
    command += ["--port", str(port), "--dir", folder, "--save", ""]
    command += ["--appendonly", "yes", "--appendfsync", "everysec"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _wait_until_open(port)
    return process


def _wait_until_open(port: int) -> None:
    """Raises TimeoutError if nothing listens within ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise TimeoutError("redis-server does not listen")


def _end(parts: Sequence[subprocess.Popen[bytes]]) -> None:
    for part in parts:
        part.terminate()
    for part in parts:
        try:
            part.wait(_GRACE)
        except subprocess.TimeoutExpired:
            part.kill()
            part.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
