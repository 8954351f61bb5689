"""The process that renders an untrusted chat template: `python -m model.text.template_process`.

A template can take any amount of time and memory: a string that doubles in a loop reaches gigabytes
in milliseconds. This process therefore limits its own address space, and the CPU time of each
rendering. Exceeding a limit ends the process, and the exit status identifies the limit.

Standard input is a socket to the parent. Each message is a frame: 8 bytes of length (big endian)
and that many bytes. The first frame is the template's source (UTF-8). Every further frame holds the
variables of one rendering as JSON; the reply is one byte of `Reply` and a text (UTF-8). The process
ends when the parent closes the socket, so it does not outlive the parent. Torch-free.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from enum import Enum

from model.text.chat_template import (
    MAX_OUTPUT,
    ChatTemplate,
    ChatTemplateError,
    ChatTemplateLimitError,
)

EXIT_MEMORY = 3  # exit status: the address space was exhausted
# Characters of output: what the template adds, and room for JSON that it indents. The parent
# tokenises the output, so a short request must not become a long prompt.
MIN_OUTPUT, OUTPUT_PER_BYTE = 256 * 1024, 16
_LENGTH = struct.Struct(">Q")
_CHUNK = 1 << 20  # bytes per receive


class Reply(bytes, Enum):
    """The first byte of a reply: what the text after it is."""

    TEXT = b"T"  # the rendered text
    ERROR = b"E"  # the message of a ChatTemplateError
    LIMIT = b"L"  # the message of a ChatTemplateLimitError


def encode_text(text: str) -> bytes:
    """UTF-8 in which lone surrogates survive."""
    return text.encode("utf-8", "surrogatepass")


def decode_text(data: bytes) -> str:
    """The inverse of `encode_text`."""
    return data.decode("utf-8", "surrogatepass")


def send_frame(connection: socket.socket, payload: bytes) -> None:
    """Sends one frame within the socket's timeout. Raises OSError."""
    connection.sendall(_LENGTH.pack(len(payload)))
    connection.sendall(payload)


def receive_frame(
    connection: socket.socket, *, max_bytes: int | None = None, deadline: float | None = None
) -> bytes:
    """The payload of the next frame.

    `deadline` is in seconds of `time.monotonic`. Raises EOFError if the peer closed the connection,
    TimeoutError after the deadline, ValueError if the payload exceeds `max_bytes`.
    """
    (size,) = _LENGTH.unpack(_receive(connection, _LENGTH.size, deadline))
    if max_bytes is not None and size > max_bytes:
        raise ValueError(f"a frame of {size} bytes exceeds {max_bytes}")
    return _receive(connection, size, deadline)


def _receive(connection: socket.socket, size: int, deadline: float | None) -> bytes:
    received = bytearray()
    while len(received) < size:
        if deadline is not None:
            connection.settimeout(seconds_until(deadline))
        data = connection.recv(min(_CHUNK, size - len(received)))
        if not data:
            raise EOFError
        received += data
    return bytes(received)


def seconds_until(deadline: float) -> float:
    """Raises TimeoutError if the deadline has passed: a socket timeout of 0 would not block."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def serve(connection: socket.socket, *, cpu_seconds: float) -> None:
    """Renders until the parent closes the connection. SIGPROF ends the process on a CPU limit."""
    template = ChatTemplate(decode_text(receive_frame(connection)))
    while True:
        try:
            frame = receive_frame(connection)
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        reply = _rendered(template, frame)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        send_frame(connection, reply)


def _rendered(template: ChatTemplate, frame: bytes) -> bytes:
    max_output = min(MAX_OUTPUT, MIN_OUTPUT + OUTPUT_PER_BYTE * len(frame))
    try:
        text = template.render(json.loads(decode_text(frame)), max_output=max_output)
        return Reply.TEXT + encode_text(text)
    except ChatTemplateLimitError as error:
        return Reply.LIMIT + encode_text(str(error))
    except ChatTemplateError as error:
        return Reply.ERROR + encode_text(str(error))


def main() -> None:
    """Arguments: bytes of address space, seconds of CPU time per rendering."""
    memory, cpu_seconds = int(sys.argv[1]), float(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent drains first
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # without support, time is the only limit
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with socket.socket(fileno=sys.stdin.fileno()) as connection:
        try:
            serve(connection, cpu_seconds=cpu_seconds)
        except MemoryError:
            os._exit(EXIT_MEMORY)


if __name__ == "__main__":
    main()
