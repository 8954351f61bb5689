"""Forms: however the bytes arrive, the form is the same; a broken one is an error, never a hang."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.http.multipart import MAX_FIELD_BYTES, Form, boundary_of, read_form
from service.errors import BadRequest, TooLarge

B = b"xyz"
PIECES = st.lists(st.sampled_from([b"\r", b"\n", b"--", b"xyz", b"-", b"\0", b"a"]), max_size=30)


async def blocks_of(data: bytes, cuts: Sequence[int]) -> AsyncIterator[bytes]:
    last = 0
    for cut in sorted({min(cut, len(data)) for cut in cuts}):
        yield data[last:cut]
        last = cut
    yield data[last:]


def read(data: bytes, cuts: Sequence[int] = (), *, max_bytes: int = 10_000) -> Form:
    return asyncio.run(read_form(blocks_of(data, cuts), B, max_bytes=max_bytes))


def part(head: bytes, content: bytes) -> bytes:
    return b"--xyz\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + content + b"\r\n"


@given(pieces=PIECES, cuts=st.lists(st.integers(0, 300), max_size=8))
def test_content_arrives_unchanged(pieces: list[bytes], cuts: list[int]) -> None:
    content = b"".join(pieces).replace(b"\r\n--xyz", b"")
    data = part(b'name="file"; filename="a.jsonl"', content)
    data += part(b'name="purpose"', b"batch") + b"--xyz--\r\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.api.http.multipart.MEMORY_BYTES", 8)
        form = read(data, cuts)
    assert form.file is not None
    assert form.file.read() == content
    assert (form.filename, form.fields) == ("a.jsonl", {"purpose": "batch"})
    form.close()


@given(content=st.binary(max_size=200))
def test_what_httpx_writes_is_read(content: bytes) -> None:
    request = httpx.Request(
        "POST", "http://x", files={"file": ('a"b', content)}, data={"purpose": "batch", "e": ""}
    )
    boundary = boundary_of(request.headers["content-type"])
    assert boundary is not None
    body = blocks_of(request.read(), [3, 50])
    form = asyncio.run(read_form(body, boundary, max_bytes=10_000))
    assert form.file is not None
    assert (form.file.read(), form.fields) == (content, {"purpose": "batch", "e": ""})
    form.close()


@given(data=st.binary(max_size=100), cuts=st.lists(st.integers(0, 100), max_size=3))
def test_other_bytes_are_refused(data: bytes, cuts: list[int]) -> None:
    with pytest.raises(BadRequest):
        read(data.replace(b"--xyz--", b""), cuts)


@pytest.mark.parametrize(
    "data",
    [
        b"--xyz\r\n\r\nno name\r\n--xyz--",
        part(b'name="a"', b"1") * 2 + b"--xyz--",
        part(b'name="file"; filename="a"', b"1") * 2 + b"--xyz--",
        part(b'name="other"; filename="a"', b"1") + b"--xyz--",
        part(b'name="a"', b"1" * (MAX_FIELD_BYTES + 1)) + b"--xyz--",
        part(b"x=" + b"y" * 10_000, b"1") + b"--xyz--",
        b"".join(part(b'name="%d"' % n, b"1") for n in range(17)) + b"--xyz--",
        part(b'name="a"', b"1"),
    ],
)
def test_malformed_forms(data: bytes) -> None:
    with pytest.raises(BadRequest):
        read(data)


def test_a_file_has_a_limit() -> None:
    data = part(b'name="file"; filename="a"', b"12345") + b"--xyz--"
    read(data, max_bytes=5).close()
    with pytest.raises(TooLarge):
        read(data, max_bytes=4)


@pytest.mark.parametrize(
    ("text", "boundary"),
    [
        ("multipart/form-data; boundary=abc", b"abc"),
        ('Multipart/Form-Data; charset=utf-8; boundary="a b"', b"a b"),
        ("multipart/form-data", None),
        ("multipart/form-data; boundary=", None),
        ("application/json; boundary=abc", None),
        ("multipart/form-data; boundary=" + "a" * 71, None),
    ],
)
def test_boundaries(text: str, boundary: bytes | None) -> None:
    assert boundary_of(text) == boundary
