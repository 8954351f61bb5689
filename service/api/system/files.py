"""The endpoints of files, as OpenAI has them: the input of batches, and what batches write."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.api.http.context import Caller, from_app
from service.api.http.models import AnswerModel, Count, Created, described, json_response
from service.batches.batches import Batches, new_id
from service.batches.files import FileLimits, Files, StoredFile
from service.errors import (
    BadRequest,
    Conflict,
    RateLimited,
    RequestTimeout,
    TooLarge,
    UnsupportedMedia,
)

MAX_NAME_CHARS = 255
MAX_ID_CHARS = 64
MAX_UPLOADS = 4  # at a time, per tenant and replica
UPLOAD_TIMEOUT = 600.0  # seconds
SENT_BYTES = 2**20  # of a content, at a time
MAX_FIELDS = 16  # of a form, besides its file
MAX_FIELD_BYTES = 1024
MAX_FRAME_BYTES = 2**16  # of a form, besides the content of its file

router = APIRouter()


class FileDesk:
    """The files, the batches that use them, and the uploads that this replica receives now."""

    def __init__(self, files: Files, batches: Batches) -> None:
        self.files = files
        self.batches = batches
        self.uploads: Counter[str] = Counter()


Desk = Annotated[FileDesk, from_app("files")]
After = Annotated[
    str | None, Query(max_length=MAX_ID_CHARS, description="List what comes after this id.")
]
Purpose = Annotated[
    str | None, Query(max_length=MAX_ID_CHARS, description="Only files of this purpose.")
]
FileId = Annotated[str, Path(description="The id of the file.")]


class FileObject(AnswerModel):
    """A file."""

    id: str = Field(description="The id of the file.")
    object: Literal["file"] = Field(description="The type of this object.")
    bytes: Count = Field(description="The size of the content.")
    created_at: Created
    filename: str = Field(description="The name that the client gave it.")
    purpose: str = Field(description="batch, or batch_output if a batch wrote it.")
    status: Literal["processed"] = Field(description="Always processed.")


class FileList(AnswerModel):
    """A page of files."""

    object: Literal["list"] = Field(description="The type of this object.")
    data: list[FileObject] = Field(description="The files.")
    first_id: str | None = Field(description="The id of the first one; null if there is none.")
    last_id: str | None = Field(description="The id of the last one: `after` of the next page.")
    has_more: bool = Field(description="Whether there is a next page.")


class FileDeleted(AnswerModel):
    """Confirms that a file was deleted."""

    id: str = Field(description="The id of the file.")
    object: Literal["file"] = Field(description="The type of this object.")
    deleted: Literal[True] = Field(description="Always true.")


_JSONL = {"application/jsonl": {"schema": {"type": "string"}}}
_UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                }
            }
        },
    }
}


@router.post("/v1/files", responses=described(FileObject), openapi_extra=_UPLOAD)
async def upload_file(request: Request, desk: Desk, tenant: Caller) -> Response:
    """Stores a JSONL file of requests, as the form fields `file` and `purpose`."""
    limits = desk.files.limits
    _ensure_form(request.headers.get("content-type"))
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > limits.max_bytes + MAX_FRAME_BYTES:
        raise _too_large(limits)
    if desk.uploads[tenant.name] >= MAX_UPLOADS:
        raise RateLimited(f"you may upload at most {MAX_UPLOADS} files at a time")
    desk.uploads[tenant.name] += 1
    try:
        await desk.files.ensure_room(tenant.name, int(declared))
        form = await read_form(request, limits)
        try:
            return json_response(_object(await _store(form, desk, tenant.name)))
        finally:
            await form.close()
    finally:
        desk.uploads[tenant.name] -= 1


def _ensure_form(content_type: str | None) -> None:
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise UnsupportedMedia("the Content-Type must be multipart/form-data with a boundary")
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":  # any codec of Python, else
        raise UnsupportedMedia("the charset of a form must be utf-8")


class FormReader(MultiPartParser):
    """Starlette's parser; also refuses a form that is cut off or too large."""

    def __init__(self, request: Request, limits: FileLimits) -> None:
        super().__init__(
            request.headers,
            self._blocks(request, limits),
            max_files=1,
            max_fields=MAX_FIELDS,
            max_part_size=MAX_FIELD_BYTES,
        )
        self._ended = False

    def on_end(self) -> None:
        """Is called for the boundary that ends the form."""
        self._ended = True

    async def _blocks(self, request: Request, limits: FileLimits) -> AsyncGenerator[bytes, None]:
        size = 0
        async with aclosing(request.stream()) as blocks:
            async for block in blocks:
                size += len(block)
                if size > limits.max_bytes + MAX_FRAME_BYTES:
                    raise _too_large(limits)
                yield block
        if not self._ended:
            raise _malformed("it must end with its boundary and two hyphens")


