"""Forms: however the bytes arrive, the form is the same; a broken one is an error, never a hang."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from service.api.system.files import MAX_FIELD_BYTES, MAX_FIELDS, MAX_FRAME_BYTES, read_form
from service.batches.files import FileLimits
from service.batches.jobs import JobLimits
from service.errors import BadRequest, TooLarge

TYPE = "multipart/form-data; boundary=xyz"
PIECES = st.lists(st.sampled_from([b"\r", b"\n", b"--", b"xyz", b"-", b"\0", b"a"]), max_size=30)


def messages_of(data: bytes, cuts: Sequence[int]) -> Iterator[dict[str, Any]]:
    last = 0
    for cut in sorted({min(cut, len(data)) for cut in cuts}):
        yield {"type": "http.request", "body": data[last:cut], "more_body": True}
        last = cut
    yield {"type": "http.request", "body": data[last:], "more_body": False}


def read(
    data: bytes, cuts: Sequence[int] = (), *, kind: str = TYPE, max_bytes: int = 10_000
) -> dict[str, str | bytes]:
    """The fields of a form, that of a file as its content."""
    messages = messages_of(data, cuts)

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def read_all() -> dict[str, str | bytes]:
        scope = {"type": "http", "headers": [(b"content-type", kind.encode())]}
        form: FormData = await read_form(Request(scope, receive), FileLimits(max_bytes=max_bytes))
        try:
            return {
                name: await value.read() if isinstance(value, UploadFile) else value
                for name, value in form.multi_items()
            }
        finally:
            await form.close()

    return asyncio.run(read_all())


def part(head: bytes, content: bytes) -> bytes:
    return b"--xyz\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + content + b"\r\n"


FILE = part(b'name="file"; filename="a.jsonl"', b"{}")
PURPOSE = part(b'name="purpose"', b"batch")
END = b"--xyz--\r\n"


@pytest.mark.slow
@given(pieces=PIECES, cuts=st.lists(st.integers(0, 300), max_size=8))
def test_content_arrives_unchanged(pieces: list[bytes], cuts: list[int]) -> None:
    content = b"".join(pieces).replace(b"\r\n--xyz", b"")
    data = part(b'name="file"; filename="a.jsonl"', content) + PURPOSE + END
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.api.system.files.FormReader.spool_max_size", 8)
        assert read(data, cuts) == {"file": content, "purpose": "batch"}


@given(content=st.binary(max_size=200))
def test_what_httpx_writes_is_read(content: bytes) -> None:
    request = httpx.Request(
        "POST", "http://x", files={"file": ('a"b', content)}, data={"purpose": "batch", "e": ""}
    )
    form = read(request.read(), [3, 50], kind=request.headers["content-type"])
    assert form == {"file": content, "purpose": "batch", "e": ""}


@pytest.mark.slow
@given(data=st.binary(max_size=100), cuts=st.lists(st.integers(0, 100), max_size=3))
def test_other_bytes_are_refused(data: bytes, cuts: list[int]) -> None:
    with pytest.raises(BadRequest):
        read(data.replace(b"--xyz--", b""), cuts)


@given(cut=st.integers(0, len(FILE + PURPOSE + END) - 3))
def test_a_form_that_is_cut_off_is_refused(cut: int) -> None:
    with pytest.raises(BadRequest):
        read((FILE + PURPOSE + END)[:cut])


@pytest.mark.parametrize(
    "data",
    [
        b"--xyz\r\n\r\nno name\r\n" + END,
        FILE * 2 + END,
        FILE + part(b'name="other"; filename="a"', b"1") + END,
        part(b'name="a"', b"1" * (MAX_FIELD_BYTES + 1)) + END,
        part(b"x=" + b"y" * 10_000, b"1") + END,
        part(b"x=y" + b"\r\na: b" * 100, b"1") + END,
        b"".join(part(b'name="%d"' % n, b"1") for n in range(MAX_FIELDS + 1)) + END,
    ],
)
def test_malformed_forms(data: bytes) -> None:
    with pytest.raises(BadRequest):
        read(data)


def test_a_body_that_never_ends_is_refused() -> None:
    """One without a length: it is read as far as a file may be long."""
    content = b"a" * (MAX_FRAME_BYTES + 10)
    with pytest.raises(TooLarge):
        read(part(b'name="file"; filename="a"', content), range(0, len(content), 4096), max_bytes=5)


@pytest.mark.parametrize(
    ("data", "kind", "status", "code"),
    [
        (FILE + PURPOSE + END, TYPE, 200, None),
        (b"\r\n" + FILE + PURPOSE + END + b"epilogue", TYPE, 200, None),
        (PURPOSE + FILE + END, 'Multipart/Form-Data; charset=UTF-8; boundary="xyz"', 200, None),
        (FILE + PURPOSE + END, "multipart/form-data", 415, "unsupported_media_type"),
        (FILE + PURPOSE + END, "multipart/form-data; boundary=", 415, "unsupported_media_type"),
        (FILE + PURPOSE + END, "text/plain; boundary=xyz", 415, "unsupported_media_type"),
        (FILE + PURPOSE + END, TYPE + "; charset=undefined", 415, "unsupported_media_type"),
        (FILE + PURPOSE + END, TYPE + "; charset=utf-7", 415, "unsupported_media_type"),
        (FILE + PURPOSE + END, TYPE + "x" * 300, 400, "invalid_form"),
        (FILE + PURPOSE * 2 + END, TYPE, 400, "invalid_form"),
        (FILE + PURPOSE + part(b'name="a"', b"1") + END, TYPE, 400, "unknown_parameter"),
        (FILE + END, TYPE, 400, "invalid_value"),
        (FILE + part(b'name="purpose"', b"\xff") + END, TYPE, 400, "invalid_value"),
        (PURPOSE + END, TYPE, 400, "missing_required_parameter"),
        (part(b'name="file"', b"{}") + PURPOSE + END, TYPE, 400, "missing_required_parameter"),
        (
            part(b'name="purpose"; filename="a"', b"batch") + END,
            TYPE,
            400,
            "missing_required_parameter",
        ),
        (part(b'name="file"; filename=""', b"{}") + PURPOSE + END, TYPE, 400, "invalid_value"),
        (END, TYPE, 400, "missing_required_parameter"),
    ],
)
async def test_an_upload(
    start_service: Any, tmp_path: Path, data: bytes, kind: str, status: int, code: str | None
) -> None:
    async with start_service(jobs=JobLimits(url=str(tmp_path))) as service:
        reply = await service.client.post("/v1/files", content=data, headers={"content-type": kind})
    assert reply.status_code == status, reply.text
    assert reply.json().get("error", {}).get("code") == code
