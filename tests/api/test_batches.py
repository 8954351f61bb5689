"""Batches over a real queue and a scripted engine: every line is answered once, as online."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from fsspec import register_implementation
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from service.api.http.auth import Tenant
from service.batches import runner
from service.batches.batches import PART_LINES
from service.batches.files import FileLimits
from service.batches.jobs import JobLimits
from service.batches.storage import Storage, Tree
from service.errors import BadRequest, Unavailable
from service.messages import FinishReason
from service.queues.contract import QueueLimits
from service.queues.memory.queue import MemoryQueue
from tests.support.waiting import PATIENCE, until

Json = dict[str, Any]
MODEL = "tiny-model"
FAST = 0.2
"""Seconds: the lease of the queue, and so the pause between two looks."""


def line(number: int, *, url: str = "/v1/completions", **body: Any) -> Json:
    default = {"model": MODEL, "prompt": f"hello {number}", "max_tokens": 3, "seed": number}
    return {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": default | body}


def jsonl(lines: Sequence[Any]) -> bytes:
    texts = (each if isinstance(each, str) else json.dumps(each) for each in lines)
    return "\n".join(texts).encode()


@asynccontextmanager
async def running(start_service: Any, folder: Path, **options: Any) -> AsyncIterator[Any]:
    """A replica whose runner runs, too."""
    options.setdefault("jobs", JobLimits(url=str(folder), window=8))
    options.setdefault("queue", MemoryQueue(QueueLimits(lease=10 * PATIENCE)))
    async with start_service(**options) as service:
        context = service.app.router.lifespan_context(service.app)
        async with context:
            yield service


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MAX_PAUSE", 0.02)
    monkeypatch.setattr(runner, "MAX_INTERVAL", FAST)


async def upload(service: Any, content: bytes, name: str = "in.jsonl") -> str:
    reply = await service.client.post(
        "/v1/files", files={"file": (name, content)}, data={"purpose": "batch"}
    )
    assert reply.status_code == 200, reply.text
    return str(reply.json()["id"])


async def create(service: Any, file_id: str, **fields: Any) -> Json:
    body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    reply = await service.post("/v1/batches", body | fields)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def ended(service: Any, batch_id: str) -> Json:
    """Waits until a batch has a final state."""
    found: Json = {}

    async def look() -> bool:
        found.update((await service.client.get(f"/v1/batches/{batch_id}")).json())
        return found["status"] in {"completed", "failed", "expired", "cancelled"}

    async with asyncio.timeout(PATIENCE):
        while not await look():
            await asyncio.sleep(0.01)
    return found


async def content(service: Any, file_id: str | None) -> list[Json]:
    if file_id is None:
        return []
    reply = await service.client.get(f"/v1/files/{file_id}/content")
    assert reply.status_code == 200
    return [json.loads(each) for each in reply.text.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("num_lines", [1, PART_LINES, 2 * PART_LINES + 3])
async def test_each_line_has_the_answer_that_it_has_online(
    start_service: Any, tmp_path: Path, num_lines: int
) -> None:
    async with running(start_service, tmp_path) as service:
        lines = [line(number) for number in range(num_lines)]
        batch = await create(service, await upload(service, jsonl(lines)), metadata={"a": "b"})
        assert (batch["object"], batch["metadata"]) == ("batch", {"a": "b"})
        found = await ended(service, batch["id"])
        assert found["status"] == "completed", found
        counts = {"total": num_lines, "completed": num_lines, "failed": 0}
        assert found["request_counts"] == counts
        assert found["error_file_id"] is None
        rows = await content(service, found["output_file_id"])
        assert [row["custom_id"] for row in rows] == [each["custom_id"] for each in lines]
        assert len({row["id"] for row in rows}) == num_lines
        for row, each in zip(rows, lines, strict=True):
            online = (await service.post("/v1/completions", each["body"])).json()
            assert (row["error"], row["response"]["status_code"]) == (None, 200)
            assert row["response"]["body"]["choices"] == online["choices"]
        assert {request.priority for request in service.engine.seen[:num_lines]} == {2}
        assert len(service.engine.seen) == 2 * num_lines  # each line once, and once online


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 3, "temperature": 0}),
        (
            "/v1/decisions",
            {"input": "hi", "questions": [{"type": "predicate", "instructions": "It is."}]},
        ),
    ],
)
async def test_lines_of_other_endpoints(
    start_service: Any, tmp_path: Path, url: str, body: Json
) -> None:
    async with running(start_service, tmp_path) as service:
        generated = service.engine.script
        service.engine.script = lambda request: (
            [each[-1] for each in request.scored] or generated(request)
        )
        each = {"custom_id": "x", "method": "POST", "url": url, "body": {"model": MODEL} | body}
        file_id = await upload(service, jsonl([each]))
        found = await ended(service, (await create(service, file_id, endpoint=url))["id"])
        (row,) = await content(service, found["output_file_id"])
        assert row["response"]["status_code"] == 200
        found = row["response"]["body"]
        assert "answers" in found or found["object"] in {"chat.completion", "response"}


async def test_lines_that_fail_are_in_the_error_file(start_service: Any, tmp_path: Path) -> None:
    async with running(start_service, tmp_path) as service:
        lines = [
            line(0),
            line(1, temperature=-1),
            line(2, model="other"),
            line(3, stream=True),
            line(4, max_tokens=9999),
            line(5),
        ]
        found = await ended(
            service, (await create(service, await upload(service, jsonl(lines))))["id"]
        )
        assert found["request_counts"] == {"total": 6, "completed": 2, "failed": 4}
        output = await content(service, found["output_file_id"])
        errors = await content(service, found["error_file_id"])
        assert [row["custom_id"] for row in output] == ["id-0", "id-5"]
        assert [row["custom_id"] for row in errors] == ["id-1", "id-2", "id-3", "id-4"]
        assert [row["response"]["status_code"] for row in errors] == [400, 404, 400, 400]
        assert all(row["response"]["body"]["error"]["message"] for row in errors)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "empty_file"),
        ("\n \n", "empty_file"),
        ("{", "invalid_json_line"),
        ("[1]", "invalid_json_line"),
        ('{"custom_id": 1}', "invalid_line"),
        (jsonl([line(1), line(1)]).decode(), "invalid_line"),
        (jsonl([line(1) | {"method": "GET"}]).decode(), "invalid_line"),
        (jsonl([line(1, url="/v1/chat/completions")]).decode(), "invalid_line"),
        (jsonl([line(1) | {"body": None}]).decode(), "invalid_line"),
        ("x" * 5000, "line_too_long"),
    ],
)
async def test_a_bad_input_file_fails_the_batch(
    start_service: Any, tmp_path: Path, text: str, code: str
) -> None:
    jobs = JobLimits(url=str(tmp_path), max_line_bytes=4000)
    async with running(start_service, tmp_path, jobs=jobs) as service:
        found = await ended(
            service, (await create(service, await upload(service, text.encode())))["id"]
        )
        assert found["status"] == "failed"
        assert {each["code"] for each in found["errors"]["data"]} == {code}
        assert service.engine.seen == []


async def test_files_of_other_systems_are_read(start_service: Any, tmp_path: Path) -> None:
    """Of Windows: lines end with CR LF, and the file begins with a byte order mark."""
    text = "\ufeff" + "\r\n".join(json.dumps(line(number)) for number in range(3)) + "\r\n\r\n"
    async with running(start_service, tmp_path) as service:
        found = await ended(
            service, (await create(service, await upload(service, text.encode())))["id"]
        )
        assert found["request_counts"] == {"total": 3, "completed": 3, "failed": 0}, found
        rows = await content(service, found["output_file_id"])
        assert [row["custom_id"] for row in rows] == ["id-0", "id-1", "id-2"]


async def test_a_replica_takes_over_what_another_one_left(
    start_service: Any, tmp_path: Path
) -> None:
    """The first one ends in the middle; no line is computed twice or missing."""
    queue = MemoryQueue(QueueLimits(lease=10 * PATIENCE))
    lines = [line(number, max_tokens=2) for number in range(2 * PART_LINES)]
    async with running(start_service, tmp_path, queue=queue) as first:
        batch = await create(first, await upload(first, jsonl(lines)))
        await until(lambda: len(first.engine.seen) > PART_LINES + 5)
    seen = len(first.engine.seen)
    async with running(start_service, tmp_path, queue=queue) as second:
        found = await ended(second, batch["id"])
        rows = await content(second, found["output_file_id"])
    assert found["status"] == "completed"
    assert [row["custom_id"] for row in rows] == [each["custom_id"] for each in lines]
    assert seen + len(second.engine.seen) == len(lines)


async def test_a_cancelled_batch_keeps_its_answers(start_service: Any, tmp_path: Path) -> None:
    async with running(start_service, tmp_path, running=False) as service:
        lines = [line(number) for number in range(20)]
        batch = await create(service, await upload(service, jsonl(lines)))
        depth = service.queue.depth

        async def queued() -> bool:
            return bool((await depth()).queued_requests == 8)

        async with asyncio.timeout(PATIENCE):
            while not await queued():
                await asyncio.sleep(0.01)
        reply = await service.post(f"/v1/batches/{batch['id']}/cancel", {})
        assert reply.json()["status"] == "cancelling"
        found = await ended(service, batch["id"])
        assert found["status"] == "cancelled"
        assert found["request_counts"] == {"total": 20, "completed": 0, "failed": 20}
        errors = await content(service, found["error_file_id"])
        assert [row["custom_id"] for row in errors] == [each["custom_id"] for each in lines]
        assert {row["error"]["code"] for row in errors} == {"batch_cancelled"}
        assert (await depth()).queued_requests == 0
        again = await service.post(f"/v1/batches/{batch['id']}/cancel", {})
        assert again.json()["status"] == "cancelled"


@pytest.mark.slow
async def test_an_expired_batch_fails_its_lines(
    start_service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(start_service, tmp_path, running=False) as service:
        file_id = await upload(service, jsonl([line(0)]))
        monkeypatch.setattr("service.api.system.batches.MIN_WINDOW", 1)
        batch = await create(service, file_id, completion_window="1s")
        found = await ended(service, batch["id"])
        assert found["status"] == "expired"
        (row,) = await content(service, found["error_file_id"])
        assert row["error"]["code"] == "batch_expired"


async def test_an_answer_that_was_cut_is_made_again(start_service: Any, tmp_path: Path) -> None:
    """A request that the queue ended is no answer of a line."""
    async with running(start_service, tmp_path) as service:
        service.engine.pause = 0.05
        lines = [line(number, max_tokens=30) for number in range(4)]
        batch = await create(service, await upload(service, jsonl(lines)))
        await until(lambda: len(service.engine.seen) == 4)
        ids = [request.id for request in service.engine.seen]
        await service.queue.stop(ids[:2], FinishReason.CANCELLED)
        service.engine.pause = 0.0
        found = await ended(service, batch["id"])
        rows = await content(service, found["output_file_id"])
        reasons = [row["response"]["body"]["choices"][0]["finish_reason"] for row in rows]
        assert reasons == ["length"] * 4


class Bucket(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Objects that exist when their upload is complete."""

    protocol = "bucket"
    cachable = False
    objects: ClassVar[dict[str, bytes]] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """It has no folders."""

    def info(self, path: str, **_: Any) -> Json:
        path = self._strip_protocol(path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(self.objects[path]), "type": "file"}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return Upload(self, path, mode, block_size=8)


