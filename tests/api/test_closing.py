"""A replica that ends before its answers do: what each open call gets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from service.http.drain import drain
from service.http.listeners import Listener, ServedProtocol
from service.http.ports import bind
from service.queues.contract import QueueLimits
from service.queues.memory.queue import MemoryQueue
from tests.support.waiting import PATIENCE

MESSAGES = [{"role": "user", "content": "hi"}]
DIALECTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny-model", "prompt": "hi", "max_tokens": 200},
    "/v1/chat/completions": {"model": "tiny-model", "messages": MESSAGES, "max_tokens": 200},
    "/v1/responses": {"model": "tiny-model", "input": "hi", "max_output_tokens": 200},
    "/v1/messages": {"model": "tiny-model", "messages": MESSAGES, "max_tokens": 200},
}
Events = Callable[[bytes], list[dict[str, Any]]]


class Shared(MemoryQueue):
    """A queue that another replica reads, too."""

    shared = True


async def begun(service: Any) -> Any:
    """Waits until the newest request has tokens."""
    while not service.engine.seen or not service.queue._entries[service.engine.seen[-1].id].count:
        await asyncio.sleep(0.001)
    return service.engine.seen[-1]


@pytest.mark.slow
@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("shared", [False, True])
async def test_each_open_call_gets_an_error(
    start_service: Any, read_events: Events, path: str, *, shared: bool
) -> None:
    queue = (Shared if shared else MemoryQueue)(QueueLimits(lease=10 * PATIENCE))
    async with (
        start_service(queue=queue) as service,
        start_service(queue=queue, running=False) as other,
    ):
        service.engine.pause = 0.004
        closing = service.app.state.context.closing
        for stream in (True, False):
            service.engine.seen.clear()
            body = DIALECTS[path] | {"stream": stream}
            call = asyncio.create_task(service.post(path, body))
            request = await begun(service)
            closing.set()
            reply = await call
            closing.clear()
            error = (read_events(reply.content)[-1] if stream else reply.json())["error"]
            assert reply.status_code == (200 if stream else 503)
            assert ("retry-after" in reply.headers) is not stream
            assert error["code"] == "shutting_down"
            call_id = request.id.removesuffix(".0")
            assert error.get("request_id") == (call_id if shared else None)
            if not shared:
                continue
            whole = await other.client.get(f"/v1/streams/{call_id}")
            assert whole.status_code == 200, "the answer went on"
            if stream:
                after = {"after": error["last_event_id"]}
                rest = await other.client.get(f"/v1/streams/{call_id}", params=after)
                assert whole.content.endswith(rest.content)
        assert not service.engine.fenced, "nothing was cancelled"
    reports = {report.outcome for report in service.observer.reports}
    assert reports == {"shutting_down"}


@pytest.mark.parametrize(
    "fields", [{"best_of": 2, "n": 1}, pytest.param({"store": False}, id="store")]
)
async def test_what_cannot_be_read_on_is_to_be_sent_again(
    start_service: Any, fields: dict[str, Any]
) -> None:
    path = "/v1/responses" if "store" in fields else "/v1/completions"
    async with start_service(queue=Shared(QueueLimits(lease=10 * PATIENCE))) as service:
        service.engine.pause = 0.004
        call = asyncio.create_task(service.post(path, DIALECTS[path] | fields))
        await begun(service)
        service.app.state.context.closing.set()
        error = (await call).json()["error"]
    assert error["code"] == "shutting_down"
    assert "request_id" not in error
    assert "send the request again" in error["message"]


async def test_an_event_on_its_way_is_sent_once(start_service: Any, read_events: Events) -> None:
    """The connection takes nothing while the replica closes; then all comes, in order."""
    async with start_service(queue=Shared(QueueLimits(lease=10 * PATIENCE))) as service:
        service.engine.pause = 0.002
        sent: list[bytes] = []
        blocked, free = asyncio.Event(), asyncio.Event()

        async def receive() -> Any:
            if sent:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if len(sent) == 6 and not free.is_set():
                blocked.set()
                await free.wait()
            sent.append(message.get("body", b""))

        body = (
            b'{"model": "tiny-model", "prompt": "hi", "max_tokens": 99, "stream": true, "seed": 1}'
        )
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"x-quire-event-ids", b"1")],
        }  # fmt: skip
        call = asyncio.create_task(service.app(scope, receive, send))
        await blocked.wait()
        service.app.state.context.closing.set()
        await asyncio.sleep(0.02)
        free.set()
        await call
        error = read_events(sent[-1])[-1]["error"]
        path = f"/v1/streams/{error['request_id']}"
        whole = await service.client.get(path)
        *events, last = b"".join(sent).split(b"\n\n")[:-1]
        got = b"\n\n".join(events) + b"\n\n"
        assert b"shutting_down" in last
        assert whole.content.startswith(got)
        assert events[-1].startswith(f"id: {error['last_event_id']}\n".encode())


async def test_a_cancelled_call_without_an_answer_gets_json(service: Any) -> None:
    """What the end of the process cuts off before it could answer: no plain text."""
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"9")],
    }  # fmt: skip
    call = asyncio.create_task(service.app(scope, receive, send))
    await asyncio.sleep(0.05)
    call.cancel()
    await call
    assert sent[0]["status"] == 503
    assert dict(sent[0]["headers"])[b"content-type"] == b"application/json"
    assert b"shutting_down" in sent[1]["body"]


@pytest.mark.slow
async def test_what_is_left_in_the_end_is_cut_off(
    start_service: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A reader that takes nothing is dropped; a request that never comes whole gets JSON."""
    monkeypatch.setattr("service.http.drain.CLOSE_TIMEOUT", 0.3)
    async with start_service(max_model_len=9000) as service:
        bound = bind("127.0.0.1", 0)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listener = Listener(service.app, bound, grace=None)
        serving = asyncio.create_task(listener.listen())
        await listener.answering.wait()
        deaf, slow = [await connect(bound.getsockname()) for _ in range(2)]
        body = b'{"model": "tiny-model", "prompt": "hi", "max_tokens": 8000, "stream": true}'
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\n"
        )
        deaf[1].write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        slow[1].write(head + b"content-length: %d\r\n\r\n" % len(body) + body[:9])
        connections = listener.server_state.connections
        while not any(isinstance(c, ServedProtocol) and c.flow.write_paused for c in connections):
            await asyncio.sleep(0.01)
        async with asyncio.timeout(PATIENCE):
            await drain(
                listener,
                serving,
                seconds=0.0,
                hurry=[],
                close_answers=service.app.state.context.closing.set,
            )
            await serving
            reply = await slow[0].read()
        assert reply.startswith(b"HTTP/1.1 503 ")
        assert b"shutting_down" in reply
        assert "Traceback" not in caplog.text
        for _, writer in (deaf, slow):
            writer.close()


async def connect(address: tuple[str, int]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that takes little at a time."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, address)
    return await asyncio.open_connection(sock=made, limit=1024)
