"""Resuming and cancelling: who may, from where, and what a reader gets that may not."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Scope

from service.api.http.auth import Tenant
from service.api.http.call import call_age, new_call_id
from service.queues.contract import QueueLimits
from tests.support.waiting import until

B = {"model": "tiny-model", "prompt": "hello", "max_tokens": 8, "seed": 3}


async def finished(service: Any, **fields: Any) -> str:
    reply = await service.post("/v1/completions", B | fields)
    assert reply.status_code == 200
    return str(reply.headers["x-request-id"])


def error_of(reply: Any) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def by_header(scope: Scope) -> Tenant:
    """A tenant for each value of x-tenant."""
    return Tenant(name=dict(scope["headers"]).get(b"x-tenant", b"public").decode())


async def test_unknown_malformed_and_foreign_ids_look_alike(start_service: Any) -> None:
    async with start_service(authenticate=by_header) as service:
        call_id = await finished(service)
        assert (await service.client.get(f"/v1/streams/{call_id}")).status_code == 200
        bodies = set()
        for name in (new_call_id(), "x", "s0-" + "0" * 32, "a" * 5000, call_id):
            for method in ("GET", "DELETE"):
                reply = await service.client.request(
                    method, f"/v1/streams/{name}", headers={"x-tenant": "other"}
                )
                assert error_of(reply) == (404, "stream_not_found")
                bodies.add(reply.text)
        assert len(bodies) == 1


async def test_bad_event_ids(service: Any) -> None:
    call_id = await finished(service)
    reply = await service.client.get(f"/v1/streams/{call_id}")
    last = [line for line in reply.text.split("\n") if line.startswith("id: ")][-1][4:]
    assert last.startswith("8.")
    digest = last[2:]
    other = f"{int(digest, 16) ^ 1:06x}"
    for event_id, status, code in [
        ("abc", 400, "invalid_event_id"),
        ("-1", 400, "invalid_event_id"),
        ("8", 400, "invalid_event_id"),
        (f"9.{digest}", 409, "stream_divergence"),
        (f"08.{digest}", 400, "invalid_event_id"),
        (f"999999999999.{digest}", 400, "invalid_event_id"),
        (f"{last},{last}", 400, "invalid_event_id"),
        ("8." + digest * 2000, 400, "invalid_event_id"),
        (f"8.{other}", 409, "stream_divergence"),
        ("0.000001", 409, "stream_divergence"),
    ]:
        for reply in (
            await service.client.get(f"/v1/streams/{call_id}", headers={"Last-Event-ID": event_id}),
            await service.client.get(f"/v1/streams/{call_id}", params={"after": event_id}),
        ):
            assert error_of(reply) == (status, code), event_id
            assert reply.json()["error"]["param"] == "last-event-id"


async def test_after_the_window_a_stream_is_gone(start_service: Any, small_limits: Any) -> None:
    async with start_service(
        limits=small_limits(resume_window=0.05), queue_limits=QueueLimits(resume_window=0.05)
    ) as service:
        call_id = await finished(service)
        await asyncio.sleep(0.1)
        assert error_of(await service.client.get(f"/v1/streams/{call_id}")) == (
            410,
            "stream_expired",
        )
        assert error_of(await service.client.get(f"/v1/streams/{new_call_id()}")) == (
            404,
            "stream_not_found",
        )


async def test_a_body_can_be_read_again_as_a_stream(service: Any, read_events: Any) -> None:
    reply = await service.post("/v1/completions", B)
    again = await service.client.get(f"/v1/streams/{reply.headers['x-request-id']}")
    text = "".join(c["text"] for e in read_events(again.content) for c in e["choices"])
    assert text == reply.json()["choices"][0]["text"]


async def test_best_of_cannot_be_resumed(service: Any) -> None:
    call_id = await finished(service, best_of=3)
    reply = await service.client.get(f"/v1/streams/{call_id}")
    assert error_of(reply) == (400, "unsupported_parameter")


async def test_cancel_ends_the_stream_honestly(service: Any, read_events: Any) -> None:
    service.engine.pause = 0.01
    for stream in (False, True):
        body = B | {"max_tokens": 200, "stream": stream}
        call = asyncio.create_task(service.post("/v1/completions", body))
        seen = len(service.engine.seen)
        while len(service.engine.seen) == seen:
            await asyncio.sleep(0.005)
        call_id = service.engine.seen[-1].id.removesuffix(".0")
        await asyncio.sleep(0.03)
        deleted = await service.client.delete(f"/v1/streams/{call_id}")
        assert deleted.json() == {"id": call_id, "object": "stream", "cancelled": True}
        reply = await call
        last = read_events(reply.content)[-1] if stream else reply.json()
        assert last["choices"][0]["finish_reason"] == "cancelled"
        if stream:
            assert reply.content.endswith(b"data: [DONE]\n\n")
    await until(lambda: len(service.engine.fenced) == len(service.engine.seen))
    assert sorted(service.engine.fenced) == sorted(r.id for r in service.engine.seen)


async def test_two_readers_get_the_same_bytes(service: Any) -> None:
    service.engine.pause = 0.005
    call = asyncio.create_task(
        service.post("/v1/completions", B | {"stream": True}, x_quire_event_ids="1")
    )
    while not service.engine.seen:
        await asyncio.sleep(0.001)
    path = f"/v1/streams/{service.engine.seen[0].id.removesuffix('.0')}"
    first, second = await asyncio.gather(service.client.get(path), service.client.get(path))
    assert first.content == second.content == (await call).content


def test_call_ids_are_in_order_and_have_an_age() -> None:
    ids = [new_call_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert [i[:15] for i in ids] == sorted(i[:15] for i in ids)
    age = call_age(ids[0])
    assert age is not None
    assert 0 <= age < 60
    assert call_age("s0-xyz") is None