class Upload(AbstractBufferedFile):  # type: ignore[misc]
    def _initiate_upload(self) -> None:
        self.parts: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        self.parts.append(self.buffer.getvalue())
        if final:
            Bucket.objects[self.path] = b"".join(self.parts)
        return True


@pytest.mark.parametrize("size", [0, 3, 30])
def test_an_object_of_a_bucket_appears_whole_or_not_at_all(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing an upload completes it, so one that failed must not be closed."""
    monkeypatch.setattr(Bucket, "objects", {})
    register_implementation("bucket", Bucket, clobber=True)
    tree = Tree("bucket://files")
    tree.write("a", b"record")
    with tree.writing("b") as file:
        file.write(b"x" * size)
    assert (tree.size("a"), tree.size("b")) == (6, size)

    def fail(path: str) -> None:
        with tree.writing(path) as file:
            file.write(b"y" * (size + 1))
            raise ZeroDivisionError

    for path in ("b", "c"):
        with pytest.raises(ZeroDivisionError):
            fail(path)
    gc.collect()
    assert (tree.size("b"), tree.size("c")) == (size, None)


class BotoCoreError(Exception):
    """As botocore's: no OSError."""


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ConnectionError("refused"), Unavailable),
        (BotoCoreError("no endpoint"), Unavailable),
        (BadRequest("a line is invalid"), BadRequest),
    ],
)
async def test_errors_of_a_bucket_are_an_outage(
    raised: Exception,
    expected: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client of a bucket has errors of its own; those of a request stay what they are."""
    client = SimpleNamespace(BotoCoreError=BotoCoreError, ClientError=BotoCoreError)
    monkeypatch.setitem(sys.modules, "botocore.exceptions", client)

    def work(_: Tree) -> None:
        raise raised

    storage = Storage(str(tmp_path))
    with pytest.raises(expected):
        await storage.run("a", work)
    storage.close()


async def test_lists_are_paged_and_belong_to_tenants(start_service: Any, tmp_path: Path) -> None:
    def authenticate(scope: Any) -> Tenant:
        return Tenant(name=dict(scope["headers"]).get(b"x-api-key", b"a/..").decode())

    jobs = JobLimits(url=str(tmp_path), files=FileLimits(max_files=20))
    async with running(start_service, tmp_path, jobs=jobs, authenticate=authenticate) as service:
        file_id = await upload(service, jsonl([line(0)]))
        ids = [(await create(service, file_id))["id"] for _ in range(3)]
        for each in ids:
            await ended(service, each)
        first = (await service.client.get("/v1/batches?limit=2")).json()
        assert [each["id"] for each in first["data"]] == ids[:0:-1]
        assert (first["has_more"], first["last_id"]) == (True, ids[1])
        rest = (await service.client.get(f"/v1/batches?limit=2&after={ids[1]}")).json()
        assert ([each["id"] for each in rest["data"]], rest["has_more"]) == (ids[:1], False)
        other = {"x-api-key": "b"}
        for path in (
            f"/v1/batches/{ids[0]}",
            f"/v1/files/{file_id}",
            f"/v1/files/{file_id}/content",
        ):
            assert (await service.client.get(path, headers=other)).status_code == 404
        assert (await service.client.get("/v1/batches", headers=other)).json()["data"] == []
        assert (await service.client.get("/v1/files", headers=other)).json()["data"] == []
        body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "1h"}
        assert (await service.post("/v1/batches", body, x_api_key="b")).status_code == 404


async def test_limits_of_a_tenant(start_service: Any, tmp_path: Path) -> None:
    limits = FileLimits(max_bytes=3000, max_files=3, max_total_bytes=5000)
    jobs = JobLimits(url=str(tmp_path), files=limits, max_open=1)
    async with running(start_service, tmp_path, jobs=jobs, running=False) as service:
        file_id = await upload(service, jsonl([line(0)]))

        async def refused(content: bytes) -> int:
            files = {"file": ("x", content)}
            data = {"purpose": "batch"}
            return int((await service.client.post("/v1/files", files=files, data=data)).status_code)

        assert await refused(b"x" * 3001) == 413
        await upload(service, b"x" * 2500)
        assert await refused(b"x" * 2500) == 429
        await upload(service, b"x")
        assert await refused(b"x") == 429
        batch = await create(service, file_id)
        body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "1h"}
        reply = await service.post("/v1/batches", body)
        assert (reply.status_code, "at most 1" in reply.text) == (429, True)
        assert (await service.client.delete(f"/v1/files/{file_id}")).status_code == 409
        await service.post(f"/v1/batches/{batch['id']}/cancel", {})
        await ended(service, batch["id"])
        gone = await service.client.delete(f"/v1/files/{file_id}")
        assert gone.json() == {"id": file_id, "object": "file", "deleted": True}
        assert (await service.client.get(f"/v1/files/{file_id}")).status_code == 404


@pytest.mark.parametrize(
    "change",
    [
        {"endpoint": "/v1/messages"},
        {"completion_window": "1s"},
        {"completion_window": "99d"},
        {"completion_window": "soon"},
        {"input_file_id": 3},
        {"metadata": {"a": 1}},
        {"output_expires_after": {"anchor": "created_at", "seconds": 3600}},
    ],
)
async def test_bad_bodies_are_refused(service: Any, change: Json) -> None:
    body = {"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "1h"}
    reply = await service.post("/v1/batches", body | change)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"].partition(".")[0] in change
    if "completion_window" in change:
        assert error["message"].endswith("must be from 1m to 30d, such as 24h")
