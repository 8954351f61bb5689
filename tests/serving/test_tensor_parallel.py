"""`quire serve --tensor-parallel 2` as processes: one's answers, and no rank outlives another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import ROOT, free_port, wait_until_ready
from tests.support.tiny_model import TinyModel
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.faults

PROMPTS = ["the quick brown fox", "def f(x):\n    return", "1 12 123 1234", "don't you think"]


class Server:
    """A `quire serve` of the tiny model in float32, in a process group of its own."""

    def __init__(self, model: Path, log: Path, *flags: str) -> None:
        self.log = log
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "service", "serve", "--model", str(model)]
        command += ["--dtype", "float32", "--port", str(port), "--admin-port", "0", *flags]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
            )
        wait_until_ready(self.url, self.process, log=log)

    def followers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "model.parallel.follower" in child.cmdline()]

    def answer(self, prompt: str) -> Any:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}
        body |= {"logprobs": 3, "ignore_eos": True}
        said = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        assert said.status_code == 200, said.text
        return said.json()["choices"][0]

    def stream(self) -> Iterator[str]:
        """A long answer, line by line."""
        body = {"model": "tiny", "prompt": "the", "max_tokens": 100, "ignore_eos": True}
        with httpx.stream(
            "POST", f"{self.url}/v1/completions", json=body | {"stream": True}, timeout=60
        ) as lines:
            yield from lines.iter_lines()


Serve = Callable[..., Server]


@pytest.fixture
def serve(tiny_model: TinyModel, tmp_path: Path) -> Iterator[Serve]:
    folder = tiny_model.write_folder(tmp_path / "tiny")
    servers: list[Server] = []

    def start(*flags: str) -> Server:
        servers.append(Server(folder, tmp_path / f"log{len(servers)}", *flags))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


def gone(processes: Sequence[psutil.Process], *, within: float) -> bool:
    return not psutil.wait_procs(processes, timeout=within)[1]


def test_two_ranks_answer_as_one_and_end_in_order(serve: Serve) -> None:
    alone, shared = serve("--runner", "torch"), serve("--tensor-parallel", "2")
    followers = shared.followers()
    assert len(followers) == 1
    assert alone.followers() == []
    assert "up to 512 tokens, 64 sequences" in shared.log.read_text()
    for prompt in PROMPTS:
        expected, found = alone.answer(prompt), shared.answer(prompt)
        assert found["text"] == expected["text"]
        assert found["logprobs"]["token_logprobs"] == pytest.approx(
            expected["logprobs"]["token_logprobs"], abs=1e-3
        )
    stream = shared.stream()
    next(stream)
    os.killpg(shared.process.pid, signal.SIGINT)  # as a terminal does: the answer is still finished
    followers[0].send_signal(signal.SIGTERM)
    followers[0].send_signal(signal.SIGINT)
    assert "data: [DONE]" in stream
    assert shared.process.wait(timeout=PATIENCE) == 0, shared.log.read_text()
    assert gone(followers, within=PATIENCE)
    assert "Traceback" not in shared.log.read_text()


@pytest.mark.parametrize("busy", [True, False])
def test_a_lost_follower_ends_the_engine(serve: Serve, busy: bool) -> None:
    server = serve("--tensor-parallel", "2")
    followers = server.followers()
    if busy:
        stream = server.stream()
        for _ in range(3):
            next(stream)
    followers[-1].kill()
    if busy:
        assert "shutting_down" in "".join(stream), "the stream ends with an error"
    assert server.process.wait(timeout=PATIENCE) == 1, server.log.read_text()
    assert gone(followers, within=PATIENCE)
    assert "ended with status -9" in server.log.read_text()


@pytest.mark.parametrize("busy", [True, False])
def test_no_follower_outlives_its_leader(serve: Serve, busy: bool) -> None:
    server = serve("--tensor-parallel", "2")
    followers = server.followers()
    assert followers
    if busy:
        stream = server.stream()
        for _ in range(3):
            next(stream)
    server.process.kill()
    assert gone(followers, within=5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tensor-parallel", "4"], "tensor parallelism over 4 must divide num_kv_heads 2"),
        (["--tensor-parallel", "2", "--runner", "native"], "does not support tensor parallelism"),
        (["--tensor-parallel", "2", "--kv-memory", "1"], "kv_memory must be at least"),
        (["--max-batch-tokens", "5", "--max-sequences", "6"], "at most max_batch_tokens"),
    ],
)
def test_what_cannot_be_shared_is_one_clear_line(
    tiny_model: TinyModel, tmp_path: Path, flags: list[str], said: str
) -> None:
    folder = tiny_model.write_folder(tmp_path / "tiny")
    command = [sys.executable, "-m", "service", "serve", "--model", str(folder), "--port", "0"]
    run = subprocess.run(
        [*command, "--admin-port", "0", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 2, run.stderr
    assert said in run.stderr
    assert "Traceback" not in run.stderr
