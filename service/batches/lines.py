"""The lines of an input file: found and checked once, then read by their places."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

MAX_LINES = 50_000
MAX_ERRORS = 100  # reported of one file
MAX_ID_CHARS = 255
BLOCK_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class Line:
    """One request: bytes `start` to `end` of the file."""

    custom_id: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class LineError:
    """Why a file cannot be run. `line` counts from 1; None: the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


def body_of(data: bytes) -> dict[str, Any]:
    """The body of a checked line."""
    body = orjson.loads(data)["body"]
    assert isinstance(body, dict)  # noqa: S101  # it was checked
    return body


def split(blocks: Iterator[bytes], *, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(start, line) of each line without its end. One that is too long is cut: it is an error."""
    rest, start = b"", 0
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield start, line
            start += len(line) + 1
        if len(rest) > max_bytes:
            yield start, rest
            return
    if rest:
        yield start, rest


def check(
    blocks: Iterator[bytes], *, endpoint: str, max_bytes: int
) -> tuple[list[Line], list[LineError]]:
    """The lines of a file, and the first errors. Empty lines and a byte order mark are ignored."""
    found: list[Line] = []
    errors: list[LineError] = []
    seen: set[str] = set()
    for number, (at, text) in enumerate(split(blocks, max_bytes=max_bytes), start=1):
        data = text if at else text.removeprefix(BOM_UTF8)
        start = at + len(text) - len(data)
        if not data.strip():
            continue
        end = start + len(data)
        custom_id = _checked(data, number, endpoint=endpoint, seen=seen, max_bytes=max_bytes)
        if isinstance(custom_id, LineError):
            errors.append(custom_id)
        else:
            seen.add(custom_id)
            found.append(Line(custom_id, start, end))
        if len(found) > MAX_LINES:
            message = f"the file may have at most {MAX_LINES} lines; divide it into several"
            errors.append(LineError("too_many_lines", message))
        if len(errors) >= MAX_ERRORS or len(found) > MAX_LINES:
            break
    if not found and not errors:
        errors.append(LineError("empty_file", "the file must have at least one line"))
    return found, errors


def _checked(
    data: bytes, number: int, *, endpoint: str, seen: Collection[str], max_bytes: int
) -> str | LineError:
    if len(data) > max_bytes:
        message = f"a line may have at most {max_bytes} bytes"
        return LineError("line_too_long", message, number)
    line = _parsed(data)
    if line is None:
        return LineError("invalid_json_line", "the line must be a JSON object in UTF-8", number)
    custom_id = line.get("custom_id")
    is_id = isinstance(custom_id, str) and 1 <= len(custom_id) <= MAX_ID_CHARS
    rules = (
        (is_id, "custom_id", f"custom_id must be a string of 1 to {MAX_ID_CHARS} characters"),
        (
            not is_id or custom_id not in seen,
            "custom_id",
            "each custom_id may be used once in a file",
        ),
        (line.get("method") == "POST", "method", "method must be POST"),
        (line.get("url") == endpoint, "url", f"url must be the batch's endpoint: {endpoint}"),
        (isinstance(line.get("body"), dict), "body", "body must be a JSON object"),
    )
    for holds, param, message in rules:
        if not holds:
            return LineError("invalid_line", message, number, param)
    return str(custom_id)


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        line = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return line if isinstance(line, dict) else None
