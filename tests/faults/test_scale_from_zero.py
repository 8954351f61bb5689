"""No engine runs: with `accept_without_engines` requests wait for the first one, otherwise they are
rejected. Both with real processes and one Redis.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.bench.sse import call
from tests.cluster.processes import ForkServer, Replica, run_command
from tests.cluster.redis_process import RedisServer
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.faults

BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": [7, 3, 5],
    "max_tokens": 12,
    "temperature": 0.0,
    "seed": 5,
    "ignore_eos": True,
    "return_token_ids": True,
}
KEEP_ALIVE = 0.4


@pytest.fixture
def start(
    fork_server: ForkServer, folder_of_model: Path, own_redis_url: str, tmp_path: Path
) -> Iterator[Callable[..., Replica]]:
    """`start("api", *flags)` or `start("engine")`; all are ended after the test."""
    made: list[Replica] = []

    def start(role: str, *flags: str) -> Replica:
        log = tmp_path / f"{role}-{len(made)}.log"
        if role == "engine":
            settings = {"queue": own_redis_url, "model": str(folder_of_model), "model_name": "tiny"}
            arguments = {"hooks": str(tmp_path), "pace": 0.001, "blocks": 256}
            made.append(
                fork_server.engine(
                    log, arguments | {"settings": settings, "numeric_class": "oracle"}
                )
            )
        else:
            named = {"queue": own_redis_url, "model": folder_of_model, "port": 0, "admin-port": 0}
            named |= {"keep-alive": KEEP_ALIVE, "model-name": "tiny"}
            pairs = [text for name, value in named.items() for text in (f"--{name}", str(value))]
            made.append(run_command(role, log, *pairs, *flags))
        return made[-1]

    yield start
    for replica in made:
        replica.close()


@pytest.fixture
def own_redis_url(tmp_path: Path) -> Iterator[str]:
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server.url
    server.close()


async def is_ready(api: Replica) -> bool:
    async with call(api.address("metrics"), "GET", "/health/ready") as reply:
        return reply.status == 200


async def asked(api: Replica) -> tuple[int, float, dict[str, str]]:
    """Status, seconds and headers of a request that is then dropped."""
    began = time.monotonic()
    body = BODY | {"stream": True}  # its headers come at once
    async with call(api.address("API"), "POST", "/v1/completions", body=body) as reply:
        return reply.status, time.monotonic() - began, reply.headers


async def until_comments(pieces: AsyncIterator[bytes], number: int) -> bytes:
    """Reads a stream up to this number of keep-alive comments."""
    read = b""
    async for piece in pieces:
        read += piece
        if read.count(b": ping\n") >= number:
            return read
    raise AssertionError(f"the stream ended: {read!r}")


def tokens_of(stream: bytes) -> list[int]:
    lines = [line[6:] for line in stream.split(b"\n") if line.startswith(b"data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return [token for choice in choices for token in choice.get("token_ids") or []]


async def test_calls_wait_for_the_first_engine_where_they_may(
    start: Callable[..., Replica], fork_server: ForkServer
) -> None:
    patient, strict = start("api", "--accept-without-engines"), start("api")
    for api in (patient, strict):
        await asyncio.to_thread(api.wait_until_ready)
    async with asyncio.timeout(PATIENCE):
        while (answer := await asked(strict))[0] != 503:  # a restart of engines is shorter
            await asyncio.sleep(0.2)
    status, seconds, headers = await asked(strict)
    assert (status, seconds < 0.5) == (503, True), answer
    assert int(headers["retry-after"]) >= 1
    assert strict.metric("quire_calls_unserved_total") >= 2
    assert strict.metric("quire_accepts_without_engines") == 0

    opening = call(patient.address("API"), "POST", "/v1/completions", body=BODY | {"stream": True})
    async with opening as reply:
        assert reply.status == 200
        pieces = reply.pieces()
        read = await until_comments(pieces, 10)
        assert b"data:" not in read
        assert await is_ready(patient)
        assert await is_ready(strict)
        figure = patient.metric
        assert figure("quire_queue_requests") >= 1, "what calls for an engine"
        assert figure("quire_queue_oldest_seconds") > KEEP_ALIVE
        assert (figure("quire_engines"), figure("quire_queue_reachable")) == (0, 1)
        assert figure("quire_accepts_without_engines") == 1
        engine = start("engine")
        await asyncio.to_thread(engine.wait_until_ready)
        read += b"".join([piece async for piece in pieces])
    assert read.endswith(b"data: [DONE]\n\n")
    assert tokens_of(read) == fork_server.expected(BODY)
    assert engine.metric("quire_queue_wait_seconds_sum") > KEEP_ALIVE
    async with asyncio.timeout(PATIENCE):
        while (await asked(strict))[0] != 200:
            await asyncio.sleep(0.2)
    assert patient.metric("quire_calls_unserved_total") == 0
