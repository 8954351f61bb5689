"""`quire bench`: the command, its files, its figures; over a real service."""

from __future__ import annotations

import json
import math
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from service.__main__ import app
from service.bench.client import Outcome
from service.bench.dataset import Prompt, read_dataset
from service.bench.run import Objectives, _target, parse_rates
from service.errors import StartupError

# --- files ----------------------------------------------------------------------------------------
LINES = [
    ({"prompt": "a"}, Prompt("a", 50)),
    ({"prompt": "a", "max_tokens": 7}, Prompt("a", 7)),
    ({"prompt": "a", "max_tokens": 700}, Prompt("a", 50)),
    (
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
        Prompt("u", 50),
    ),
    (
        {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "x" * 40}]},
        Prompt("h", 10),
    ),
]


def test_each_form_of_an_entry_is_read(tmp_path: Path) -> None:
    lines, array = tmp_path / "a.jsonl", tmp_path / "b.json"
    lines.write_text("\n\n".join(json.dumps(entry) for entry, _ in LINES))
    array.write_text(json.dumps([entry for entry, _ in LINES], indent=1))
    expected = [prompt for _, prompt in LINES]
    assert read_dataset(lines, max_tokens=50) == expected
    assert read_dataset(array, max_tokens=50) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no entries"),
        ("{", "line 1 is not JSON"),
        ('{"prompt": "a"}\n{"prompt": 1}', "entry 2 needs"),
        ('{"prompt": ""}', "entry 1 needs"),
        ('{"prompt": "a", "max_tokens": 0}', "entry 1 needs"),
        ('{"conversations": [{"from": "gpt", "value": "only an answer"}]}', "entry 1 needs"),
        ('{"messages": 5}', "entry 1 needs"),
        ("5", "entry 1 needs"),
    ],
)
def test_a_wrong_file_names_the_entry(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(StartupError, match=message):
        read_dataset(tmp_path / "x.jsonl", max_tokens=50)
    with pytest.raises(StartupError, match="No such file"):
        read_dataset(tmp_path / "absent", max_tokens=50)


# --- options --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("http://h:81", ("h", 81, False, "/v1/chat/completions")),
        ("http://h/v1/", ("h", 80, False, "/v1/chat/completions")),
        ("https://h/api/v1", ("h", 443, True, "/api/v1/chat/completions")),
    ],
)
def test_a_url_is_with_or_without_its_version(url: str, place: tuple[object, ...]) -> None:
    target = _target(url, "")
    assert (target.host, target.port, target.tls, target.chat_path) == place


@pytest.mark.parametrize("url", ["h:81", "ftp://h", "http://", "http://h:x"])
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(StartupError, match="http://HOST:PORT"):
        _target(url, "")


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "1,,2", "x"])
def test_rates_are_positive_numbers(text: str) -> None:
    with pytest.raises(StartupError, match="positive numbers"):
        parse_rates(text)


# --- figures --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arrivals", "error", "good"),
    [
        ((10.5, 11.0), None, True),
        ((11.0, 12.0), None, True),  # at the limits
        ((11.1, 11.2), None, False),
        ((10.1, 11.2), None, False),
        ((10.5, 11.0), "broken", False),
        ((), "no text", False),
    ],
)
def test_a_good_answer_is_whole_and_in_time(
    arrivals: tuple[float, ...], error: str | None, *, good: bool
) -> None:
    outcome = Outcome(
        sent=10.0, arrivals=arrivals, completion_tokens=2, prompt_tokens=1, error=error
    )
    assert Objectives(first_token=1.0, per_token=1.0).holds(outcome) is good