async def read_form(request: Request, limits: FileLimits) -> FormData:
    reader = FormReader(request, limits)
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT), aclosing(reader.stream):
            return await reader.parse()
    except TimeoutError:
        raise RequestTimeout(f"the file must arrive in {UPLOAD_TIMEOUT:g} seconds") from None
    except MultiPartException as error:
        raise _malformed(error.message) from error


async def _store(form: FormData, desk: FileDesk, tenant: str) -> StoredFile:
    names = [name for name, _ in form.multi_items()]
    if len(set(names)) < len(names):
        raise _malformed("each field may come once")
    if set(names) - {"file", "purpose"}:
        message = "a file takes the fields file and purpose only"
        raise BadRequest(message, code="unknown_parameter")
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise BadRequest(
            "the form must have a file, with a file name",
            code="missing_required_parameter",
            param="file",
        )
    if form.get("purpose") != "batch":
        raise BadRequest("purpose must be batch", param="purpose")
    name = file.filename or ""
    if not 1 <= len(name) <= MAX_NAME_CHARS:
        raise BadRequest(
            f"the name of a file must have 1 to {MAX_NAME_CHARS} characters", param="file"
        )
    if (file.size or 0) > desk.files.limits.max_bytes:
        raise _too_large(desk.files.limits)
    return await desk.files.create(
        tenant, f"file-{new_id()}", file.file, name=name, purpose="batch"
    )


@router.get("/v1/files", responses=described(FileList))
async def list_files(
    desk: Desk,
    tenant: Caller,
    *,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="The length of the page.")] = 10_000,
    order: Annotated[
        Literal["asc", "desc"], Query(description="By the time of creation.")
    ] = "desc",
    purpose: Purpose = None,
) -> Response:
    """The files of the tenant."""
    files = [f for f in await desk.files.list(tenant.name) if purpose in {None, f.purpose}]
    if order == "desc":
        files.reverse()
    if after is not None:
        ids = [file.id for file in files]
        files = files[ids.index(after) + 1 :] if after in ids else []
    page = [_object(file) for file in files[:limit]]
    return json_response(listed(page, has_more=len(files) > limit))


@router.get("/v1/files/{file_id}", responses=described(FileObject))
async def show_file(file_id: FileId, desk: Desk, tenant: Caller) -> Response:
    """A file, without its content."""
    return json_response(_object(await desk.files.get(tenant.name, file_id)))


@router.get(
    "/v1/files/{file_id}/content",
    responses={200: {"description": "The content.", "content": _JSONL}},
)
async def read_file(file_id: FileId, desk: Desk, tenant: Caller) -> Response:
    """The content of a file."""
    file = await desk.files.get(tenant.name, file_id)

    async def blocks() -> AsyncIterator[bytes]:
        for start in range(0, file.num_bytes, SENT_BYTES):
            end = min(file.num_bytes, start + SENT_BYTES)
            yield await desk.files.content(tenant.name, file_id, start, end)

    headers = {"content-length": str(file.num_bytes)}
    return StreamingResponse(blocks(), media_type="application/jsonl", headers=headers)


@router.delete("/v1/files/{file_id}", responses=described(FileDeleted))
async def delete_file(file_id: FileId, desk: Desk, tenant: Caller) -> Response:
    """Deletes a file, unless a batch reads it."""
    if await desk.batches.uses(tenant.name, file_id):
        raise Conflict(
            "the file is the input of a batch that has not ended; cancel it first",
            code="file_in_use",
        )
    await desk.files.delete(tenant.name, file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


def listed(page: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """A page of objects as OpenAI lists them."""
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": has_more,
    }


def _object(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }


def _malformed(reason: str) -> BadRequest:
    message = f"the form must have the fields file and purpose as multipart/form-data: {reason}"
    return BadRequest(message, code="invalid_form")


def _too_large(limits: FileLimits) -> TooLarge:
    return TooLarge(f"a file may have at most {limits.max_bytes} bytes; divide it into several")
