"""The terminal chat against a small HTTP server in this process."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from service.chat import Reply, Tail, chat, printable
from service.errors import StartupError
from tests.support.waiting import PATIENCE


def event(content: str | None = None, **fields: object) -> bytes:
    choice = {"index": 0, "delta": {}, "finish_reason": fields.pop("finish_reason", None)}
    if content is not None:
        choice["delta"] = {"content": content}
    return b"data: " + orjson.dumps({"choices": [choice], **fields}) + b"\n\n"


def answer(*contents: str, finish_reason: str = "stop") -> list[bytes]:
    usage = b'data: {"choices":[],"usage":{"completion_tokens":7,"prompt_tokens":3}}\n\n'
    end = [event(finish_reason=finish_reason), usage, b"data: [DONE]\n\n"]
    return [b": ping\n", event(""), *(event(content) for content in contents), *end]


@dataclass
class FakeServer:
    """Answers the nth request with the nth script; a script's callables are called on the way."""

    url: str = ""
    scripts: list[Sequence[bytes | Callable[[], object]]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    bodies: list[dict[str, object]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    models: bytes = b'{"data":[{"id":"small"},{"id":"other"}]}'


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(fake.models)

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            fake.bodies.append(orjson.loads(self.rfile.read(int(self.headers["content-length"]))))
            fake.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(fake.statuses.pop(0) if fake.statuses else 200)
            self.send_header("Retry-After", "4")
            self.end_headers()
            for part in fake.scripts.pop(0):
                if isinstance(part, bytes):
                    self.wfile.write(part)
                    self.wfile.flush()
                else:
                    part()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{http.server_address[1]}"
    yield fake
    http.shutdown()
    http.server_close()
    thread.join()


Talk = Callable[..., str]


@pytest.fixture
def talk(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Types the lines, ends the input, and returns all that was shown."""

    def run(
        *lines: str,
        url: str = server.url,
        model: str | None = None,
        system: str | None = None,
        api_key: str | None = None,
        temperature: float | None = None,
        file: io.StringIO | None = None,  # given: a terminal that draws there
    ) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        screen = file or io.StringIO()
        console = Console(file=screen, width=100, force_terminal=file is not None)
        chat(
            url,
            model=model,
            system=system,
            api_key=api_key,
            temperature=temperature,
            console=console,
        )
        return screen.getvalue()

    return run


def test_an_answer_is_shown_and_sent_back_with_the_next_turn(
    server: FakeServer, talk: Talk
) -> None:
    server.scripts = [answer("Hel", "lo **you**", "."), answer("Again.", finish_reason="length")]
    shown = talk("hi", "", "more", system="Be brief.", api_key="k", temperature=0.5)
    assert "Hello you." in shown
    assert "7 tokens" in shown
    assert "tokens/s" in shown
    assert "finish reason: length" in shown
    first, second = server.bodies
    assert first == {
        "model": "small",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
    }
    assert second["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello **you**."},
        {"role": "user", "content": "more"},
    ]
    assert server.headers[0]["authorization"] == "Bearer k"


def test_reset_forgets_and_exit_leaves(server: FakeServer, talk: Talk) -> None:
    server.scripts = [answer("One."), answer("Two.")]
    shown = talk("a", "/reset", "b", "/nonsense", "/exit", "never sent", model="other")
    assert [body["messages"] for body in server.bodies] == [
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": "b"}],
    ]
    assert server.bodies[0]["model"] == "other"
    assert "temperature" not in server.bodies[0]
    assert shown.count("/reset starts") == 2  # the greeting, and the unknown command


class Screen(io.StringIO):
    """A terminal that sets an event when the first words of an answer are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = threading.Event()

    def write(self, text: str) -> int:
        if "Half" in text:
            self.drawn.set()
        return super().write(text)


@pytest.mark.slow  # a signal to the whole process
def test_ctrl_c_ends_the_answer_and_keeps_the_session(server: FakeServer, talk: Talk) -> None:
    screen, over = Screen(), threading.Event()

    def interrupt() -> None:
        assert screen.drawn.wait(PATIENCE)
        os.kill(os.getpid(), signal.SIGINT)
        over.wait(PATIENCE)  # what comes after is too late

    server.scripts = [[event("Half"), interrupt, event(" never")], answer("Whole.")]
    try:
        shown = talk("first", "second", file=screen)
    finally:
        over.set()
    assert "stopped" in shown
    assert "never" not in shown
    assert server.bodies[1]["messages"] == [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "Half"},
        {"role": "user", "content": "second"},
    ]
    assert "Whole." in shown


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [
        (
            [b'{"error":{"message":"the queue is full"}}'],
            503,
            "the queue is full (retry after 4 s)",
        ),
        ([b"<html>"], 502, "HTTP 502"),
        ([b'data: {"error":{"message":"stream_divergence"}}\n\n'], 200, "stream_divergence"),
        ([b'data: {"error":"out of memory"}\n\n'], 200, "out of memory"),
        ([b"data: {nonsense\n\n"], 200, "invalid event"),
        ([event()], 200, "the server closed the stream"),
    ],
)
def test_a_failed_turn_is_shown_and_dropped(
    server: FakeServer, talk: Talk, script: list[bytes], status: int, reason: str
) -> None:
    server.scripts, server.statuses = [script, answer("Better.")], [status]
    shown = talk("a", "b")
    assert reason in shown
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "b"}]
    assert "Better." in shown


