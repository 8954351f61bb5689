"""`quire chat`: a conversation in the terminal with any server of the OpenAI API.

It streams `POST /v1/chat/completions` and sends the whole conversation with each turn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from service.errors import StartupError

HELP = "/reset starts a new conversation, /exit leaves; Ctrl-C stops an answer."

_TIMEOUT = httpx.Timeout(60.0, connect=5.0)  # streams send a comment every 15 s
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

Messages = list[dict[str, str]]


class ChatError(Exception):
    """The server refused a request or failed while answering; the message is for the user."""


@dataclass(slots=True)
class Reply:
    """A completion that is being streamed. Times are those of `time.monotonic`."""

    started: float
    text: str = ""
    first_token_at: float | None = None
    last_token_at: float = 0.0
    completion_tokens: int = 0
    finish_reason: str | None = None

    def add(self, chunk: dict[str, Any], *, now: float) -> None:
        """Adds one chunk of the stream. Raises ChatError if it is an error."""
        if "error" in chunk:
            raise ChatError(_error_message(chunk["error"]))
        if usage := chunk.get("usage"):
            self.completion_tokens = usage["completion_tokens"]
        for choice in chunk.get("choices", ()):
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if content := choice.get("delta", {}).get("content"):
                self.text += printable(content)
                self.first_token_at = self.first_token_at or now
                self.last_token_at = now
                self.completion_tokens += 1  # an estimate; the last chunk has the usage

    def summary(self) -> str:
        """Number of tokens, decoding speed without the first token, time to first token."""
        if self.first_token_at is None:
            return "no text"
        parts = [f"{self.completion_tokens} tokens"]
        seconds = self.last_token_at - self.first_token_at
        if self.completion_tokens > 1 and seconds > 0:
            parts.append(f"{(self.completion_tokens - 1) / seconds:.1f} tokens/s")
        parts.append(f"first token after {self.first_token_at - self.started:.2f} s")
        if self.finish_reason not in {None, "stop"}:
            parts.append(f"finish reason: {self.finish_reason}")
        return " · ".join(parts)


class Tail:
    """Renders the last lines of a Markdown text, as many as fit into the terminal."""

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
    """Chats until /exit or the end of the input. `model` None takes the first of the server.

    Raises StartupError if the server does not answer or does not have the model.
    """
    with suppress(ImportError):  # importing it enables line editing and history in `input`
        import readline  # noqa: F401
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(
        base_url=base_url,
        headers=headers,
        timeout=_TIMEOUT,
        trust_env=urlsplit(base_url).hostname not in _LOOPBACK,  # no proxy to this machine
    ) as client:
        model = _choose_model(client, base_url, model)
        options = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
        if temperature is not None:
            options["temperature"] = temperature
        first: Messages = [{"role": "system", "content": system}] if system else []
        messages = [*first]
        console.print(f"{model} at {base_url}. {HELP}", style="dim", markup=False)
        for line in _read_lines(console):
            if line == "/exit":
                return
            if line == "/reset":
                messages = [*first]
                console.print("New conversation.", style="dim")
            elif line.startswith("/"):
                console.print(HELP, style="dim")
            else:
                messages.append({"role": "user", "content": line})
                _complete(client, options, messages, console)


def printable(text: str) -> str:
    """Removes control characters, with which an answer could control the terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def _read_lines(console: Console) -> Iterator[str]:
    """Yields the lines of input that are not blank."""
    while True:
        try:
            # Not by the console: readline has to know the prompt to redraw an edited line.
            line = input("> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print(f"\n{HELP}", style="dim", markup=False)
            continue
        if line:
            yield line


def _choose_model(client: httpx.Client, base_url: str, model: str | None) -> str:
    """Returns the model if the server lists it; if None, the first. Raises StartupError."""
    try:
        response = client.get("/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise StartupError(f"no server at {base_url}; start one with: quire serve") from error
    if response.status_code != httpx.codes.OK:
        raise StartupError(f"{base_url} refused the request: {_reason(response)}")
    try:
        models = [str(card["id"]) for card in response.json()["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise StartupError(f"{base_url} is not a server of the OpenAI API") from error
    if model is None and not models:
        raise StartupError(f"{base_url} serves no model")
    if model is not None and model not in models:
        raise StartupError(f"{base_url} does not serve that model; it serves: {', '.join(models)}")
    return model or models[0]


def _complete(
    client: httpx.Client, options: dict[str, object], messages: Messages, console: Console
) -> None:
    """Shows the completion while it is streamed, and appends it to the messages, even if it was
    interrupted. If it has no text, removes the user's message.
    """
    completion, error = Reply(time.monotonic()), None
    try:
        with (
            # It redraws by time: the latest text is also shown while no chunk follows.
            Live(console=console, transient=True, refresh_per_second=15) as live,
            closing(_stream_chunks(client, options | {"messages": messages})) as chunks,
        ):
            for chunk in chunks:
                completion.add(chunk, now=time.monotonic())
                live.update(Tail(completion.text))
    except KeyboardInterrupt:
        error = "stopped"
    except ChatError as failure:
        error = str(failure)
    except httpx.HTTPError as failure:
        error = f"connection failed: {failure or type(failure).__name__}"
    if completion.text:
        console.print(Markdown(completion.text))
        messages.append({"role": "assistant", "content": completion.text})
    else:
        messages.pop()
    if error:
        console.print(error, style="red", markup=False)
    else:
        console.print(completion.summary(), style="dim", highlight=False)


def _stream_chunks(
    client: httpx.Client, body: dict[str, object]
) -> Generator[dict[str, Any], None, None]:
    """Yields the chunks of a streamed completion. Raises ChatError if it is refused or cut off."""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            response.read()
            raise ChatError(_reason(response))
        for line in response.iter_lines():
            if line == "data: [DONE]":
                return
            if line.startswith("data:"):
                try:
                    chunk: dict[str, Any] = json.loads(line[5:])
                except ValueError as error:
                    raise ChatError("the server sent an invalid event") from error
                yield chunk
    raise ChatError("the server closed the stream before its end")


def _reason(response: httpx.Response) -> str:
    """Returns the message of an error response, with its Retry-After."""
    try:
        message = _error_message(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {response.status_code}"
    after = response.headers.get("retry-after")
    return f"{message} (retry after {after} s)" if after else message


def _error_message(error: object) -> str:
    """Returns the message of an error object, or the error if it is a string, as some send it."""
    return printable(str(error["message"] if isinstance(error, dict) else error))
