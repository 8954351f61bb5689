"""`quire serve` as a process: real model, real sockets, the real OpenAI client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.conftest import ROOT, free_port, wait_until_ready
from tests.support.metrics import exposition, metric
from tests.support.tiny_model import TinyModel
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"


def quire(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def admin_url(server_url: str) -> str:
    """The admin port's address, as the server's own command line has it."""
    port = server_url.rsplit(":", 1)[1]
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = status.read_bytes().decode().split("\0")
            if "--admin-port" in words and port in words:
                return f"http://127.0.0.1:{words[words.index('--admin-port') + 1]}"
    raise AssertionError("no such process")


def ended_by_length(admin: str) -> float:
    """How many requests have reached their token limit."""
    series = r'quire_requests_finished_total\{[^}]*reason="length"[^}]*\} (\S+)'
    return sum(map(float, re.findall(series, exposition(admin))))


def used_blocks(admin: str) -> float:
    found = re.findall(r'^quire_kv_blocks{.*state="used"} (\S+)$', exposition(admin), re.MULTILINE)
    assert found
    return sum(map(float, found))


@pytest.fixture
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none") as client:
        yield client


def test_the_openai_client_streams_what_it_collects(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Name three colours."}]
    whole = client.chat.completions.create(
        model=MODEL,
        messages=messages,  # type: ignore[arg-type]  # plain dictionaries, as people write them
        temperature=0.8,
        seed=5,
        max_tokens=40,
    )
    pieces = client.chat.completions.create(
        model=MODEL,
        messages=messages,  # type: ignore[arg-type]
        temperature=0.8,
        seed=5,
        max_tokens=40,
        stream=True,
    )
    text = ""
    for chunk in pieces:
        assert isinstance(chunk, ChatCompletionChunk)
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 40


def test_the_model_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=2
    )
    assert "Paris" in answer.choices[0].text


async def test_32_clients_are_batched_and_get_what_they_would_get_alone(server_url: str) -> None:
    async with httpx.AsyncClient(base_url=server_url, timeout=120) as client:

        async def ask(index: int) -> str:
            body = {"model": MODEL, "prompt": f"{index} plus one is", "max_tokens": 24}
            answer = await client.post("/v1/completions", json=body | {"seed": index})
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["text"])

        steps = metric(admin_url(server_url), "quire_steps_total")
        together = await asyncio.gather(*(ask(index) for index in range(32)))
        taken = metric(admin_url(server_url), "quire_steps_total") - steps
        assert taken < 32 * 24 / 4  # one after another they would take 32 * 24
        card = (await client.get("/v1/models")).json()["data"][0]
        if "native" in card["numeric_class"]:  # exact: the same answer to the bit
            alone = [await ask(index) for index in (0, 7, 31)]
            assert alone == [together[index] for index in (0, 7, 31)]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_its_blocks(server_url: str, stream: bool) -> None:
    admin = admin_url(server_url)
    body = {"model": MODEL, "prompt": "Count: 1 2 3", "max_tokens": 4000, "ignore_eos": True}
    body |= {"stream": stream, "temperature": 2}  # no text that a draft could guess: it lasts
    before = ended_by_length(admin)
    async with httpx.AsyncClient(base_url=server_url, timeout=PATIENCE) as client:
        call = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: metric(admin, "quire_sequences_running") == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    await until(lambda: used_blocks(admin) == 0)
    assert metric(admin, "quire_sequences_running") == 0
    assert ended_by_length(admin) == before


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_closes_its_sending_side_gets_its_answer(
    server_url: str, stream: bool
) -> None:
    """As `nc -N` does: the request and the end of the client's side arrive together."""
    body = {"model": MODEL, "prompt": "Count: 1 2 3", "max_tokens": 30, "ignore_eos": True}
    content = json.dumps(body | {"stream": stream}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    port = int(server_url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        connection.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert b"HTTP/1.1 200 OK" in received
    assert (b"data: [DONE]" in received) is stream
    assert b'"finish_reason":"length"' in received


def test_health_and_metrics_are_where_they_belong(server_url: str) -> None:
    for probe in ("startup", "live", "ready"):
        for url in (server_url, admin_url(server_url)):
            assert httpx.get(f"{url}/health/{probe}", timeout=PATIENCE).status_code == 200
    assert httpx.get(f"{server_url}/metrics", timeout=PATIENCE).status_code == 404


def test_without_keys_the_document_and_its_page_are_served(server_url: str) -> None:
    document = httpx.get(f"{server_url}/openapi.json", timeout=60)
    assert document.json()["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]
    page = httpx.get(f"{server_url}/docs", timeout=PATIENCE)
    assert page.status_code == 200
    assert 'href="/openapi.json"' in page.text
    assert page.text.count("//") == 0, "nothing of other servers"
    head = httpx.head(f"{server_url}/openapi.json", timeout=PATIENCE)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-such-flag"], "No such option"),
        (["--port", "99999"], "port"),
        (["--model", "/nowhere/at-all.gguf"], "model"),
        (["--queue", "mysql://x"], "unknown scheme"),
        (["--host", "0.0.0.0"], "keys"),
        (["--config", "/nowhere/quire.toml"], "configuration file"),
    ],
)
def test_a_wrong_configuration_is_one_clear_line(arguments: list[str], message: str) -> None:
    run = quire("serve", *arguments)
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_a_taken_port_is_an_error_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        began = time.monotonic()
        run = quire("serve", "--port", str(taken.getsockname()[1]))
    assert run.returncode == 2
    assert "cannot listen on 127.0.0.1" in run.stderr
    assert time.monotonic() - began < PATIENCE


def test_replicas_need_a_shared_queue() -> None:
    for role in ("api", "engine"):
        run = quire(role)
        assert run.returncode == 2
        assert "--queue redis://" in run.stderr


def test_pull_prints_the_models_path(default_model: Path) -> None:
    run = quire("pull")
    assert run.returncode == 0
    assert Path(run.stdout.strip()) == default_model


def test_version() -> None:
    assert re.fullmatch(r"quire \d+\.\d+\.\d+\n", quire("version").stdout)


def test_sigterm_lets_running_answers_end(tiny_model: TinyModel, tmp_path: Path) -> None:
    """New calls are refused, the open stream ends with [DONE], the process exits with 0."""
    folder = tiny_model.write_folder(tmp_path / "tiny")
    ports, log = [free_port(), free_port()], tmp_path / "log"
    command = [sys.executable, "-m", "service", "serve", "--model", str(folder)]
    command += ["--port", str(ports[0]), "--admin-port", str(ports[1]), "--log-format", "json"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{ports[0]}"
    try:
        wait_until_ready(url, process, log=log)
        body = {"model": "tiny", "prompt": "the quick", "max_tokens": 100, "ignore_eos": True}
        lines = []
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=PATIENCE
        ) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                if len(lines) == 3:
                    process.send_signal(signal.SIGTERM)
        assert "data: [DONE]" in lines
        assert process.wait(timeout=PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()
    entries = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert log.read_text().startswith("{")
    assert [entry["message"] for entry in entries].count("request") == 1
    assert any(entry["message"] == "ready" for entry in entries)
