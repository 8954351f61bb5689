"""What the service itself cannot do now: limits, draining, deadlines, errors in mid-answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from starlette.types import Scope

from service.api.http.auth import Tenant
from service.errors import Unavailable
from service.messages import FinishReason, Tokens
from service.queues.contract import QueueLimits
from service.queues.memory.queue import MemoryQueue
from tests.support.waiting import PATIENCE, until

B = {"model": "tiny-model", "prompt": "hello", "max_tokens": 8, "seed": 3}


def check(reply: Any, status: int, kind: str, code: str) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert (error["type"], error["code"], error["param"]) == (kind, code, None)
    assert reply.headers["x-request-id"]
    return dict(error)


async def test_a_full_queue_says_when_to_come_again(start_service: Any) -> None:
    limits = QueueLimits(max_requests=2)
    async with start_service(queue_limits=limits, running=False) as service:
        service.state["speed"] = 10.0
        waiting = [asyncio.create_task(service.post("/v1/completions", B)) for _ in range(2)]
        while (depth := await service.queue.depth()).queued_requests < 2:
            await asyncio.sleep(0.002)
        queued = depth.queued_tokens
        reply = await service.post("/v1/completions", B | {"stream": True})
        check(reply, 503, "service_unavailable_error", "server_is_overloaded")
        wait_ms = int(reply.headers["retry-after-ms"])
        assert wait_ms == max(1000, min(60_000, queued / 10 * 1000))
        assert int(reply.headers["retry-after"]) == -(-wait_ms // 1000)
        for speed, seconds in ((0.0, 1), (1e-9, 60), (1e9, 1)):
            service.state["speed"] = speed
            reply = await service.post("/v1/completions", B)
            assert reply.headers["retry-after"] == str(seconds)
        assert service.observer.refusals == ["full"] * 4
        reply = await service.post("/v1/completions", B | {"n": 3})
        check(reply, 503, "service_unavailable_error", "server_is_overloaded")
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_tenant_over_its_limit(start_service: Any) -> None:
    async with start_service(queue_limits=QueueLimits(max_per_tenant=2)) as service:
        reply = await service.post("/v1/completions", B | {"n": 3})
        check(reply, 429, "rate_limit_error", "rate_limit_exceeded")
        assert int(reply.headers["retry-after"]) >= 1
        assert (await service.post("/v1/completions", B | {"n": 2})).status_code == 200


async def test_stored_bytes_are_bounded(start_service: Any) -> None:
    """92 answers that were kept, each with a field of 3.9 MB, filled the store for all tenants."""
    small = QueueLimits(max_tenant_bytes=4600, max_bytes=6000, resume_window=20.0)
    async with start_service(queue_limits=small, authenticate=by_header) as service:
        for tenant, statuses in (("a", [200, 200, 429]), ("b", [200, 503])):
            replies = [await service.post("/v1/completions", B, x_tenant=tenant) for _ in statuses]
            assert [reply.status_code for reply in replies] == statuses
            assert replies[-1].headers["retry-after"] == "20"
            message = replies[-1].json()["error"]["message"]
            expected = (
                "your stored requests may have at most 4600 bytes"
                if tenant == "a"
                else "stored requests may have at most 6000 bytes in total"
            )
            assert message == expected
        check(replies[-1], 503, "service_unavailable_error", "storage_full")
        assert service.observer.refusals == ["tenant_storage", "storage"]
        reply = await service.post("/v1/completions", B | {"n": 4}, x_tenant="c")
        check(reply, 429, "rate_limit_error", "rate_limit_exceeded")
        assert reply.headers["x-should-retry"] == "false", "it never fits"


def by_header(scope: Scope) -> Tenant:
    """The tenant that a test names."""
    return Tenant(name=dict(scope["headers"]).get(b"x-tenant", b"public").decode())


class AbsentQueue(MemoryQueue):
    """A queue whose store comes and goes."""

    away = False

    async def submit(self, submission: Any) -> Any:
        if self.away:
            raise Unavailable("the queue's store is away", code="backend_unavailable")
        return await super().submit(submission)

    async def check(self) -> None:
        if self.away:
            raise Unavailable("the queue's store is away", code="backend_unavailable")

    async def follow(self, request_id: str, *, after: int = 0) -> Any:
        async for record in super().follow(request_id, after=after):
            if self.away:
                raise Unavailable("the queue's store is away", code="backend_unavailable")
            yield record


@pytest.mark.slow
async def test_an_absent_queue(start_service: Any, small_limits: Any) -> None:
    queue = AbsentQueue(QueueLimits())
    async with start_service(
        queue=queue, limits=small_limits(backend_retry=0.01, backend_patience=1.5)
    ) as service:
        reference = (await service.post("/v1/completions", B)).json()["choices"]
        queue.away = True
        reply = await service.post("/v1/completions", B)
        check(reply, 503, "service_unavailable_error", "backend_unavailable")
        assert reply.headers["retry-after"] == "1"
        assert (await service.client.get("/health/live")).status_code == 200
        assert (await service.client.get("/health/ready")).status_code == 503
        assert (await service.client.get("/health")).json()["queue"] == "unreachable"
        queue.away = False
        service.engine.pause = 0.05
        for status in (200, 503):
            seen = len(service.engine.seen)
            call = asyncio.create_task(service.post("/v1/completions", B))
            await until(lambda seen=seen: len(service.engine.seen) > seen)  # type: ignore[misc]
            queue.away = True
            await asyncio.wait([call], timeout=0.1 if status == 200 else PATIENCE)
            queue.away = False
            reply = await call
            assert reply.status_code == status
            if status == 200:
                assert reply.json()["choices"] == reference, "it goes on where it was"


async def test_draining(service: Any) -> None:
    service.state["draining"] = True
    reply = await service.post("/v1/completions", B)
    check(reply, 503, "service_unavailable_error", "shutting_down")
    assert reply.headers["connection"] == "close"
    assert reply.headers["retry-after"] == "1"
    assert (await service.client.get("/health/ready")).status_code == 503
    assert (await service.client.get("/health/live")).status_code == 200


async def test_no_engine(service: Any) -> None:
    service.state["served"] = False
    reply = await service.post("/v1/completions", B)
    check(reply, 503, "service_unavailable_error", "backend_unavailable")
    assert reply.headers["retry-after"] == "1"
    assert not service.engine.seen


async def test_a_deadline_in_the_queue(start_service: Any, read_events: Any) -> None:
    async with start_service(running=False) as service:

        async def sweep() -> None:
            while True:
                await service.queue.sweep()
                await asyncio.sleep(0.01)

        sweeper = asyncio.create_task(sweep())
        for n in (1, 3):
            reply = await service.post("/v1/completions", B | {"n": n}, x_request_timeout_ms="20")
            check(reply, 504, "server_error", "deadline_exceeded")
            reply = await service.post(
                "/v1/completions", B | {"n": n, "stream": True}, x_request_timeout_ms="20"
            )
            assert reply.status_code == 200, "it was admitted"
            assert read_events(reply.content)[-1]["error"]["code"] == "deadline_exceeded"
            assert b"[DONE]" not in reply.content
        sweeper.cancel()
        assert (await service.queue.depth()).queued_requests == 0


async def test_a_deadline_in_mid_answer_gives_what_there_is(service: Any) -> None:
    service.engine.end = FinishReason.DEADLINE
    reply = await service.post("/v1/completions", B)
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["finish_reason"] == "deadline"
    assert reply.json()["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    ("error", "retry"),
    [("engine_crash_loop", "false"), ("grammar_failed", "false"), ("storage_full", None)],
)
async def test_an_error_of_the_engine(
    service: Any, read_events: Any, error: str, retry: str | None
) -> None:
    service.engine.end, service.engine.error = FinishReason.ERROR, error
    reply = await service.post("/v1/completions", B)
    check(reply, 500, "server_error", error)
    assert reply.headers.get("x-should-retry") == retry
    reply = await service.post("/v1/completions", B | {"stream": True})
    assert reply.status_code == 200
    events = read_events(reply.content)
    assert events[-1]["error"]["code"] == error
    assert len(events) > 1
    assert b"[DONE]" not in reply.content
    assert {report.outcome for report in service.observer.reports} == {error}


async def test_one_failed_choice_ends_the_others(service: Any) -> None:
    service.engine.pause = 0.01
    records = service.engine.records

    def failing(request: Any) -> Any:
        if request.sampling.choice == 1:
            service.engine.end = FinishReason.ERROR
            return iter([*records(request)][-1:])
        return records(request)

    service.engine.script = lambda request: [] if request.sampling.choice == 1 else [5] * 200
    service.engine.records = failing
    reply = await service.post("/v1/completions", B | {"n": 3, "max_tokens": 200})
    check(reply, 500, "server_error", "generation_failed")
    await until(lambda: len(service.engine.fenced) == 2)
    assert (await service.queue.depth()).running_requests == 0


async def test_a_journal_that_differs_is_not_shown(service: Any, read_events: Any) -> None:
    service.engine.bad_digest_at = 4
    reply = await service.post("/v1/completions", B | {"stream": True, "return_token_ids": True})
    events = read_events(reply.content)
    shown = sum(len(c.get("token_ids", [])) for e in events[:-1] for c in e["choices"])
    assert shown <= 4
    assert events[-1]["error"]["code"] == "stream_divergence"
    assert b"[DONE]" not in reply.content
    assert (await service.post("/v1/completions", B)).status_code == 409


async def test_an_unexpected_fault_is_json_too(service: Any) -> None:
    def explode(_text: str, *, add_bos: bool) -> list[int]:
        raise ZeroDivisionError("secret")

    service.client._transport.raise_app_exceptions = False
    service.tokenizer.encode, encode = explode, service.tokenizer.encode
    try:
        reply = await service.post("/v1/completions", B)
    finally:
        service.tokenizer.encode = encode
    check(reply, 500, "server_error", "internal_error")
    assert "secret" not in reply.text
    assert (await service.post("/v1/completions", B)).status_code == 200


class RecutQueue(MemoryQueue):
    """Followers see records that overlap, as after a loss of the journal's tail."""

    async def follow(self, request_id: str, *, after: int = 0) -> Any:
        previous: Any = None
        async for record in super().follow(request_id, after=after):
            if isinstance(record, Tokens) and previous is not None:
                yield replace(
                    record,
                    start=previous.start,
                    ids=previous.ids + record.ids,
                    text=previous.text + record.text,
                    logprobs=previous.logprobs + record.logprobs,
                )
            else:
                yield record
            previous = record


async def test_a_journal_cut_in_other_places_goes_on(start_service: Any) -> None:
    body = B | {"max_tokens": 30, "logprobs": 1, "return_token_ids": True}
    async with start_service() as service:
        reference = (await service.post("/v1/completions", body)).json()["choices"]
    async with start_service(queue=RecutQueue(QueueLimits(lease=10 * PATIENCE))) as service:
        assert (await service.post("/v1/completions", body)).json()["choices"] == reference
