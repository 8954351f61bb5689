"""Idempotency-Key: one generation, however often it is asked for."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Scope

from service.api.http.auth import Tenant
from service.queues.contract import slot_of

B = {"model": "tiny-model", "prompt": "hello", "max_tokens": 8}


async def test_ten_at_once_are_one_generation(service: Any) -> None:
    service.engine.pause = 0.005
    replies = await asyncio.gather(
        *(service.post("/v1/completions", B, idempotency_key="k1") for _ in range(10))
    )
    assert len(service.engine.seen) == 1
    assert len({reply.content for reply in replies}) == 1
    (call_id,) = {reply.headers["x-request-id"] for reply in replies}
    assert service.engine.seen[0].id == f"{call_id}.0"
    late = await service.post("/v1/completions", B, idempotency_key="k1")
    assert late.content == replies[0].content
    assert len(service.engine.seen) == 1


async def test_streams_too(service: Any) -> None:
    body = B | {"stream": True, "n": 1}
    first = await service.post("/v1/completions", body, idempotency_key="k1")
    reordered = dict(reversed(body.items()))
    second = await service.post("/v1/completions", reordered, idempotency_key="k1")
    assert first.content == second.content


async def test_an_id_has_the_slot_of_its_key(service: Any) -> None:
    """Of the key as it is: one in lower case may be another client's."""
    for key in ("Key", "key"):
        reply = await service.post("/v1/completions", B, idempotency_key=key)
        assert int(reply.headers["x-request-id"][-4:], 16) == slot_of(key)


async def test_another_body_or_endpoint_conflicts(service: Any) -> None:
    await service.post("/v1/completions", B, idempotency_key="k1")
    chat = {"model": "tiny-model", "messages": [{"role": "user", "content": "x"}]}
    for path, body in (
        ("/v1/completions", B | {"max_tokens": 9}),
        ("/v1/completions", B | {"stream": True}),
        ("/v1/chat/completions", chat),
    ):
        reply = await service.post(path, body, idempotency_key="k1")
        assert reply.status_code == 409
        assert reply.json()["error"]["code"] == "idempotency_key_conflict"
        assert reply.headers["x-should-retry"] == "false"
    assert (await service.post("/v1/completions", B, idempotency_key="k2")).status_code == 200


async def test_another_tenant_s_key_is_another_key(start_service: Any) -> None:
    def by_header(scope: Scope) -> Tenant:
        return Tenant(name=dict(scope["headers"]).get(b"x-tenant", b"public").decode())

    async with start_service(authenticate=by_header) as service:
        for tenant in ("a", "b"):
            reply = await service.post("/v1/completions", B, idempotency_key="k1", x_tenant=tenant)
            assert reply.status_code == 200
        assert {request.tenant for request in service.engine.seen} == {"a", "b"}
