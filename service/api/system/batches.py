"""The endpoints of batches, as OpenAI has them, and the calls of their lines."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Path, Query, Response
from pydantic import Field
from starlette.types import ASGIApp, Message

from service.api.http.auth import Tenant
from service.api.http.body import JsonRoute
from service.api.http.call import LINE
from service.api.http.context import Caller, from_app
from service.api.http.errors import error_body, error_headers
from service.api.http.fields import Metadata
from service.api.http.models import AnswerModel, Created, StrictModel, described, json_response
from service.api.system.files import MAX_ID_CHARS, After, listed
from service.batches.batches import Batch, Batches, BatchState, new_id
from service.batches.calls import LineCall, LineReply
from service.errors import BadRequest, QuireError

ENDPOINTS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/decisions", "/v1/embeddings",
    "/v1/rerank", "/v2/rerank", "/v1/score", "/v1/classify",
)  # fmt: skip
"""Of which the lines of a batch may be."""
MIN_WINDOW, MAX_WINDOW = 60, 30 * 86_400
_WINDOW = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

router = APIRouter(route_class=JsonRoute)


class BatchDesk:
    """The batches. `wake` makes this replica look at them now."""

    def __init__(self, batches: Batches, wake: Callable[[], None]) -> None:
        self.batches = batches
        self.wake = wake


Desk = Annotated[BatchDesk, from_app("batches")]
BatchId = Annotated[str, Path(description="The id of the batch.")]


class BatchBody(StrictModel):
    """The body of POST /v1/batches."""

    input_file_id: str = Field(
        max_length=MAX_ID_CHARS, description="The uploaded file, with one request per line."
    )
    endpoint: Literal[ENDPOINTS] = Field(  # type: ignore[valid-type]
        description="The endpoint of all lines."
    )
    completion_window: str = Field(
        json_schema_extra={"pattern": f"^{_WINDOW.pattern}$"},  # _seconds checks it
        description="The time after which lines without an answer fail: 24h, 30m, 7d.",
    )
    metadata: Metadata = Field(None, description="Up to 16 short texts by name.")


class BatchObject(AnswerModel):
    """A batch."""

    id: str = Field(description="The id of the batch.")
    object: Literal["batch"] = Field(description="The type of this object.")
    endpoint: str = Field(description="The endpoint of all lines.")
    errors: dict[str, Any] | None = Field(description="Why the input file cannot be run.")
    input_file_id: str = Field(description="The input file.")
    completion_window: str = Field(description="As it was requested.")
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired",
        "cancelling", "cancelled",
    ] = Field(description="The state of the batch.")  # fmt: skip
    output_file_id: str | None = Field(description="The answers, in the order of the lines.")
    error_file_id: str | None = Field(description="The lines that failed, in their order.")
    created_at: Created
    in_progress_at: int | None = Field(description="When the input file was checked.")
    expires_at: int | None = Field(description="When the completion window ends.")
    finalizing_at: int | None = Field(description="When the last line was answered.")
    completed_at: int | None = Field(description="When it was completed.")
    failed_at: int | None = Field(description="When it failed.")
    expired_at: int | None = Field(description="When it expired.")
    cancelling_at: int | None = Field(description="When a client cancelled it.")
    cancelled_at: int | None = Field(description="When its lines had ended after that.")
    request_counts: dict[str, int] = Field(
        description="Lines: `total`, `completed` and `failed`, as far as they are stored."
    )
    metadata: dict[str, str] | None = Field(description="As it was given.")


class BatchList(AnswerModel):
    """A page of batches, newest first."""

    object: Literal["list"] = Field(description="The type of this object.")
    data: list[BatchObject] = Field(description="The batches.")
    first_id: str | None = Field(description="The id of the first one; null if there is none.")
    last_id: str | None = Field(description="The id of the last one: `after` of the next page.")
    has_more: bool = Field(description="Whether there is a next page.")


@router.post("/v1/batches", responses=described(BatchObject))
async def create_batch(body: BatchBody, desk: Desk, tenant: Caller) -> Response:
    """Answers each line of a file as a request of its own, at the lowest priority. The answers are
    lines of another file, in the same order.
    """
    now = int(time.time())
    batch = Batch(
        id=f"batch_{new_id()}",
        tenant=tenant.name,
        endpoint=body.endpoint,
        input_file=body.input_file_id,
        window=body.completion_window,
        created=now,
        expires=now + _seconds(body.completion_window),
        allowance=tenant.allowance,
        metadata=body.metadata,
    )
    state = await desk.batches.create(batch)
    desk.wake()
    return json_response(_object(state))


def _seconds(window: str) -> int:
    found = _WINDOW.fullmatch(window)
    seconds = int(found[1]) * _SECONDS[found[2]] if found else 0
    if not MIN_WINDOW <= seconds <= MAX_WINDOW:
        raise BadRequest(
            "completion_window must be from 1m to 30d, such as 24h", param="completion_window"
        )
    return seconds


@router.get("/v1/batches", responses=described(BatchList))
async def list_batches(
    desk: Desk,
    tenant: Caller,
    *,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100, description="The length of the page.")] = 20,
) -> Response:
    """The batches of the tenant, newest first."""
    states, has_more = await desk.batches.list(tenant.name, after=after, limit=limit)
    return json_response(listed([_object(state) for state in states], has_more=has_more))


@router.get("/v1/batches/{batch_id}", responses=described(BatchObject))
async def show_batch(batch_id: BatchId, desk: Desk, tenant: Caller) -> Response:
    """A batch and its progress."""
    return json_response(_object(await desk.batches.get(tenant.name, batch_id)))


@router.post("/v1/batches/{batch_id}/cancel", responses=described(BatchObject))
async def cancel_batch(batch_id: BatchId, desk: Desk, tenant: Caller) -> Response:
    """Ends a batch. Lines without an answer are in its error file, as `batch_cancelled`."""
    state = await desk.batches.cancel(tenant.name, batch_id)
    desk.wake()
    return json_response(_object(state))


def _object(state: BatchState) -> dict[str, Any]:
    batch, end, status = state.batch, state.end, state.status
    total, done, failed = state.counts
    names = ("completed", "failed", "expired", "cancelled")
    ended: dict[str, int | None] = dict.fromkeys((f"{name}_at" for name in names), None)
    if end is not None:
        ended[f"{end.status}_at"] = end.at
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": _errors(state),
        "input_file_id": batch.input_file,
        "completion_window": batch.window,
        "status": status,
        "output_file_id": None if end is None else end.output_file,
        "error_file_id": None if end is None else end.error_file,
        "created_at": batch.created,
        "in_progress_at": state.started,
        "expires_at": batch.expires,
        "finalizing_at": None if end is None or end.status == "failed" else end.at,
        "cancelling_at": state.cancelled,
        **ended,
        "request_counts": {"total": total, "completed": done, "failed": failed},
        "metadata": batch.metadata,
    }


def _errors(state: BatchState) -> dict[str, Any] | None:
    if state.end is None or not state.end.errors:
        return None
    data = [
        {"code": each.code, "message": each.message, "line": each.line, "param": each.param}
        for each in state.end.errors
    ]
    return {"object": "list", "data": data}


# --- lines ----------------------------------------------------------------------------------


async def answer_line(app: ASGIApp, call: LineCall) -> LineReply:
    """Calls an endpoint of this process: the answer is the one that a client would get."""
    given = orjson.loads(call.body)
    for name in ("stream", "background"):
        if given.get(name):
            return _refusal(BadRequest(f"{name} must be false in a batch", param=name))
    call.state |= {
        LINE: True,
        "tenant": Tenant(name=call.tenant, allowance=call.allowance),
    }
    headers = {
        b"content-type": b"application/json",
        b"content-length": str(len(call.body)).encode(),
        b"idempotency-key": call.idempotency_key.encode(),
    }
    sent: list[Message] = []
    body = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if body:
            return body.pop()
        await asyncio.Event().wait()  # the client stays until it is cancelled
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [*headers.items()],
        "client": None,
        "server": None,
        "state": call.state,
    }
    calling = asyncio.ensure_future(app(scope, receive, send))
    try:
        await asyncio.wait([calling])
    finally:
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)  # after the response of an error 500
    start = sent[0]
    return LineReply(
        status=start["status"],
        headers={
            name.decode().lower(): value.decode("latin-1") for name, value in start["headers"]
        },
        body=b"".join(message.get("body", b"") for message in sent[1:]),
    )


def _refusal(error: QuireError) -> LineReply:
    return LineReply(
        status=error.status,
        headers=error_headers(error) | {"x-should-retry": "false"},
        body=error_body(error),
    )
