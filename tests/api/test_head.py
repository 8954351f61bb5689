"""HEAD: each GET route answers it with the same headers and no body, without doing a GET's work."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from service.api import ROUTERS
from service.app import build_admin_app
from tests.api.bad_input_rows import MODEL, B, R
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.slow

DECISION = {
    "model": MODEL,
    "input": "hello",
    "questions": [{"type": "predicate", "instructions": "It is plain."}],
}
CHANGING = {"date", "x-request-id", "content-length"}
"""Headers that differ between two calls, by their time or by figures in the body."""
UNBOUNDED = {"transfer-encoding"}
"""Framing of a body that has no length, which an answer without one may leave out."""


def get_paths() -> list[str]:
    routes = [route for router in ROUTERS.values() for route in router.routes]
    return [r.path for r in routes if isinstance(r, APIRoute) and "GET" in (r.methods or ())]


def compare(head: httpx.Response, get: httpx.Response) -> None:
    path = str(get.url)
    assert head.status_code == get.status_code == 200, (path, head.status_code, get.text)
    assert head.content == b"", path
    same = {name: value for name, value in get.headers.items() if name not in CHANGING | UNBOUNDED}
    assert {n: v for n, v in head.headers.items() if n not in CHANGING} == same, path
    assert ("content-length" in head.headers) == ("content-length" in get.headers), path


async def test_every_get_route_answers_head(start_service: Any, listen: Any) -> None:
    """Over a socket, on one connection: a body that was sent would be read as the next answer."""
    async with (
        start_service(docs=True) as service,
        listen(service.app) as url,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client,
    ):
        call = await client.post("/v1/completions", json=B | {"stream": True})
        response = await client.post("/v1/responses", json=R)
        decision = await client.post("/v1/decisions", json=DECISION)
        file = await client.post(
            "/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", b"{}\n")}
        )
        batch = await client.post(
            "/v1/batches",
            json={
                "input_file_id": file.json()["id"],
                "endpoint": "/v1/completions",
                "completion_window": "24h",
            },
        )
        names = {
            "file_id": file.json()["id"],
            "batch_id": batch.json()["id"],
            "call_id": call.headers["x-request-id"],
            "response_id": response.json()["id"],
            "model": MODEL,
            "name": "app.js",
        }
        # Of models that encode: `test_encoding.py` has one.
        paths = [path for path in get_paths() if path != "/v1/encodings/{call_id}"]
        assert len(paths) >= 13
        for path in paths:
            fields = names
            if path == "/v1/decisions/{call_id}":
                fields = names | {"call_id": decision.json()["id"]}
            address = path.replace(":path", "").format_map(fields)
            compare(await client.head(address), await client.get(address))


async def test_the_admin_port_answers_head(service: Any, listen: Any) -> None:
    app = build_admin_app(
        service.app.state.health, version="0.0.1", render_metrics=lambda: b"# no series\n"
    )
    async with listen(app) as url, httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
        for path in ("/metrics", "/health/live", "/health/ready"):
            compare(await client.head(path), await client.get(path))


async def test_head_of_a_running_stream_neither_waits_nor_ends_it(
    start_service: Any, small_limits: Any, listen: Any
) -> None:
    """The reader of a HEAD never arrives: it must not count as one that left."""
    async with (
        start_service(limits=small_limits(grace=0.2, sweep_interval=0.03)) as service,
        listen(service.app) as url,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client,
    ):
        service.engine.pause = 0.02
        body = B | {"stream": True, "max_tokens": 60}
        ids = {"x-quire-event-ids": "1"}
        async with client.stream("POST", "/v1/completions", json=body, headers=ids) as call:
            lines = call.aiter_lines()
            await anext(lines)
            head = await client.head(f"/v1/streams/{call.headers['x-request-id']}")
            assert service.queue._running, "it was answered before the stream ended"
            assert head.status_code == 200
            assert head.headers["content-type"].startswith("text/event-stream")
            rest = [line async for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in "".join(rest)


async def test_head_where_there_is_no_get(service: Any, listen: Any) -> None:
    async with (
        listen(service.app) as url,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client,
    ):
        refused = await client.head("/v1/completions")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        assert (await client.head("/nowhere")).status_code == 404
        other = await client.put("/v1/models")
        assert (other.status_code, other.headers["allow"]) == (405, "GET, HEAD")
