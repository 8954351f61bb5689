"""Renders chat templates; an untrusted one in child processes with CPU, memory and time limits.

    open_template(source) -> ChatTemplate        the digest is in TRUSTED: renders in this process
                          -> IsolatedTemplate    any other template

A child starts with the first rendering that needs it, compiles the template once and is reused. A
rendering that exceeds a limit ends its child; the next one starts another. Renderings run in
parallel up to `RenderLimits.processes`, so that one that runs into a limit does not delay the
others; further ones wait for at most `RenderLimits.wait`.
"""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import model.text.template_process as child_module
from model.text.chat_template import (
    MAX_OUTPUT,
    ChatTemplate,
    ChatTemplateError,
    ChatTemplateLimitError,
)
from model.text.template_process import (
    EXIT_MEMORY,
    Reply,
    decode_text,
    encode_text,
    receive_frame,
    seconds_until,
    send_frame,
)

TRUSTED = frozenset({
    # SmolLM2-135M-Instruct
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
})  # fmt: skip
"""SHA-256 of templates that take time and memory linear in their input."""

_ROOT = Path(child_module.__file__).parents[2]
_MAX_REPLY = 4 * MAX_OUTPUT + 1  # bytes: a character takes at most 4 in UTF-8


class TemplateUnavailableError(RuntimeError):
    """No process is free to render, or none could be started. Worth a retry."""


class Template(Protocol):
    """A chat template that can be rendered, from any thread."""

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of a conversation. Raises ChatTemplateError or TemplateUnavailableError."""


def open_template(source: str) -> Template:
    """The template, isolated unless it is trusted. Starts nothing."""
    return ChatTemplate(source) if is_trusted(source) else IsolatedTemplate(source)


def is_trusted(source: str) -> bool:
    """Whether a template may be rendered in the server's own process."""
    return hashlib.sha256(encode_text(source)).hexdigest() in TRUSTED


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """Limits on rendering one untrusted template. Times are in seconds.

    All processes and an API replica together fit into 1 GiB.
    """

    cpu_seconds: float = 2.0  # per rendering; a long chat takes some 0.01
    memory: int = 256 * 1024**2  # bytes of address space per process; 4 MB of chat take 100 MiB
    wall_seconds: float = 20.0  # per rendering, for a process that gets no CPU
    processes: int = 2  # at most, started on demand
    wait: float = 10.0  # for a free process


class IsolatedTemplate:
    """A template that is rendered in child processes. Safe to share between threads."""

    def __init__(self, source: str, *, limits: RenderLimits | None = None) -> None:
        self._source = source
        self._limits = limits or RenderLimits()
        self._free = threading.BoundedSemaphore(self._limits.processes)
        self._idle: list[_Child] = []  # the last one is the one used last
        self._end_idle = weakref.finalize(self, _end_all, self._idle)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of a conversation; blocks the calling thread, without the interpreter lock.

        Raises ChatTemplateLimitError if a limit is exceeded, ChatTemplateError if the template
        fails, TemplateUnavailableError if no process is available.
        """
        try:
            request = encode_text(json.dumps(variables, ensure_ascii=False))
        except (TypeError, ValueError, RecursionError):
            raise ChatTemplateError("the template's variables cannot be written as JSON") from None
        if not self._free.acquire(timeout=self._limits.wait):
            raise TemplateUnavailableError(
                f"no process was free to render the chat template within {self._limits.wait:g} s"
            )
        try:
            return self._render(request)
        finally:
            self._free.release()

    def close(self) -> None:
        """Ends the idle processes. Rendering again starts new ones."""
        _end_all(self._idle)

    def _render(self, request: bytes) -> str:
        child = self._take_idle()
        reply = None if child is None else self._ask(child, request)
        if reply is None:  # also if the idle one was killed from outside meanwhile
            reply = self._ask(self._start(), request)
        if reply is None:
            raise ChatTemplateLimitError("the chat template crashed the process that renders it")
        return _text(reply)

    def _take_idle(self) -> _Child | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _start(self) -> _Child:
        try:
            return _Child(self._source, self._limits)
        except OSError:
            raise TemplateUnavailableError(
                "the process that renders the chat template cannot be started"
            ) from None

    def _ask(self, child: _Child, request: bytes) -> bytes | None:
        """The child's reply; None if it died for another reason than a limit."""
        try:
            reply = child.ask(request)
        except (OSError, EOFError, ValueError) as error:  # TimeoutError is an OSError
            self._raise_limit(child.end(), timed_out=isinstance(error, TimeoutError))
            return None
        self._idle.append(child)
        return reply

    def _raise_limit(self, status: int, *, timed_out: bool) -> None:
        limits = self._limits
        if status == -signal.SIGPROF:
            limit = f"{limits.cpu_seconds:g} s of CPU time"
        elif status == EXIT_MEMORY:
            limit = f"{limits.memory // 1024**2} MiB of memory"
        elif timed_out:
            limit = f"{limits.wall_seconds:g} s"
        else:
            return
        raise ChatTemplateLimitError(f"the chat template takes more than {limit} on these messages")


def _text(reply: bytes) -> str:
    kind, text = reply[:1], decode_text(reply[1:])
    if kind == Reply.TEXT:
        return text
    raise ChatTemplateLimitError(text) if kind == Reply.LIMIT else ChatTemplateError(text)


class _Child:
    """One process, and the socket to it."""

    def __init__(self, source: str, limits: RenderLimits) -> None:
        self._limits = limits
        self._socket, theirs = socket.socketpair()
        arguments = [str(limits.memory), str(limits.cpu_seconds)]
        try:
            with theirs:
                self.process: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603  # our own
                    [sys.executable, "-m", child_module.__name__, *arguments],
                    cwd=_ROOT,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
        except OSError:
            self._socket.close()
            raise
        self._source: bytes | None = encode_text(source)

    def ask(self, request: bytes) -> bytes:
        """The reply to a request. Raises OSError, EOFError or ValueError if there is none."""
        deadline = time.monotonic() + self._limits.wall_seconds
        if self._source is not None:
            self._send(self._source, deadline)
            self._source = None
        self._send(request, deadline)
        return receive_frame(self._socket, max_bytes=_MAX_REPLY, deadline=deadline)

    def _send(self, payload: bytes, deadline: float) -> None:
        self._socket.settimeout(seconds_until(deadline))
        send_frame(self._socket, payload)

    def end(self) -> int:
        """Ends the process. Its exit status: of its own end if it was over already."""
        self._socket.close()
        self.process.kill()
        return self.process.wait()


def _end_all(children: list[_Child]) -> None:
    while children:
        children.pop().end()