def test_an_answer_cut_off_is_kept_as_far_as_it_was_seen(server: FakeServer, talk: Talk) -> None:
    server.scripts = [[event("Part")], answer("Rest.")]
    shown = talk("a", "b")
    assert "the server closed the stream" in shown
    assert server.bodies[1]["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "Part"},
        {"role": "user", "content": "b"},
    ]


def test_no_server_is_one_clear_line(talk: Talk) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(StartupError, match=r"no server at .*quire serve"):
        talk("hi", url=url)
    with pytest.raises(StartupError, match="no server at"):
        talk("hi", url="not a url")


@pytest.mark.parametrize(
    ("models", "model", "reason"),
    [
        (b"<html>", None, "not a server of the OpenAI API"),
        (b'{"data":[]}', None, "serves no model"),
        (b'{"data":[{"id":"small"}]}', "large", "it serves: small"),
    ],
)
def test_a_server_without_the_model_is_an_error_at_once(
    server: FakeServer, talk: Talk, models: bytes, model: str | None, reason: str
) -> None:
    server.models = models
    with pytest.raises(StartupError, match=reason):
        talk("hi", model=model)


def test_an_answer_cannot_steer_the_terminal(server: FakeServer, talk: Talk) -> None:
    server.scripts = [answer("\x1b[2Jcle", "ar\x07\x9b\r\n\tümlaut")]
    shown = talk("hi")
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(shown)
    assert printable("a\x1b]0;b\x00\n\té") == "a]0;b\n\té"


def test_only_the_last_lines_are_drawn_while_an_answer_grows() -> None:
    console = Console(file=io.StringIO(), width=40, height=10)
    with console.capture() as capture:
        console.print(Tail("\n\n".join(f"line{number}" for number in range(50))), end="")
    lines = capture.get().split()
    assert lines[-1] == "line49"
    assert 3 <= len(lines) <= 8


def test_speed_counts_the_tokens_after_the_first() -> None:
    received = Reply(started=10.0)
    for second in range(1, 6):
        received.add(
            {"choices": [{"delta": {"content": "x"}, "finish_reason": None}]}, now=10.0 + second
        )
    received.add({"choices": [], "usage": {"completion_tokens": 9}}, now=15.5)
    assert received.summary() == "9 tokens · 2.0 tokens/s · first token after 1.00 s"


@pytest.mark.slow
def test_importing_the_chat_imports_no_torch() -> None:
    code = "import sys, service.chat; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Terminal:
    """A real `quire chat` in a terminal of its own; `seen` is all that was written there."""

    START = (  # the terminal becomes its own, so that Ctrl-C reaches it
        "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "from service.__main__ import main; main()"
    )

    def __init__(self, *options: str) -> None:
        self._screen, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.START, "chat", *options],
            cwd=Path(__file__).parents[2],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        )
        os.close(theirs)
        self.seen = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while some := os.read(self._screen, 4096):
                self.seen += some.decode(errors="replace")
        except OSError:
            return  # the other end is closed

    def type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def wait_for(self, pattern: str, *, after: int = 0) -> int:
        """Waits until it is written after position `after`; returns the position of its end."""
        ends = time.monotonic() + PATIENCE
        while not (found := re.compile(pattern).search(self.seen, after)):
            assert time.monotonic() < ends, self.seen[after:]
            assert self._process.poll() is None, self.seen
            time.sleep(0.01)
        return found.end()

    def ended(self) -> int:
        """Waits for its end; returns its exit code."""
        return self._process.wait(PATIENCE)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        os.close(self._screen)


@pytest.mark.slow
def test_a_conversation_in_a_real_terminal(server: FakeServer) -> None:
    """Markdown while it streams, tokens/s, lines called back and edited, Ctrl-C, history."""
    go_on, over = threading.Event(), threading.Event()
    first: list[bytes | Callable[[], object]] = [
        event("## Col"),
        event("ours\n\nSome **bo"),
        event("ld** te"),
        lambda: go_on.wait(PATIENCE),
    ]
    server.scripts = [
        [*first, *answer("xt.")],
        [event("Half a"), lambda: over.wait(PATIENCE), event(" never")],
        answer("Whole."),
    ]
    terminal = Terminal("--url", server.url, "--system", "Be brief.")
    try:
        at = terminal.wait_for("> $")
        terminal.type("hello\r")
        drawn = terminal.wait_for(r"Colours(?s:.*)Some \x1b\[1mbold\x1b\[0m te", after=at)
        assert "tokens/s" not in terminal.seen, "drawn before the answer ended"
        go_on.set()
        at = terminal.wait_for(r"\d tokens/s", after=drawn)
        assert "##" not in terminal.seen
        at = terminal.wait_for("> $", after=at)

        terminal.type("\x1b[A")  # up: the last line again
        at = terminal.wait_for("hello$", after=at)
        terminal.type("\x01oh ")  # to its beginning, and a word before it
        terminal.type("\r")
        at = terminal.wait_for("Half a", after=at)
        terminal.type("\x03")
        at = terminal.wait_for("stopped(?s:.*)> $", after=at)
        over.set()

        terminal.type("more\r")
        at = terminal.wait_for("Whole(?s:.*)7 tokens(?s:.*)> $", after=at)
        terminal.type("/exit\r")
        assert terminal.ended() == 0
    finally:
        go_on.set()
        over.set()
        terminal.close()
    assert "never" not in terminal.seen
    assert "\roh" not in terminal.seen, "an edited line keeps its prompt"
    assert server.bodies[-1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "## Colours\n\nSome **bold** text."},
        {"role": "user", "content": "oh hello"},
        {"role": "assistant", "content": "Half a"},
        {"role": "user", "content": "more"},
    ]
