"""What a server of the tiny model has in its memory once it has answered."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from tests.conftest import free_port, wait_until_ready
from tests.support.tiny_model import TinyModel
from tests.support.waiting import PATIENCE


def mapped_by_server(
    serve: Sequence[str | Path],
    model: TinyModel,
    folder: Path,
    *,
    cwd: Path,
    variables: Mapping[str, str] | None = None,
) -> str:
    """/proc/PID/maps of a server that has answered a completion. `serve`: the command without its
    flags; `folder`: for the model and the log.
    """
    path, log, port = model.write_gguf(folder / "m.gguf"), folder / "log", free_port()
    command = [*serve, "--model", path, "--device", "cpu"]
    command += ["--port", str(port), "--admin-port", str(free_port())]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | (variables or {}), cwd=cwd, stdout=output, stderr=output
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process, log=log)
        body = {"model": "m", "prompt": "a", "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        return Path(f"/proc/{process.pid}/maps").read_text()
    finally:
        process.kill()
        process.wait()
