"""The page with replicas: during an answer the engine is killed, then the API's process, and the
page continues. The text is that of an undisturbed answer.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import expect

from tests.cluster.redis_process import RedisServer
from tests.conftest import ROOT, free_port, wait_until_ready
from tests.support.waiting import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

QUESTION = "Write a very long story about a clockmaker."


class Replicas:
    """Two engines and an API replica over one Redis."""

    def __init__(self, folder: Path, model: Path, redis: RedisServer) -> None:
        self._folder = folder
        self.slow = folder / "slow"  # the engines' steps are slow while it exists
        self._common = ["--model", str(model), "--queue", redis.url, "--lease", "1"]
        self.api_port = free_port()
        self.url = f"http://127.0.0.1:{self.api_port}"
        self.engines: dict[int, subprocess.Popen[bytes]] = {}  # by admin port

    def start(self) -> None:
        for _ in range(2):
            port = free_port()
            self.engines[port] = self._run("engine", port, "--threads", "1")
        for port, process in self.engines.items():
            wait_until_ready(f"http://127.0.0.1:{port}", process, log=self._log(port))
        self.start_api()

    def start_api(self) -> None:
        admin = free_port()
        self.api = self._run("api", admin, "--port", str(self.api_port))
        wait_until_ready(self.url, self.api, log=self._log(admin))

    def kill_api(self) -> None:
        self.api.kill()
        self.api.wait()

    def kill_the_engine_at_work(self) -> None:
        for port, process in self.engines.items():
            metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE).text
            if re.search(r"quire_sequences_running\{.*\} 1\.0", metrics):
                process.kill()
                process.wait()
                del self.engines[port]
                return
        raise AssertionError("no engine is at work")

    def close(self) -> None:
        for process in (self.api, *self.engines.values()):
            process.kill()
            process.wait()

    def _run(self, role: str, admin: int, *options: str) -> subprocess.Popen[bytes]:
        program = ["tests.support.slow_service", "0.1", str(self.slow)]
        command = [sys.executable, "-m", *program, role, "--admin-port", str(admin)]
        with self._log(admin).open("wb") as log:
            return subprocess.Popen(
                [*command, *self._common, *options], cwd=ROOT, stdout=log, stderr=log
            )

    def _log(self, admin: int) -> Path:
        return self._folder / f"{admin}.log"


@pytest.fixture
def replicas(default_model: Path, tmp_path: Path) -> Iterator[Replicas]:
    redis = RedisServer(tmp_path / "redis")
    redis.start()
    replicas = Replicas(tmp_path, default_model, redis)
    try:
        replicas.start()
        yield replicas
    finally:
        replicas.close()
        redis.close()


@pytest.mark.timeout(1000)  # four processes load the model
async def test_an_answer_outlives_its_engine_and_its_api(
    visit: Any, replicas: Replicas, undisturbed: Any
) -> None:
    tab = await visit(replicas.url)
    tab.network_may_fail = True
    await expect(tab.page.locator("#engines")).to_have_text("2")
    await tab.set(seed=19, max_tokens=600)
    replicas.slow.touch()
    await tab.ask(QUESTION)
    await tab.shown(60)
    replicas.kill_the_engine_at_work()
    await tab.shown(len(await tab.page.inner_text(".answer")) + 60)
    replicas.kill_api()
    await expect(tab.page.locator("#link")).to_contain_text("Reconnecting")
    await expect(tab.page.locator("#engine-state")).to_have_text("unreachable")
    replicas.start_api()
    await tab.page.wait_for_function("() => document.body.dataset.link !== 'reconnecting'")
    replicas.slow.unlink()
    await tab.ended()
    record = await tab.record()
    expected = await undisturbed(replicas.url, QUESTION, seed=19, max_tokens=600)
    assert record["resumed"] == 1, "the engine's death needed no new connection"
    assert record["text"] == expected["message"]["content"]
    await tab.context.close()
