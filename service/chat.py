"""`quire chat`: a conversation in the terminal with a server that runs elsewhere.

It speaks the chat endpoint over HTTP and knows nothing of engines or models: any server of the
OpenAI API will do. The conversation lives here and goes out whole with every turn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from service.errors import StartupError

HELP = "/reset forgets the conversation, /exit leaves; Ctrl-C stops an answer."

_TIMEOUT = httpx.Timeout(60.0, connect=5.0)  # streams get a comment every 15 s
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class AnswerFailed(Exception):
    """The server refused or broke off; the message is for the person at the terminal."""


@dataclass(slots=True)
class Answer:
    """One answer as it comes in."""

    started: float
    text: str = ""
    first: float | None = None  # when the first text came
    last: float = 0.0
    tokens: int = 0
    finish_reason: str | None = None

    def add(self, event: dict[str, Any], *, now: float) -> None:
        """Takes one event of the stream. Raises AnswerFailed for an error event."""
        if "error" in event:
            raise AnswerFailed(_message(event["error"]))
        if usage := event.get("usage"):
            self.tokens = usage["completion_tokens"]
        for choice in event.get("choices", ()):
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if delta := choice.get("delta", {}).get("content"):
                self.text += printable(delta)
                self.first = self.first or now
                self.last = now
                self.tokens += 1  # until the server's own count comes, last

    def figures(self) -> str:
        """Tokens, tokens per second after the first, and the wait for the first."""
        if self.first is None:
            return "no text"
        parts = [f"{self.tokens} tokens"]
        if self.tokens > 1 and self.last > self.first:
            parts.append(f"{(self.tokens - 1) / (self.last - self.first):.1f} tokens/s")
        parts.append(f"first after {self.first - self.started:.2f} s")
        if self.finish_reason not in {None, "stop"}:
            parts.append(f"ended by {self.finish_reason}")
        return " · ".join(parts)


@dataclass(slots=True)
class Conversation:
    """What was said, and how the next answer is asked for."""

    model: str
    system: str | None = None
    temperature: float | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def body(self) -> dict[str, object]:
        """The request for an answer to the last turn."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, object] = {
            "model": self.model,
            "messages": [*first, *self.turns],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return body if self.temperature is None else body | {"temperature": self.temperature}


class Tail:
    """Markdown of which only the last lines are drawn, as many as the terminal has."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(Markdown(self.text), options.update(height=None), pad=False)
        for line in lines[-max(console.height - 2, 1) :]:
            yield from line
            yield Segment.line()


def chat(
    base_url: str,
    *,
    model: str | None,
    system: str | None,
    api_key: str | None,
    temperature: float | None,
    console: Console,
) -> None:
    """Talks until /exit or the end of the input. Raises StartupError where no server answers.

    `model` None takes the first that the server lists.
    """
    with suppress(ImportError):  # lines can be edited and called back where there is readline
        import readline  # noqa: F401
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(
        base_url=base_url,
        headers=headers,
        timeout=_TIMEOUT,
        trust_env=urlsplit(base_url).hostname not in _LOOPBACK,  # no proxy to this machine
    ) as client:
        conversation = Conversation(
            _find_model(client, base_url, model), system=system, temperature=temperature
        )
        console.print(f"{conversation.model} at {base_url}. {HELP}", style="dim", markup=False)
        for line in _lines(console):
            if line == "/exit":
                return
            if line == "/reset":
                conversation.turns.clear()
                console.print("The conversation starts anew.", style="dim")
            elif line.startswith("/"):
                console.print(HELP, style="dim")
            else:
                _take_turn(client, conversation, line, console)


def printable(text: str) -> str:
    """Without control characters: an answer must not steer the terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def _lines(console: Console) -> Iterator[str]:
    """What the person types, without blank lines, until the input ends."""
    while True:
        try:
            # Not through the console: what draws a line again as it is edited must know the prompt.
            line = input("> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print(f"\n{HELP}", style="dim", markup=False)
            continue
        if line:
            yield line


def _find_model(client: httpx.Client, base_url: str, model: str | None) -> str:
    """The model to ask for. Raises StartupError unless the server lists one."""
    try:
        reply = client.get("/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise StartupError(
            f"no server answers at {base_url}; start one with: quire serve"
        ) from error
    if reply.status_code != httpx.codes.OK:
        raise StartupError(f"{base_url} refused: {_reason(reply)}")
    try:
        listed = [str(card["id"]) for card in reply.json()["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise StartupError(f"{base_url} is no server of the OpenAI API") from error
    if model is None and not listed:
        raise StartupError(f"{base_url} serves no model")
    if model is not None and model not in listed:
        raise StartupError(f"{base_url} does not serve that model; it has: {', '.join(listed)}")
    return model or listed[0]


def _take_turn(
    client: httpx.Client, conversation: Conversation, line: str, console: Console
) -> None:
    """Asks, shows the answer as it comes, and keeps both; or says what failed and keeps neither.

    An answer that was stopped, or broke off, is kept as far as it was seen.
    """
    conversation.turns.append({"role": "user", "content": line})
    answer, fault = Answer(time.monotonic()), None
    try:
        with (
            # It draws by the clock, so what came last is shown also while nothing follows.
            Live(console=console, transient=True, refresh_per_second=15) as live,
            closing(_events(client, conversation.body())) as events,
        ):
            for event in events:
                answer.add(event, now=time.monotonic())
                live.update(Tail(answer.text))
    except KeyboardInterrupt:
        fault = "stopped"
    except AnswerFailed as failed:
        fault = str(failed)
    except httpx.HTTPError as error:
        fault = f"the connection failed: {error or type(error).__name__}"
    if answer.text:
        console.print(Markdown(answer.text))
        conversation.turns.append({"role": "assistant", "content": answer.text})
    else:
        conversation.turns.pop()
    if fault:
        console.print(fault, style="red", markup=False)
    else:
        console.print(answer.figures(), style="dim", highlight=False)


def _events(client: httpx.Client, body: dict[str, object]) -> Generator[dict[str, Any], None, None]:
    """The events of one streamed answer. Raises AnswerFailed for a refusal and a cut-off stream."""
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code != httpx.codes.OK:
            reply.read()
            raise AnswerFailed(_reason(reply))
        for line in reply.iter_lines():
            if line == "data: [DONE]":
                return
            if line.startswith("data:"):
                try:
                    event: dict[str, Any] = json.loads(line[5:])
                except ValueError as error:
                    raise AnswerFailed("the server sent what is no event") from error
                yield event
    raise AnswerFailed("the server broke off")


def _reason(reply: httpx.Response) -> str:
    """What a refusal says, and when to come again."""
    try:
        message = _message(reply.json()["error"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {reply.status_code}"
    after = reply.headers.get("retry-after")
    return f"{message} (try again in {after} s)" if after else message


def _message(error: object) -> str:
    """The text of an error object; some servers send the text alone."""
    return printable(str(error["message"] if isinstance(error, dict) else error))
