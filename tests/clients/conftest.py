"""Real clients against one real server: `make test-clients`, in an environment of its own.

Nothing here knows the server's code. At the end a table says which client did what, on the
terminal and in results/clients.md.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from table import Table

ROOT = Path(__file__).parent.parent.parent
MODEL = "smollm2-135m-instruct"
_TABLE = pytest.StashKey[Table]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quire", default="quire", help="the server's program")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "true"  # it would ask GitHub for prices
    config.stash[_TABLE] = Table()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    report = yield
    if report.when == "call" or report.failed:
        for mark in item.iter_markers("proves"):
            client, *abilities = mark.args
            item.config.stash[_TABLE].add(client, abilities, report)
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    text = config.stash[_TABLE].render()
    folder = ROOT / "results"
    folder.mkdir(exist_ok=True)
    (folder / "clients.md").write_text(text, encoding="utf-8")
    terminalreporter.section("clients")
    terminalreporter.write_line(text)


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where it listens, and what it counts."""

    url: str
    admin_url: str
    model: str = MODEL

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    def cancelled(self) -> float:
        """Requests that ended because nobody wanted them any more."""
        with urllib.request.urlopen(f"{self.admin_url}/metrics", timeout=60) as reply:
            text = reply.read().decode()
        series = r'^quire_requests_finished_total\{reason="cancelled"\} (\S+)'
        found = re.search(series, text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config, tmp_path_factory: Any) -> Iterator[Server]:
    """`quire serve` with the default model, on free ports."""
    log = tmp_path_factory.mktemp("server") / "log"
    port, admin_port = free_port(), free_port()
    program = str(pytestconfig.getoption("--quire"))
    command = [program, "serve", "--port", str(port), "--admin-port", str(admin_port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    started = Server(url=f"http://127.0.0.1:{port}", admin_url=f"http://127.0.0.1:{admin_port}")
    try:
        wait_until_ready(started, process, log)
        yield started
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0, log.read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + 240
    while time.monotonic() < ends:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(f"{server.url}/health/ready", timeout=60).status == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"not ready in time:\n{log.read_text()}")


@pytest.fixture
def expect_cancel(server: Server) -> Callable[[], AbstractContextManager[None]]:
    """`with expect_cancel():` an answer that is given up in there is given up by the engine too."""

    @contextlib.contextmanager
    def expecting() -> Iterator[None]:
        before = server.cancelled()
        yield
        ends = time.monotonic() + 60
        while server.cancelled() == before:
            assert time.monotonic() < ends, "the server went on with an answer that nobody reads"
            time.sleep(0.05)

    return expecting
