"""A real server whose model has a hostile chat template: it serves, stays small and ends clean."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import ROOT, free_port, wait_until_ready
from tests.support.tiny_model import TinyModel

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% set text = messages[0].content %}{% set ns = namespace(s='x') %}"
    "{% if text == 'double' %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    "{% elif text == 'loop' %}{% set s = range(3000) %}{% for a in s %}{% for b in s %}"
    "{% for c in s %}{% for d in s %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}"
    "{% endif %}{{ text }}"
)
MIB = 1024**2


class Server:
    """A `quire serve` in a process group of its own."""

    def __init__(self, model: Path, log: Path) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "service", "serve", "--model", str(model)]
        command += ["--model-name", "tiny", "--port", str(port), "--admin-port", str(free_port())]
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
            )
        wait_until_ready(self.url, self.popen, log=log)
        self.process = psutil.Process(self.popen.pid)

    def renderers(self) -> list[psutil.Process]:
        children = self.process.children(recursive=True)
        return [child for child in children if "model.text.template_process" in child.cmdline()]

    def chat(self, content: str) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return self._post("/v1/chat/completions", messages=messages)

    def complete(self) -> httpx.Response:
        return self._post("/v1/completions", prompt="the")

    def _post(self, path: str, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "max_tokens": 4, **fields}
        return httpx.post(self.url + path, json=body, timeout=120)


@pytest.fixture
def server(tiny_model: TinyModel, tmp_path: Path) -> Iterator[Server]:
    model = tiny_model.write_folder(tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    started = Server(model, tmp_path / "log")
    yield started
    started.popen.kill()
    started.popen.wait()


def test_attacks_leave_the_server_small_and_serving(server: Server) -> None:
    assert server.chat("hello").status_code == 200
    assert len(server.renderers()) == 1
    before = server.process.memory_info().rss
    with ThreadPoolExecutor(2) as pool:
        attacks = [pool.submit(server.chat, kind) for kind in ("double", "loop") * 2]
        assert server.complete().status_code == 200
        errors = [attack.result().json()["error"] for attack in attacks]
    assert {error["code"] for error in errors} == {"chat_template_limit"}
    allowed = ("256 MiB of memory", "2 s of CPU time", "20 s")  # the last on a busy machine
    assert {error["message"] for error in errors} <= {
        f"the chat template takes more than {limit} on these messages" for limit in allowed
    }
    assert server.process.memory_info().rss - before < 64 * MIB
    assert server.chat("hello").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left(server: Server, number: signal.Signals) -> None:
    """Ctrl-C goes to the whole process group, the others to the server alone."""
    assert server.chat("hello").status_code == 200
    (renderer,) = server.renderers()
    if number is signal.SIGINT:
        os.killpg(server.popen.pid, number)
    else:
        server.popen.send_signal(number)
    status = server.popen.wait(timeout=60)
    assert status == (-number if number is signal.SIGKILL else 0)
    _, alive = psutil.wait_procs([renderer], timeout=60)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
