"""Bytes that are no HTTP, too much of it, or rare HTTP; and a reader of what comes back.

`test_http_layer` sends them to a server in this process, `test_hostile` to one in another.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.api.bad_input_rows import COMPLETIONS, B


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """`sent` on a connection of its own; the final answers' statuses, up to the server's close."""

    number: int
    name: str
    sent: bytes
    statuses: tuple[int, ...]
    code: str | None = None  # of the last answer

    def __str__(self) -> str:
        return f"{self.number} {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One HTTP answer; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def request(
    *lines: str | bytes,
    start: str = f"POST {COMPLETIONS} HTTP/1.1",
    host: str = "Host: localhost",
    content: bytes = b"",
) -> bytes:
    """A request with these header lines."""
    named = (start, *([host] if host else []), "Content-Type: application/json", *lines)
    head = b"\r\n".join(line.encode() if isinstance(line, str) else line for line in named)
    return head + b"\r\n\r\n" + content


GOOD = json.dumps(B).encode()
LENGTH = f"Content-Length: {len(GOOD)}"
CHUNKED = "Transfer-Encoding: chunked"
LAST = "Connection: close"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD)
LIVE = "GET /health/live HTTP/1.1"


def plain(*lines: str, start: str = LIVE) -> bytes:
    """A request without a body."""
    return request(*lines, start=start)


TWICE: dict[str, bytes] = {
    "length and chunked": request(LENGTH, CHUNKED, content=CHUNKS),
    "chunked and length": request(CHUNKED, LENGTH, content=CHUNKS),
    "chunked and length 0": request(CHUNKED, "Content-Length: 0", content=CHUNKS),
    "two lengths": request(LENGTH, "Content-Length: 3", content=GOOD),
    "one length twice": request(LENGTH, LENGTH, content=GOOD),
    "a list of lengths": request(f"{LENGTH}, {len(GOOD)}", content=GOOD),
    "length -1": request("Content-Length: -1", content=GOOD),
    "length +3": request("Content-Length: +3", content=GOOD),
    "length 0x3": request("Content-Length: 0x3", content=GOOD),
    "length 1e1": request("Content-Length: 1e1", content=GOOD),
    "length 10**30": request(f"Content-Length: {10**30}", content=GOOD),
    "no length": request("Content-Length:", content=GOOD),
    "chunked, identity": request("Transfer-Encoding: chunked, identity", content=CHUNKS),
    "identity": request("Transfer-Encoding: identity", content=GOOD),
    "gzip, chunked": request("Transfer-Encoding: gzip, chunked", content=CHUNKS),
    "xchunked": request("Transfer-Encoding: xchunked", content=CHUNKS),
    "chunked twice": request(CHUNKED, CHUNKED, content=CHUNKS),
    "chunked and a vertical tab": request(CHUNKED + "\x0b", content=CHUNKS),
    "chunked in a folded line": request("Transfer-Encoding:\r\n chunked", content=CHUNKS),
    "space before the colon": request("Transfer-Encoding : chunked", content=CHUNKS),
    "chunked in HTTP/1.0": request(
        CHUNKED, start=f"POST {COMPLETIONS} HTTP/1.0", content=CHUNKS
    ),
    "a chunk's length is no number": request(CHUNKED, content=b"xyz\r\n"),
    "a chunk's length is negative": request(CHUNKED, content=b"-1\r\n"),
    "a chunk's length is huge": request(CHUNKED, content=b"f" * 17 + b"\r\n"),
    "a chunk without its end": request(CHUNKED, content=b"2\r\n{}xx0\r\n\r\n"),
    "no Host": request(LENGTH, host="", content=GOOD),
    "two Hosts": request("Host: other", LENGTH, content=GOOD),
    "lines end with LF": plain().replace(b"\r\n", b"\n"),
    "NUL in a header": plain("X: a\0b"),
    "a header without a colon": plain("nothing"),
    "a header without a name": plain(": x"),
    "a control character in the URL": plain(start="GET /health\x01 HTTP/1.1"),
    "bytes above 127 in the URL": plain(start="GET /é HTTP/1.1"),
    "space in the URL": plain(start="GET /a b HTTP/1.1"),
}  # fmt: skip

MUCH: dict[str, tuple[bytes, int, str]] = {
    "a URL of a megabyte": (plain(start=f"GET /{'a' * 10**6} HTTP/1.1"), 414, "url_too_long"),
    "a query of a megabyte": (plain(start=f"GET /?{'a' * 10**6} HTTP/1.1"), 414, "url_too_long"),
    "a header of a megabyte": (plain(f"X: {'a' * 10**6}"), 431, "headers_too_large"),
    "a name of a megabyte": (plain(f"{'a' * 10**6}: x"), 431, "headers_too_large"),
    "10**4 headers": (plain(*(f"X{i}: a" for i in range(10**4))), 431, "headers_too_large"),
    "10**6 empty lines": (b"\r\n" * 10**6, 431, "headers_too_large"),
    "a trailer of a megabyte": (
        request(CHUNKED, content=CHUNKS[:-2] + b"X: " + b"a" * 10**6), 431, "headers_too_large",
    ),
    "10**4 trailers": (
        request(CHUNKED, content=CHUNKS[:-2] + b"X: a\r\n" * 10**4), 431, "headers_too_large",
    ),
    "a chunk's extension of a megabyte": (
        request(CHUNKED, content=b"2;" + b"a" * 10**6), 431, "headers_too_large",
    ),
}  # fmt: skip

STRANGE: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "HTTP/1.0": (plain(start="GET /health/live HTTP/1.0"), (200,)),
    "HTTP/1.0 without a Host": (b"GET /health/live HTTP/1.0\r\n\r\n", (200,)),
    "HTTP/1.0 with a body": (
        request(LENGTH, start=f"POST {COMPLETIONS} HTTP/1.0", content=GOOD), (200,),
    ),
    "HTTP/0.9": (b"GET /health/live\r\n\r\n", (400,)),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400,)),
    "HTTP/1.1 as 2.0": (plain(start="GET /health/live HTTP/2.0"), (400,)),
    "HTTP/9.9": (plain(start="GET /health/live HTTP/9.9"), (400,)),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500, (405,)),
    "SSH": (b"SSH-2.0-OpenSSH_9.6\r\n", (405,)),
    "an unknown method": (request(start=f"FOO {COMPLETIONS} HTTP/1.1"), (405,)),
    "a method in lower case": (request(start=f"post {COMPLETIONS} HTTP/1.1"), (405,)),
    "CONNECT": (b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", (400,)),
    "OPTIONS *": (plain(LAST, start="OPTIONS * HTTP/1.1"), (404,)),
    "a whole URL": (plain(LAST, start="GET http://test/health/live HTTP/1.1"), (200,)),
    "empty lines first": (b"\r\n\r\n" + plain(LAST), (200,)),
    "a websocket": (plain("Connection: Upgrade", "Upgrade: websocket") + b"\x81\x05hello", (200,)),
    "h2c": (
        request("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk",
                LENGTH, content=GOOD), (200,),
    ),
    "chunked": (request(CHUNKED, LAST, content=CHUNKS), (200,)),
    "chunked with trailers": (
        request(CHUNKED, LAST, content=CHUNKS[:-2] + b"X-Request-Timeout-Ms: x\r\n\r\n"), (200,),
    ),
    "100 pipelined": (plain() * 99 + plain(LAST), (200,) * 100),
    "pipelined with bodies": (
        request(LENGTH, content=GOOD) * 7 + request(LENGTH, LAST, content=GOOD), (200,) * 8,
    ),
    "pipelined after the last": (plain(LAST) + plain() * 3, (200,)),
    "good ones, then garbage": (plain() * 3 + b"\0garbage\r\n\r\n", (200, 200, 200, 405)),
    "a good one, then one with two lengths": (
        request(LENGTH, content=GOOD) + request(LENGTH, LENGTH, content=GOOD), (200, 400),
    ),
    "more body than its length": (
        request("Content-Length: 2", content=b"{}" + b'{"model":'), (400, 405),
    ),
    "an expected body": (request(LENGTH, LAST, "Expect: 100-continue", content=GOOD), (200,)),
    "an expected body that is refused": (
        request("Content-Length: 100000000", "Expect: 100-continue"), (413,),
    ),
    "another expectation": (request(LENGTH, LAST, "Expect: tea", content=GOOD), (200,)),
}  # fmt: skip


def raw_rows() -> Iterator[RawRow]:
    """All of them."""
    for name, sent in TWICE.items():
        yield RawRow(number=18, name=name, sent=sent, statuses=(400,), code="invalid_http")
    for name, (sent, status, code) in MUCH.items():
        yield RawRow(number=19, name=name, sent=sent, statuses=(status,), code=code)
    for name, (sent, statuses) in STRANGE.items():
        yield RawRow(number=90, name=name, sent=sent, statuses=statuses)


def exchange(
    address: tuple[str, int], sent: bytes, *, timeout: float = 30.0, step: int | None = None
) -> list[Answer]:
    """Sends, in pieces of `step` bytes, and reads until the server ends the connection."""
    received = bytearray()
    with socket.create_connection(address, timeout=timeout) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for start in range(0, len(sent), step or len(sent)):
                connection.sendall(sent[start : start + (step or len(sent))])
            while part := connection.recv(2**16):
                received += part
        except (ConnectionResetError, BrokenPipeError):
            # The server answered and closed: its answer may still be in the buffer.
            while part := _rest(connection):
                received += part
    return answers(bytes(received))


def _rest(connection: socket.socket) -> bytes:
    try:
        return connection.recv(2**16)
    except ConnectionResetError:
        return b""


def answers(data: bytes) -> list[Answer]:
    """The answers in a connection's bytes, without those of 1xx. Fails on what is left over."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        start, *lines = head.decode().split("\r\n")
        version, status, _ = start.split(" ", 2)
        assert version == "HTTP/1.1", start
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        if status.startswith("1"):
            continue
        body, data = _body(headers, data)
        found.append(Answer(status=int(status), headers=headers, body=body))
    return found


def _body(headers: dict[str, str], data: bytes) -> tuple[bytes, bytes]:
    if "content-length" in headers:
        length = int(headers["content-length"])
        assert len(data) >= length, "the answer is cut off"
        return data[:length], data[length:]
    if headers.get("transfer-encoding") != "chunked":
        return data, b""
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        assert data[length : length + 2] == b"\r\n", "the answer is cut off"
        body, data = body + data[:length], data[length + 2 :]
        if length == 0:
            return body, data
