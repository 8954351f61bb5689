"""Over real sockets: readers that leave, that come back, that read slowly, that send too much."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

import httpx
import pytest

from service.queues.contract import QueueLimits
from tests.support.stepped import STEP, SteppedQueue
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.slow

B = {"model": "tiny-model", "prompt": "hello", "max_tokens": 200, "seed": 3}


def address(url: str) -> tuple[str, int]:
    parsed = httpx.URL(url)
    assert parsed.port
    return parsed.host, parsed.port


async def open_call(
    url: str, body: dict[str, Any], **headers: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends a request on a connection of its own, with small buffers on this side."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
    connection.connect(address(url))
    reader, writer = await asyncio.open_connection(sock=connection, limit=2**12)
    data = json.dumps(body).encode()
    lines = [
        "POST /v1/completions HTTP/1.1",
        "Host: test",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("pause", [0.005, 30.0])
async def test_a_reader_that_leaves_ends_the_work(
    service: Any, listen: Any, *, stream: bool, pause: float
) -> None:
    """Also between tokens: with the long pause none is sent after the client has left."""
    service.engine.pause = pause
    async with listen(service.app) as url:
        _reader, writer = await open_call(url, B | {"stream": stream, "n": 2})
        await until(lambda: len(service.engine.seen) == 2)
        await asyncio.sleep(0.02)
        writer.close()
        await until(lambda: not service.queue._running)
        for request in service.engine.seen:
            (*_, end) = await service.queue.read(request.id)
            assert end.reason == "cancelled"
        assert [report.outcome for report in service.observer.reports] == ["left"]


async def test_continue_goes_on_without_a_reader(service: Any, listen: Any) -> None:
    async with listen(service.app) as url:
        service.engine.pause = 0.001
        body = B | {"stream": True, "on_disconnect": "continue", "max_tokens": 50}
        _reader, writer = await open_call(url, body)
        await until(lambda: len(service.engine.seen) == 1)
        writer.close()
        await until(lambda: bool(service.observer.reports))
        request = service.engine.seen[0]
        await until(lambda: not service.queue._running)
        (*_, end) = await service.queue.read(request.id)
        assert (end.reason, end.count) == ("length", 50)


async def test_a_resumable_stream_waits_for_its_reader(
    start_service: Any, small_limits: Any, listen: Any
) -> None:
    async with (
        start_service(
            limits=small_limits(grace=0.8, sweep_interval=0.03),
            queue=SteppedQueue(QueueLimits(lease=1e3)),
        ) as service,
        listen(service.app) as url,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client,
    ):
        service.engine.pause = STEP
        ids = {"x_quire_event_ids": "1"}
        _reader, writer = await open_call(url, B | {"stream": True, "max_tokens": 60}, **ids)
        await until(lambda: len(service.engine.seen) == 1)
        call_id = service.engine.seen[0].id.removesuffix(".0")
        writer.close()
        await until(lambda: len(service.observer.reports) == 1)
        # Longer than the grace, with a reader: it must not end before its time.
        resumed = await client.get(f"/v1/streams/{call_id}")
        assert b'"finish_reason":"length"' in resumed.content
        _reader, writer = await open_call(url, B | {"stream": True}, **ids)
        await until(lambda: len(service.engine.seen) == 2)
        writer.close()
        await until(lambda: len(service.observer.reports) == 3)
        assert service.queue._running, "the grace has begun"
        await until(lambda: not service.queue._running)
        (*_, end) = await service.queue.read(service.engine.seen[1].id)
        assert end.reason == "cancelled"
        assert not service.app.state.context.readers.ids


async def test_silence_is_kept_alive_with_a_comment_of_one_line(
    start_service: Any, small_limits: Any, listen: Any
) -> None:
    async with (
        start_service(limits=small_limits(keep_alive=0.05)) as service,
        listen(service.app) as url,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client,
    ):
        service.engine.pause = 0.5
        for _ in range(5):  # a process that stands still sends no comments
            reply = await client.post("/v1/completions", json=B | {"stream": True, "max_tokens": 2})
            if reply.content.count(b": ping\n") >= 3:
                break
        assert reply.content.count(b": ping\n") >= 3
        assert b": ping\n\n" not in reply.content
        assert reply.content.endswith(b"data: [DONE]\n\n")


async def test_a_stalled_reader_costs_no_memory_and_is_dropped(
    start_service: Any, small_limits: Any, listen: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The journal is read as far as the sockets' buffers hold, not to its end; then the server ends
    the connection, which the reader sees when it reads on: the body is cut off.
    """
    limits = small_limits(stall_timeout=0.3)
    async with (
        start_service(limits=limits, max_model_len=200_000) as service,
        listen(service.app, send_buffer=2**16) as url,
    ):
        service.engine.script = lambda request: [5] * request.max_tokens
        body = B | {"stream": True, "max_tokens": 8000, "on_disconnect": "continue"}
        reader, writer = await open_call(url, body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await until(lambda: bool(service.observer.reports))
        (report,) = service.observer.reports
        assert report.outcome == "left"
        assert 0 < report.completion_tokens < 6000
        assert not writer.transport.is_closing(), "the reader did not leave"
        rest = bytearray()
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(PATIENCE):
                while part := await reader.read(2**16):
                    rest += part
        assert rest
        assert not rest.endswith(b"0\r\n\r\n")
        writer.close()
    assert [r.getMessage() for r in caplog.records if r.levelname in {"WARNING", "ERROR"}] == []


@pytest.mark.parametrize("framing", ["chunked", "length"])
async def test_a_body_without_end_is_cut_off(
    start_service: Any, small_limits: Any, listen: Any, framing: str
) -> None:
    async with (
        start_service(limits=small_limits(max_body_bytes=10_000)) as service,
        listen(service.app) as url,
    ):
        reader, writer = await asyncio.open_connection(*address(url))
        header = {"chunked": "Transfer-Encoding: chunked", "length": "Content-Length: 100000000"}
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + header[framing].encode()
            + b"\r\n\r\n"
        )
        if framing == "chunked":
            for _ in range(11):
                writer.write(b"3e8\r\n" + b" " * 1000 + b"\r\n")
        reply = await asyncio.wait_for(reader.read(), PATIENCE)  # to the end: the server closes
        assert reply.startswith(b"HTTP/1.1 413")
        assert b"request_too_large" in reply
        writer.close()


async def test_a_body_that_drips_is_refused(
    start_service: Any, small_limits: Any, listen: Any
) -> None:
    async with (
        start_service(limits=small_limits(body_timeout=0.1)) as service,
        listen(service.app) as url,
    ):
        reader, writer = await asyncio.open_connection(*address(url))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert (await asyncio.wait_for(reader.readline(), PATIENCE)).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_long_prompts_do_not_hold_up_the_others(service: Any, listen: Any) -> None:
    """While a megabyte is tokenised, the event loop goes round as ever. One quiet moment of the
    machine is enough to see it: a loop that is held up is held up each time.
    """
    worst, took = 0.0, 0.0

    async def watch() -> None:
        nonlocal worst
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(0.001)
            worst = max(worst, loop.time() - before)

    for _ in range(5):
        worst = 0.0
        watcher = asyncio.create_task(watch())
        began = asyncio.get_running_loop().time()
        reply = await service.post("/v1/completions", B | {"prompt": "a" * 1_000_000})
        took = asyncio.get_running_loop().time() - began
        watcher.cancel()
        assert reply.json()["error"]["code"] == "context_length_exceeded"
        if worst < max(0.05, took / 2):
            break
    assert worst < max(0.05, took / 2)
