"""Host and Origin: what a web page can make a browser send to a server without keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.http.auth import only_with_key, rate_headers
from service.api.http.middleware import EXPOSED, AllowedHosts, any_host
from service.app import build_admin_app
from service.errors import Forbidden
from service.http.exposure import keyless_hosts
from service.queues.admission import Meter, RateUsage
from service.settings import Settings
from tests.api.bad_input_rows import B
from tests.support.waiting import PATIENCE

LOOPBACK = AllowedHosts()
LISTED = AllowedHosts(names=("api", "quire.example"), any_address=True)


def refused(check: Any, *headers: tuple[str, str]) -> str | None:
    """The code of the refusal, if there is one."""
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    try:
        check({"headers": raw})
    except Forbidden as error:
        return error.code
    return None


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LOCALHOST:8000", "localhost.", "127.0.0.1:8000", "127.0.0.1",
     "127.9.8.7:1", "[::1]", "[::1]:8000", "app.localhost:3000", ""],
)  # fmt: skip
def test_loopback_names_and_addresses_are_accepted_at_any_port(host: str) -> None:
    assert refused(LOOPBACK, ("host", host)) is None
    assert refused(LOOPBACK) is None


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
     "evil-localhost", "notlocalhost", "0.0.0.0:8000", "[::]:8000", "10.0.0.1", "[fe80::1]",
     "127.0.0.1@evil.example", "evil.example:8000:127.0.0.1", "[::1].evil.example", "[", "::1",
     "localhost, evil.example", "evil.example/127.0.0.1", "localhost\xa0", "127.1", "."],
)  # fmt: skip
def test_other_hosts_are_refused(host: str) -> None:
    assert refused(LOOPBACK, ("host", host)) == "host_not_allowed"


@pytest.mark.parametrize("host", ["api", "API:8000", "quire.example", "10.1.2.3:8001", "[fd00::7]"])
def test_listed_names_and_addresses_of_the_network_are_accepted(host: str) -> None:
    """A probe, or a scrape, names the pod by its address."""
    assert refused(LISTED, ("host", host)) is None


@pytest.mark.parametrize("host", ["other", "api.evil.example", "0.0.0.0", "sub.quire.example"])
def test_names_that_are_not_listed_are_refused(host: str) -> None:
    assert refused(LISTED, ("host", host)) == "host_not_allowed"


@pytest.mark.parametrize(
    ("origin", "code"),
    [
        ("http://localhost:8000", None),
        ("https://localhost:8000", None),  # a proxy that ends TLS
        ("HTTP://LOCALHOST:8000", None),
        ("http://localhost:3000", "origin_not_allowed"),
        ("http://evil.example", "origin_not_allowed"),
        ("http://evil.example:8000", "origin_not_allowed"),
        ("null", "origin_not_allowed"),
        ("file://", "origin_not_allowed"),
        ("http://[", "origin_not_allowed"),
    ],
)
def test_pages_of_other_origins_are_refused(origin: str, code: str | None) -> None:
    assert refused(LOOPBACK, ("host", "localhost:8000"), ("origin", origin)) == code


def test_listed_origins_and_those_of_listed_hosts_are_accepted() -> None:
    host = ("host", "127.0.0.1:8000")
    listed = AllowedHosts(names=("quire.example",), origins=("http://localhost:3000", "null"))
    for origin in ("http://localhost:3000", "null", "https://quire.example"):
        assert refused(listed, host, ("origin", origin)) is None
    other = ("origin", "http://localhost:3001")
    assert refused(listed, host, other) == "origin_not_allowed"
    assert refused(AllowedHosts(origins=("*",)), host, other) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, AllowedHosts()),
        ({"host": "::1"}, AllowedHosts()),
        ({"allowed_hosts": "Quire.example"}, AllowedHosts(names=("quire.example",))),
        ({"allowed_hosts": "*"}, any_host),
        ({"host": "0.0.0.0", "allow_anonymous": True}, any_host),
        (
            {"host": "0.0.0.0", "allowed_hosts": "api, quire"},
            AllowedHosts(names=("api", "quire"), any_address=True),
        ),
        ({"cors_origins": "https://a.example"}, AllowedHosts(origins=("https://a.example",))),
    ],
)
def test_what_a_port_without_keys_checks(fields: dict[str, Any], expected: Any) -> None:
    found = keyless_hosts(Settings(**fields))
    assert found == expected


EVIL = {"host": "evil.example:8000", "origin": "http://evil.example:8000"}
LOCAL = {"host": "127.0.0.1:8000"}


async def test_both_ports_refuse_with_the_name_of_the_setting(start_service: Any) -> None:
    async with start_service(check_host=LOOPBACK) as service:
        admin = build_admin_app(
            service.app.state.health,
            version="0.0.1",
            render_metrics=lambda: b"x 1\n",
            check_host=LOOPBACK,
        )
        transport = httpx.ASGITransport(app=admin)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as metrics:
            for client, path in (
                (service.client, "/v1/models"), (service.client, "/"),
                (service.client, "/health/live"), (service.client, "/nowhere"),
                (metrics, "/metrics"), (metrics, "/health/ready"),
            ):  # fmt: skip
                answer = await client.get(path, headers=EVIL)
                assert answer.status_code == 403, path
                error = answer.json()["error"]
                assert error["code"] == "host_not_allowed"
                assert error["type"] == "invalid_request_error"
                assert "--allowed-hosts" in error["message"]
                assert "evil" not in answer.text
                assert answer.headers["x-request-id"]
                foreign = LOCAL | {"origin": "http://evil.example"}
                answer = await client.get(path, headers=foreign)
                assert answer.json()["error"]["code"] == "origin_not_allowed"
                assert "--cors-origins" in answer.json()["error"]["message"]
                assert (await client.get(path, headers=LOCAL)).status_code in {200, 404}
        refusal = await service.post("/v1/messages", B, host="evil.example")
        assert refusal.json()["error"]["type"] == "permission_error", "in Anthropic's shape"
        assert (await service.post("/v1/completions", B, **EVIL)).status_code == 403
        assert service.engine.seen == [], "nothing was admitted"


CALLER = {"origin": "https://app.example"}


async def test_cors_is_off_by_default(service: Any) -> None:
    answer = await service.client.get("/v1/models", headers=CALLER)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    ask = CALLER | {"access-control-request-method": "POST"}
    assert (await service.client.options("/v1/completions", headers=ask)).status_code == 405


async def test_pages_of_allowed_origins_can_call_and_resume(start_service: Any) -> None:
    """A preflight needs no key, answers and refusals can be read, and so can what resume needs."""
    keyed = only_with_key(lambda _secret: None)
    async with start_service(cors_origins=("https://app.example",), authenticate=keyed) as service:
        ask = CALLER | {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,last-event-id,x-quire-event-ids",
        }
        preflight = await service.client.options("/v1/completions", headers=ask)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        assert "last-event-id" in preflight.headers["access-control-allow-headers"]
        refusal = await service.client.get("/v1/models", headers=CALLER)
        assert refusal.status_code == 401
        assert refusal.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-credentials" not in refusal.headers
        exposed = refusal.headers["access-control-expose-headers"].split(", ")
        assert {"x-request-id", "retry-after", "x-ratelimit-remaining-tokens"} <= set(exposed)
        other = await service.client.get("/v1/models", headers={"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_every_rate_header_is_exposed() -> None:
    meter = Meter(limit=2, used=1.0)
    names = {name.decode() for name, _ in rate_headers(RateUsage(requests=meter, tokens=meter))}
    assert len(names) == 6
    assert names <= set(EXPOSED)


@pytest.mark.slow
async def test_a_stream_passes_the_middleware_event_by_event(
    start_service: Any, listen: Any, read_events: Any
) -> None:
    async with (
        start_service(cors_origins=("*",)) as service,
        listen(service.app) as url,
        httpx.AsyncClient(base_url=url, headers=CALLER, timeout=PATIENCE) as client,
    ):
        service.engine.pause = 0.02
        body = B | {"stream": True, "max_tokens": 12}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.headers["access-control-allow-origin"] == "*"
            parts = [part async for part in answer.aiter_raw()]
        assert len(parts) >= 5
        assert parts[-1].endswith(b"data: [DONE]\n\n")


def test_keys_make_the_check_needless() -> None:
    """A page of another site has no key; what names a deployment has is then its own affair."""
    settings = Settings(host="127.0.0.1", keys_file=Path("keys.toml"))
    assert keyless_hosts(settings) == LOOPBACK, "of the admin port, which never asks for keys"
