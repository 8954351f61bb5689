"""Row 18: a client vanishes without FIN or RST; the server's data is just not acknowledged. The
client runs in a network namespace of its own, whose link the test cuts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.http.ports import UNACKNOWLEDGED_TIMEOUT
from tests.conftest import ROOT, free_port, wait_until_ready
from tests.support.tiny_model import TinyModel

pytestmark = pytest.mark.faults

READER = (
    "import json, sys, urllib.request\n"
    "body = {'model': 'tiny', 'prompt': 'the quick', 'max_tokens': 100, 'ignore_eos': True}\n"
    "ask = urllib.request.Request(sys.argv[1], json.dumps(body | {'stream': True}).encode(),\n"
    "    {'Content-Type': 'application/json'})\n"
    "for line in urllib.request.urlopen(ask):\n"
    "    print(line.decode().strip(), flush=True)\n"
)


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def cable() -> Iterator[tuple[str, str]]:
    """(namespace, address of this end) of a virtual link."""
    if os.geteuid() != 0:
        pytest.skip("a network namespace needs root")
    name = f"quire{os.getpid() % 10000}"
    run("ip", "netns", "add", name)
    try:
        run("ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b")
        run("ip", "link", "set", f"{name}b", "netns", name)
        run("ip", "addr", "add", "10.117.0.1/30", "dev", f"{name}a")
        run("ip", "link", "set", f"{name}a", "up")
        run("ip", "-n", name, "addr", "add", "10.117.0.2/30", "dev", f"{name}b")
        run("ip", "-n", name, "link", "set", f"{name}b", "up")
        yield name, "10.117.0.1"
    finally:
        run("ip", "netns", "delete", name)


def metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        return str(answer.read().decode())


def test_row_18_black_hole(cable: tuple[str, str], tiny_model: TinyModel, tmp_path: Path) -> None:
    """The request is cancelled when its reader has been silent for long enough."""
    namespace, host = cable
    folder, log = tiny_model.write_folder(tmp_path / "tiny"), tmp_path / "log"
    port, admin_port = free_port(), free_port()
    program = ["tests.support.slow_service", "1", __file__, "serve"]  # one token per second
    command = [sys.executable, "-m", *program, "--host", host]
    command += ["--runner", "torch", "--dtype", "float32"]
    command += ["--allow-anonymous", "--port", str(port), "--admin-port", str(admin_port)]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--model", str(folder)], cwd=ROOT, stdout=output, stderr=output
        )
    admin = f"http://{host}:{admin_port}"
    try:
        wait_until_ready(f"http://{host}:{port}", server, log=log)
        reader = ["ip", "netns", "exec", namespace, sys.executable, "-c", READER]
        client = subprocess.Popen(
            [*reader, f"http://{host}:{port}/v1/completions"], stdout=subprocess.PIPE
        )
        assert client.stdout is not None
        while not client.stdout.readline().startswith(b"data:"):
            pass
        run("ip", "-n", namespace, "link", "set", f"{namespace}b", "down")
        cut = time.monotonic()
        assert re.search(r"quire_sequences_running\{.*\} 1\.0", metrics(admin))  # it still runs
        while not re.search(r"quire_sequences_running\{.*\} 0\.0", metrics(admin)):
            assert time.monotonic() - cut < UNACKNOWLEDGED_TIMEOUT + 100, "not noticed"
            time.sleep(0.5)
        assert re.search(r'quire_wasted_tokens_total\{cause="cancelled",.*\} [1-9]', metrics(admin))
        assert client.poll() is None  # it did not close the connection
        client.kill()
        client.communicate()
    finally:
        server.terminate()
        server.wait(timeout=60)
