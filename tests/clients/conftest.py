"""Real clients against one real server: `make test-clients`, in environments of their own.

Nothing here imports the server's code. At the end a table of clients and abilities is printed, and
written to results/clients-NAME.md.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
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
ENCODER = "all-minilm-l6-v2"
PATIENCE = 300.0  # seconds: on a busy machine, all is slow
_TABLE = pytest.StashKey[Table]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quire", default="quire", help="the server's program")
    parser.addoption("--urls", help="of a running server: its API's and its admin port's, as A,B")


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
    name = Path(sys.prefix).name  # of the environment
    (folder / f"clients-{name}.md").write_text(text, encoding="utf-8")
    terminalreporter.section("clients")
    terminalreporter.write_line(text)


@dataclass(frozen=True, kw_only=True)
class Server:
    """Its addresses and its counters."""

    url: str
    admin_url: str
    model: str = MODEL

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    def cancelled(self) -> float:
        """Number of cancelled requests."""
        with urllib.request.urlopen(f"{self.admin_url}/metrics", timeout=PATIENCE) as reply:
            text = reply.read().decode()
        series = r'^quire_requests_finished_total\{.*reason="cancelled"\} (\S+)'
        return sum(map(float, re.findall(series, text, re.MULTILINE)))


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config, tmp_path_factory: Any) -> Iterator[Server]:
    """`quire serve` with the default model, on free ports, or the one at `--urls`.

    In 8 bits, so that what the small model says is the same on every CPU.
    """
    if urls := pytestconfig.getoption("--urls"):
        url, admin_url = urls.split(",")
        yield Server(url=url, admin_url=admin_url)
        return
    program = Path(str(pytestconfig.getoption("--quire")))
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(program, log, "--dtype", "int8") as started:
        yield started


@pytest.fixture(scope="session")
def encoder(pytestconfig: pytest.Config, tmp_path_factory: Any) -> Iterator[Server]:
    """`quire serve` with a model that embeds."""
    program = Path(str(pytestconfig.getoption("--quire")))
    log = tmp_path_factory.mktemp("encoder") / "log"
    with serving(program, log, "--model", ENCODER, model=ENCODER) as started:
        yield started


@contextlib.contextmanager
def serving(program: Path, log: Path, *flags: str | Path, model: str = MODEL) -> Iterator[Server]:
    """`quire serve` on free ports, with more flags."""
    port, admin_port = free_port(), free_port()
    ports = ("--port", str(port), "--admin-port", str(admin_port))
    command = [program, "serve", *ports, "--files", log.parent / "files", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    started = Server(
        url=f"http://127.0.0.1:{port}", admin_url=f"http://127.0.0.1:{admin_port}", model=model
    )
    try:
        wait_until_ready(started, process, log)
        yield started
    finally:
        process.terminate()
        assert process.wait(timeout=PATIENCE) == 0, log.read_text()


@contextlib.contextmanager
def small_server(kind: str, program: Path, folder: Path) -> Iterator[Server]:
    """`quire serve` with a checkpoint of `small_model.py`, of the default model's tokenizer."""
    pulled = subprocess.run([program, "pull"], check=True, cwd=ROOT, capture_output=True, text=True)
    source, model = pulled.stdout.split()[-1], folder / "model.gguf"
    script = Path(__file__).parent / "small_model.py"
    subprocess.run([program.parent / "python", script, kind, source, model], check=True, cwd=ROOT)
    name = f"small-{kind}"
    flags = ("--model", model, "--model-name", name)
    with serving(program, folder / "log", *flags, model=name) as started:
        yield started


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(f"{server.url}/health/ready", timeout=60).status == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"not ready in time:\n{log.read_text()}")


@pytest.fixture
def expect_cancel(server: Server) -> Callable[[], AbstractContextManager[None]]:
    """`with expect_cancel():` a stream that the client closes in the block is cancelled."""

    @contextlib.contextmanager
    def expecting() -> Iterator[None]:
        before = server.cancelled()
        yield
        ends = time.monotonic() + PATIENCE
        while server.cancelled() == before:
            assert time.monotonic() < ends, "the server continued an abandoned answer"
            time.sleep(0.05)

    return expecting
