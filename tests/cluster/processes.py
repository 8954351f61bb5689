"""Replicas as operating system processes: start, signals, observation.

API replicas and engines with a real model are the commands that an operator would run. Engines over
the oracle are forked from one program (`ForkServer`), because a test kills a hundred of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ORACLE = "tests.faults.oracle_engine"
ROOT = Path(__file__).parent.parent.parent
START_LIMIT = 240.0  # seconds; the machine may be busy
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def wait_until(condition: Callable[[], object], what: str, *, seconds: float = 60.0) -> None:
    """Polls the condition. Raises AssertionError with `what` after `seconds`."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def state_of(pid: int) -> str:
    """The state letter of /proc: T stopped, R and S alive; empty if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    letter = text.rpartition(")")[2].split()[0]
    return "" if letter in {"Z", "X"} else letter


class Replica:
    """One process. `log` holds its output, one JSON object per line."""

    def __init__(self, pid: int, log: Path, *, exit_code: Callable[[], int | None]) -> None:
        self.pid = pid
        self.log = log
        self._exit_code = exit_code
        self._ready: dict[str, Any] | None = None

    def ready(self) -> dict[str, Any] | None:
        """The log record of its readiness; None until then."""
        if self._ready is None:
            for line in self.log.read_text().splitlines() if self.log.exists() else ():
                with contextlib.suppress(json.JSONDecodeError):
                    said = json.loads(line)
                    if said.get("message") == "ready":
                        self._ready = said
        return self._ready

    def wait_until_ready(self) -> None:
        def ready_or_dead() -> bool:
            return self.ready() is not None or not self.state

        wait_until(ready_or_dead, f"{self.log.name} is ready", seconds=START_LIMIT)
        assert self.state, f"it ended during its start:\n{self.log.read_text()}"
        wait_until(self._listens, f"{self.log.name} listens")

    def _listens(self) -> bool:
        places = [self.address(of) for of in ("API", "metrics") if of in (self.ready() or {})]
        try:
            for place in places:
                socket.create_connection(place, timeout=60).close()
        except OSError:
            return False
        return True

    @property
    def state(self) -> str:
        state = state_of(self.pid)
        if not state:
            self._exit_code()  # reaps it if it is a child of this process
        return state

    @property
    def is_up(self) -> bool:
        """Runs and is not stopped."""
        return self.state not in {"", "T"}

    def address(self, of: str) -> tuple[str, int]:
        """Host and port of `API` or `metrics`."""
        said = self.ready()
        assert said is not None
        parts = urlsplit(said[of])
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: not self.state, f"process {self.pid} is gone")

    def close(self) -> None:
        """Kills it if it still runs."""
        if self.state:
            self.kill()
        self.exit_code()

    def pause(self) -> None:
        """SIGSTOP; returns when the process is stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(lambda: self.state == "T", f"process {self.pid} is stopped")

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        wait_until(lambda: self.state != "T", f"process {self.pid} continues")

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def exit_code(self, *, seconds: float = 20.0) -> int:
        """Waits for the process to end."""
        wait_until(lambda: self._exit_code() is not None, f"{self.log.name} ends", seconds=seconds)
        code = self._exit_code()
        assert code is not None
        return code

    def is_live(self) -> bool:
        """Whether its liveness probe succeeds."""
        host, port = self.address("metrics")
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/health/live", timeout=60) as reply:
                return bool(reply.status == 200)
        except urllib.error.HTTPError as refusal:
            refusal.close()
            return False

    def metrics(self) -> dict[str, float]:
        """Every sample by name and labels, in the exposition format."""
        host, port = self.address("metrics")
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def metric(self, name: str) -> float:
        """The sum of a series over its labels, or over all but the one in `series{label="..."}`; 0
        if there is none.
        """
        series, _, label = name.partition("{")
        return total(self.metrics(), series, label.removesuffix("}"))


def total(samples: Mapping[str, float], name: str, label: str = "") -> float:
    """The sum of the samples of a series that have this label, such as `state="used"`."""
    return sum(
        value
        for sample, value in samples.items()
        if sample.partition("{")[0] == name and label in sample
    )


def run_command(command: str, log: Path, *arguments: str) -> Replica:
    """`quire <command> <arguments>` with its output in `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", command, "--log-format", "json", *arguments],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
        )
    return Replica(process.pid, log, exit_code=process.poll)


class ForkServer:
    """A program that forks replicas, by default `ORACLE`, which also computes expected outputs."""

    def __init__(self, folder: Path, *, program: str = ORACLE) -> None:
        self._errors = (folder / "fork_server.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", program],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._one_at_a_time = threading.Lock()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._one_at_a_time:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def expected(self, body: dict[str, Any]) -> list[int]:
        """The oracle's tokens for the body of a completion."""
        tokens: list[int] = self._ask({"expected": body})
        return tokens

    def engine(self, log: Path, arguments: dict[str, Any]) -> Replica:
        """Starts a replica, by default an engine, without waiting for readiness."""
        pid: int = self._ask({"log": str(log), "arguments": arguments})
        ending = log.with_suffix(".exit")

        def exit_code() -> int | None:
            text = ending.read_text() if ending.exists() else ""
            return int(text) if text else None

        return Replica(pid, log, exit_code=exit_code)

    def close(self) -> None:
        """Ends it and all its engines."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(timeout=60)
        self._errors.close()


def wait_all_ready(replicas: Sequence[Replica]) -> None:
    for replica in replicas:
        replica.wait_until_ready()
