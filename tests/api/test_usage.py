"""Usage: its sums are those of the request log, whatever was repeated, resumed or refused."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from service.api.http.auth import Tenant
from service.api.http.observer import CallReport
from service.app import build_admin_app
from service.messages import Allowance
from service.observability.metrics import MAX_TENANTS, OTHER_TENANTS, Metrics
from tests.api.conftest import MODEL

Json = dict[str, Any]


def authenticate(scope: Any) -> Tenant:
    """The header `x-api-key` is `<tenant>/<key>`."""
    tenant, _, key = dict(scope["headers"]).get(b"x-api-key", b"t/k").decode().partition("/")
    return Tenant(name=tenant, allowance=Allowance(key=key))


def body(draw: random.Random) -> tuple[str, Json]:
    common = {"model": MODEL, "seed": draw.randrange(99), "stream": draw.random() < 0.5}
    size = draw.randint(1, 9)
    if draw.random() < 0.5:
        messages = [{"role": "user", "content": "hello " * size}]
        n = draw.randint(1, 3)
        return "/v1/chat/completions", common | {"messages": messages, "max_tokens": size, "n": n}
    prompts = ["hello " * draw.randint(1, 5) for _ in range(draw.randint(1, 3))]
    best = {} if common["stream"] else {"n": 1, "best_of": draw.randint(1, 2)}
    return "/v1/completions", common | {"prompt": prompts, "max_tokens": size} | best


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_sums_are_those_of_the_log(start_service: Any, seed: int) -> None:
    draw = random.Random(seed)
    async with start_service(authenticate=authenticate) as service:
        for number in range(25):
            path, sent = body(draw)
            key = draw.choice(["t/a", "t/b", "u/c"])
            headers = {"x_api_key": key, "idempotency_key": f"{number}"}
            for _ in range(draw.randint(1, 2)):  # again: the same answer
                reply = await service.post(path, sent, **headers)
                assert reply.status_code == 200, reply.text
            refused = await service.post(path, sent | {"temperature": -1}, x_api_key=key)
            assert refused.status_code == 400
        reports = [each for each in service.observer.reports if not each.repeats]
        assert len(reports) == 25 < len(service.observer.reports)
        for tenant, key in (("t", "a"), ("t", "b"), ("u", "c")):
            reply = await service.client.get("/v1/usage", headers={"x-api-key": f"{tenant}/{key}"})
            rows = reply.json()["data"]
            assert {(row["tenant"], row["key"], row["model"]) for row in rows} <= {
                (tenant, key, MODEL)
            }
        everything = await all_rows(service)
        for tenant in ("t", "u"):
            own = [row for row in everything if row["tenant"] == tenant]
            logged = [each for each in reports if each.tenant == tenant]
            assert total(own, "prompt_tokens") == sum(each.prompt_tokens for each in logged)
            assert total(own, "cached_tokens") == sum(each.cached_tokens for each in logged)
            assert total(own, "generated_tokens") == sum(each.completion_tokens for each in logged)
        assert total(everything, "requests") == len(service.engine.seen)


async def all_rows(service: Any) -> list[Json]:
    """What the admin port returns."""
    admin = build_admin_app(service.app.state.health, version="1", render_metrics=bytes)
    transport = httpx.ASGITransport(app=admin)
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
        return list((await client.get("/v1/usage")).json()["data"])


def total(rows: list[Json], name: str) -> int:
    return sum(row[name] for row in rows)


async def test_days(service: Any) -> None:
    sent = {"model": MODEL, "prompt": "hello", "max_tokens": 3}
    before = datetime.now(UTC).date()
    assert (await service.post("/v1/completions", sent)).status_code == 200
    whole = (await service.client.get("/v1/usage")).json()
    assert [(row["tenant"], row["key"], row["generated_tokens"]) for row in whole["data"]] == [
        ("public", None, 3)
    ]
    assert whole["data"][0]["date"] >= before.isoformat()
    past = before - timedelta(days=1)
    empty = await service.client.get(f"/v1/usage?start_date={past}&end_date={past}")
    assert empty.json() == {
        "object": "list", "start_date": f"{past}", "end_date": f"{past}", "data": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    "query",
    [
        "start_date=yesterday",
        "end_date=0001-01-01",
        "start_date=2026-02-02&end_date=2026-02-01",
        "start_date=2020-01-01&end_date=2026-01-01",
    ],
)
async def test_bad_days_are_refused(service: Any, query: str) -> None:
    reply = await service.client.get(f"/v1/usage?{query}")
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] in {"start_date", "end_date"}


def test_series_by_tenant_are_few() -> None:
    metrics = Metrics()
    for number in range(2 * MAX_TENANTS):
        for repeats in (False, True):
            metrics.call_ended(
                CallReport(
                    id="s", tenant=f"t{number}", model=MODEL, endpoint="chat", outcome="stop",
                    streamed=False, prompt_tokens=4, completion_tokens=5, cached_tokens=1,
                    repeats=repeats, to_first_token=None, duration=1.0,
                )
            )  # fmt: skip
    read = metrics.registry.get_sample_value
    for tenant, calls in (("t0", 1), (f"t{MAX_TENANTS - 1}", 1), (OTHER_TENANTS, MAX_TENANTS)):
        for kind, tokens in (("prompt", 4), ("cached", 1), ("generated", 5)):
            labels = {"tenant": tenant, "kind": kind}
            assert read("quire_tenant_tokens_total", labels) == calls * tokens
    assert (
        read("quire_tenant_tokens_total", {"tenant": f"t{MAX_TENANTS}", "kind": "cached"}) is None
    )
