"""Forms with a file: `multipart/form-data` (RFC 7578), read in blocks.

    --boundary CRLF headers CRLF CRLF content CRLF --boundary ... CRLF --boundary--

The content of the one file goes to disk; all other fields are short texts.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import IO

from service.errors import BadRequest, TooLarge

MAX_HEADER_BYTES = 8192  # of one part
MAX_FIELD_BYTES = 1024
MAX_FIELDS = 16
MEMORY_BYTES = 2**20
"""Of a file: what is longer goes to disk."""

_TYPE = re.compile(
    r'multipart/form-data\s*;(?:.*;)?\s*boundary=(?:"([^"]+)"|([^\s;"]+)).*', re.IGNORECASE
)
_NAME = re.compile(rb'[;\s]name="((?:[^"\\]|\\.)*)"', re.IGNORECASE)
_FILENAME = re.compile(rb'[;\s]filename="((?:[^"\\]|\\.)*)"', re.IGNORECASE)


@dataclass(slots=True)
class Form:
    """`file` is at its beginning; None: the form has none."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""
    file: IO[bytes] | None = None

    def close(self) -> None:
        """Removes the file."""
        if self.file is not None:
            self.file.close()


def boundary_of(content_type: str) -> bytes | None:
    """None if it is no form, or its boundary is invalid."""
    found = _TYPE.fullmatch(content_type)
    boundary = (found[1] or found[2]) if found else ""
    return boundary.encode("latin-1", "replace") if 1 <= len(boundary) <= 70 else None


async def read_form(blocks: AsyncIterator[bytes], boundary: bytes, *, max_bytes: int) -> Form:
    """Reads a form whose file is named `file`. Raises BadRequest or TooLarge."""
    form, complete = Form(), False
    try:
        reader = _Reader(form, boundary, max_bytes=max_bytes)
        async for block in blocks:
            reader.feed(block)
        reader.finish()
        complete = True
    finally:
        if not complete:
            form.close()
    if form.file is not None:
        form.file.seek(0)
    return form


class _Reader:
    """State machine over blocks: before the headers of a part, or within its content."""

    def __init__(self, form: Form, boundary: bytes, *, max_bytes: int) -> None:
        self._form = form
        self._mark = b"\r\n--" + boundary
        self._max_bytes = max_bytes
        self._rest = b"\r\n"  # so that the first boundary looks like all others
        self._name: str | None = None  # of the part whose content is read
        self._is_file = False
        self._value = b""
        self._size = 0
        self._parts = 0
        self._preamble = True
        self._ended = False

    def feed(self, block: bytes) -> None:
        """Reads as far as possible."""
        self._rest += block
        while not self._ended and self._step():
            pass
        if self._ended:
            self._rest = b""  # an epilogue

    def finish(self) -> None:
        """Raises BadRequest if the form is incomplete."""
        if not self._ended:
            raise _malformed("the form must end with its boundary")

    def _step(self) -> bool:
        """Consumes a piece; returns whether to go on with what is left."""
        if self._name is None and not self._preamble:
            return self._read_head()
        at = self._rest.find(self._mark)
        if at < 0:
            keep = len(self._mark) - 1  # may be the beginning of a boundary
            content, self._rest = self._rest[:-keep], self._rest[-keep:]
            self._write(content)
            return False
        self._write(self._rest[:at])
        self._close_part()
        self._rest = self._rest[at + len(self._mark) :]
        return True

    def _read_head(self) -> bool:
        """After a boundary: `--` ends the form, else come the headers of the next part."""
        if len(self._rest) < 2:
            return False
        if self._rest[:2] == b"--":
            self._ended = True
            return False
        at = self._rest.find(b"\r\n\r\n")
        if at > MAX_HEADER_BYTES or (at < 0 and len(self._rest) > MAX_HEADER_BYTES):
            raise _malformed(f"the headers of a part may have at most {MAX_HEADER_BYTES} bytes")
        if at < 0:
            return False
        self._open_part(self._rest[:at])
        self._rest = self._rest[at + 4 :]
        return True

    def _open_part(self, head: bytes) -> None:
        name, filename = _NAME.search(head), _FILENAME.search(head)
        if name is None:
            raise _malformed("each part of the form must have a name")
        self._parts += 1
        if self._parts > MAX_FIELDS:
            raise _malformed(f"the form may have at most {MAX_FIELDS} parts")
        self._name = name[1].decode("utf-8", "replace")
        self._is_file, self._value, self._size = filename is not None, b"", 0
        if filename is not None:
            if self._name != "file" or self._form.file is not None:
                raise _malformed("the form must have one file, named file")
            self._form.filename = filename[1].decode("utf-8", "replace")
            self._form.file = tempfile.SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115

    def _write(self, content: bytes) -> None:
        if self._preamble or not content:
            return
        self._size += len(content)
        if self._is_file:
            if self._size > self._max_bytes:
                raise TooLarge(f"a file may have at most {self._max_bytes} bytes")
            assert self._form.file is not None  # noqa: S101  # opened with the part
            self._form.file.write(content)
        else:
            if self._size > MAX_FIELD_BYTES:
                raise _malformed(f"a field of the form may have at most {MAX_FIELD_BYTES} bytes")
            self._value += content

    def _close_part(self) -> None:
        self._preamble = False
        if self._name is not None and not self._is_file:
            if self._name in self._form.fields:
                raise _malformed("a field of the form may come once")
            self._form.fields[self._name] = self._value.decode("utf-8", "replace")
        self._name = None


def _malformed(message: str) -> BadRequest:
    return BadRequest(message, code="invalid_form")
