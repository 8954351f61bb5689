"""The start of a server: what it loads, and what it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT, free_port, wait_until_ready
from tests.support.tiny_model import TinyModel
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.slow


def test_a_server_with_the_native_runner_does_not_load_torch(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Seconds of every start and hundreds of megabytes. Seen in what the process has mapped."""
    path, log, port = tiny_model.write_gguf(tmp_path / "m.gguf"), tmp_path / "log", free_port()
    command = [sys.executable, "-m", "service", "serve", "--model", str(path), "--device", "cpu"]
    command += ["--port", str(port), "--admin-port", str(free_port())]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process, log=log)
        body = {"model": "m", "prompt": "a", "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
        assert "libquire" in mapped
        assert "libtorch" not in mapped
    finally:
        process.kill()
        process.wait()