# --- the command ----------------------------------------------------------------------------------
def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.mark.slow
def test_the_command_measures_a_server(server_url: str, tmp_path: Path) -> None:
    """Objectives that any machine meets, and some that none does."""
    dataset, results = tmp_path / "lines.jsonl", tmp_path / "results.json"
    dataset.write_text('{"prompt": "Count to three."}\n{"prompt": "Name a colour."}\n')
    flags = ["--url", server_url, "--rates", "2,4", "--seconds", "1", "--output-tokens", "4"]
    flags += ["--json", str(results), "--slo-first", "1e6", "--slo-token", "1e6"]
    done = run(*flags, "--dataset", str(dataset))
    assert done.exit_code == 0, done.output
    document = json.loads(results.read_text())
    assert [point["rate"] for point in document["points"]] == [2, 4]
    for point in document["points"]:
        summary = point["summary"]
        assert (summary["requests"], summary["failures"]) == (point["rate"], 0)
        assert point["good"] == point["rate"] == point["goodput"]
        assert 0 < summary["completion_tokens"] <= 4 * summary["requests"]
        assert 0 < summary["time_to_first_p50"] <= point["time_to_first_p99"]
    assert "(100%)" in done.output
    strict = run(*flags[:-4], "--slo-first", "0.001", "--slo-token", "0.001", "--seed", "1")
    assert strict.exit_code == 0
    goods = [point["good"] for point in json.loads(results.read_text())["points"]]
    assert goods == [0, 0], "synthetic prompts of 256 tokens in a millisecond"


@pytest.mark.slow
def test_a_server_that_refuses_ends_the_command(server_url: str) -> None:
    failed = run("--url", server_url, "--model", "nothing")
    assert failed.exit_code != 0
    assert "the first request failed: HTTP 404" in str(failed.exception)


class Refusing(BaseHTTPRequestHandler):
    """Answers its first question, the one that is not counted, and refuses all others."""

    refuses = False

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, kind, body = 429, "application/json", b'{"error": {"message": "no"}}'
        if not type(self).refuses:
            type(self).refuses = True
            choice = {"delta": {"content": "a"}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 1}
            event = json.dumps({"choices": [choice], "usage": usage}).encode()
            status, kind = 200, "text/event-stream"
            body = b"data: " + event + b"\n\ndata: [DONE]\n\n"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Not to standard error."""


@pytest.mark.slow
def test_without_a_complete_answer_the_status_is_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Refusing, "refuses", False)
    results = tmp_path / "results.json"
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        serving = Thread(target=server.serve_forever)
        serving.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            flags = ("--url", url, "--model", "m", "--rates", "20", "--seconds", "0.2")
            done = run(*flags, "--json", str(results))
            without_model = run("--url", url)
        finally:
            server.shutdown()
            serving.join()
    assert (done.exit_code, type(done.exception)) == (1, SystemExit), done.output
    assert "failed: HTTP 429" in done.output
    assert "refuses the key: HTTP 401; see --api-key" in str(without_model.exception)
    (point,) = json.loads(results.read_text())["points"]
    assert point["summary"]["failures"] == point["summary"]["requests"] > 0
    assert (point["good"], point["time_to_first_p99"]) == (0, None)


@pytest.mark.slow
def test_what_is_no_http_server_is_reported() -> None:
    """Its first line has no status; a line without an end is no reason to wait or to crash."""
    for answer in (b"+OK\r\n\r\n", b"SSH-2.0-x y\r\n\r\n", b"a" * 2**17):

        class Other(StreamRequestHandler):
            said = answer

            def handle(self) -> None:
                self.rfile.readline()
                self.wfile.write(self.said)

        with ThreadingTCPServer(("127.0.0.1", 0), Other) as server:
            serving = Thread(target=server.serve_forever)
            serving.start()
            try:
                for flags in ((), ("--model", "m")):
                    failed = run("--url", f"http://127.0.0.1:{server.server_address[1]}", *flags)
                    assert isinstance(failed.exception, StartupError), failed.exception
            finally:
                server.shutdown()
                serving.join()


def test_results_that_cannot_be_written_are_refused_before_the_measuring(tmp_path: Path) -> None:
    failed = run("--url", "http://127.0.0.1:9", "--json", str(tmp_path / "none" / "results.json"))
    assert isinstance(failed.exception, StartupError)
    assert str(failed.exception) == "json: results.json: No such file or directory"


def test_without_a_server_it_says_so() -> None:
    failed = run("--url", "http://127.0.0.1:9")
    assert isinstance(failed.exception, StartupError)
    assert "does not answer" in str(failed.exception)


def test_what_is_not_known_is_null(tmp_path: Path) -> None:
    from service.bench.run import _without_nan

    assert _without_nan({"a": [math.nan, (1.5,)]}) == {"a": [None, [1.5]]}
