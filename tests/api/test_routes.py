"""Every route, walked: with keys nothing answers without one but what is listed as open.

The scope is made as the server makes it, from the bytes on the wire, and not by a client that
tidies addresses up first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi import APIRouter, FastAPI
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute

from service.api.http.auth import OPEN_FILES, OPEN_PATHS, only_with_key

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


async def answer(app: FastAPI, raw: str, *, method: str = "GET", host: str = "test") -> int:
    """The status of an answer to a caller without a key."""
    address, _, query = raw.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": unquote(address), "raw_path": address.encode(),
        "query_string": query.encode(), "root_path": "", "headers": [(b"host", host.encode())],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "state": {},
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return int(sent[0]["status"])


def paths_of(routes: list[BaseRoute], *, prefix: str = "") -> Iterator[str]:
    """An address of each route, its parameters filled in."""
    for route in routes:
        included = getattr(route, "original_router", None)  # as newer versions of FastAPI keep one
        if included is not None:
            inner = prefix + getattr(route, "include_context").prefix  # noqa: B009  # not in the type
            yield from paths_of(included.routes, prefix=inner)
            continue
        if isinstance(route, Mount):
            yield from paths_of(list(route.routes), prefix=prefix + route.path)
            continue
        assert isinstance(route, Route | WebSocketRoute), f"the walk knows no {type(route)}"
        yield prefix + re.sub(r"\{[^}]*\}", "x", route.path)


def is_open(path: str) -> bool:
    return path in OPEN_PATHS or OPEN_FILES.fullmatch(path) is not None


@pytest.fixture
async def app(start_service: Any) -> Any:
    """All routes there are, and no key that opens them."""
    async with start_service(
        authenticate=only_with_key(lambda _secret: None), docs=True
    ) as service:
        yield service.app


async def test_without_a_key_only_the_open_routes_answer(app: FastAPI) -> None:
    paths = set(paths_of(app.router.routes))
    assert {"/v1/completions", "/v1/models/x", "/status", "/docs", "/openapi.json"} <= paths
    closed = {path for path in paths if not is_open(path)}
    assert paths - closed == OPEN_PATHS, "the list names routes that exist; /web/x is no file"
    for path in closed:
        assert {await answer(app, path, method=method) for method in METHODS} == {401}, path
    for path in (*OPEN_PATHS, "/web/app.js"):
        assert await answer(app, path) == 200, path


async def test_a_route_that_is_added_is_closed(app: FastAPI) -> None:
    router = APIRouter()
    router.add_api_route("/debug", lambda: "all secrets")
    router.add_api_route("/health/secrets", lambda: "all secrets")
    app.include_router(router)
    for path in ("/debug", "/health/secrets", "/metrics", "/nothing", "", "*"):
        assert await answer(app, path) == 401, path


SPELLINGS = (
    "{0}/", "/{0}", "//{0}", "{0}//", "{0}?", "{0}?x=/health", "{0};/health", "{0}#/health",
    "/health/..{0}", "/health/%2e%2e{0}", "/web/..{0}", "/web/%2e%2e{0}", "/web/app.js/..{0}",
    "/web/app.js%00{0}", "/web/app.js%0a{0}", "/web/app.js%2f..{0}", "/%2e%2e{0}", "/.{0}",
    "/%2f{0}", "{0}%20", "{0}%00", "{0}%2f", "{0}%0a", "http://test{0}", "http://test/health{0}",
    "/health{0}", "/health;{0}", "/health%00", "/health%0a", "/health/", "/HEALTH",
    "/health%2flive%0a", "/web/", "/web", "/web/app.js%0a", "/web/app.js/",
    "/web/%2e%2e/app.js", "\\{0}",
)  # fmt: skip


async def test_odd_spellings_open_nothing(app: FastAPI) -> None:
    closed = [path for path in paths_of(app.router.routes) if not is_open(path)]
    for path in closed:
        odd = [spelling.format(path) for spelling in SPELLINGS]
        doubled, upper = path.replace("/", "//"), path.upper()
        escaped = "/" + "".join(f"%{ord(char):02x}" for char in path[1:])
        for raw in (*odd, doubled, upper, escaped):
            for method in ("GET", "POST"):
                assert await answer(app, raw, method=method) == 401, (raw, method)
        for host in ("a/v1?x", "health", "", "test/health?", "x#", "[", "test/health/live"):
            assert await answer(app, path, host=host) == 401, (path, host)


async def test_a_websocket_goes_no_further(app: FastAPI) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def handler(websocket: Any) -> None:
        await websocket.accept()

    app.add_api_websocket_route("/health", handler)
    await app({"type": "websocket", "path": "/health", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_without_keys_these_are_not_there_at_all(service: Any) -> None:
    for path in ("/metrics", "/debug", "/redoc"):
        assert (await service.client.get(path)).status_code == 404
