"""Keys over HTTP: who is let in, for how much, and what stays apart between tenants."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.__main__ import app as command_line
from service.api.http.auth import only_with_key
from service.errors import StartupError
from service.http.exposure import refuse_exposure
from service.keys import KeyRing, digest_of, new_entry, new_secret, read_keys
from service.queues.contract import QueueLimits
from service.queues.memory.queue import MemoryQueue
from service.settings import load_settings
from tests.support.waiting import PATIENCE

ALICE, BOB, CAROL = "qk-" + "a" * 43, "qk-" + "b" * 43, "qk-" + "c" * 43
B: dict[str, Any] = {"model": "tiny-model", "prompt": "hello", "max_tokens": 8, "seed": 3}


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def write_keys(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """Secret -> fields of its entry."""
    path.write_text("\n".join(new_entry(secret, **fields) for secret, fields in entries.items()))
    return path


@pytest.fixture
def make_ring(tmp_path: Path) -> Any:
    """A ring over a file of its own, with what it told of reloads."""

    def make(**fields: Any) -> KeyRing:
        """`fields` are Alice's; Bob is of her tenant, Carol of another."""
        entries = {
            ALICE: {"name": "alice", "tenant": "one", **fields},
            BOB: {"name": "bob", "tenant": "one", "highest_priority": 0},
            CAROL: {"name": "carol", "highest_priority": 2},
        }
        return KeyRing(write_keys(tmp_path / "keys.toml", entries), on_reload=lambda _good: None)

    return make


@pytest.fixture
def start_keyed(start_service: Any, make_ring: Any) -> Any:
    """`async with start_keyed(requests_per_minute=2)`: a replica with keys. Its minute stands
    still: on a slow machine, calls would come back while a test counts them.
    """

    def start(ring: KeyRing | None = None, **fields: Any) -> Any:
        queue = MemoryQueue(QueueLimits(lease=10 * PATIENCE), clock=lambda: 0.0)
        find = (ring or make_ring(**fields)).find
        return start_service(queue=queue, authenticate=only_with_key(find))

    return start


REFUSED: dict[str, list[tuple[bytes, bytes]]] = {
    "no key": [],
    "empty": [(b"authorization", b"Bearer ")],
    "the word alone": [(b"authorization", b"Bearer")],
    "another scheme": [(b"authorization", b"Basic " + ALICE.encode())],
    "no scheme": [(b"authorization", ALICE.encode())],
    "two keys": [(b"authorization", b"Bearer " + ALICE.encode())] * 2,
    "two ways": [(b"authorization", b"Bearer " + ALICE.encode()), (b"x-api-key", ALICE.encode())],
    "two keys in one": [(b"x-api-key", f"{ALICE},{BOB}".encode())],
    "the last character differs": [(b"x-api-key", ALICE[:-1].encode() + b"b")],
    "a character more": [(b"x-api-key", ALICE.encode() + b"a")],
    "a character less": [(b"x-api-key", ALICE[:-1].encode())],
    "its digest": [(b"x-api-key", digest_of(ALICE).encode())],
    "100 kB": [(b"authorization", b"Bearer " + b"a" * 100_000)],
    "not ASCII": [(b"authorization", b"Bearer \xc3\xa9\xff" + ALICE.encode())],
    "with a newline": [(b"x-api-key", ALICE.encode() + b"\n")],
    "in the query alone": [(b"x-key", ALICE.encode())],
}


@pytest.mark.parametrize("headers", REFUSED.values(), ids=REFUSED)
async def test_who_shows_no_valid_key_is_not_let_in(start_keyed: Any, headers: Any) -> None:
    async with start_keyed() as service:
        reply = await service.client.get(f"/v1/models?api_key={ALICE}", headers=headers)
    assert reply.status_code == 401
    error = reply.json()["error"]
    assert (error["type"], error["param"], error["code"]) == (
        "invalid_request_error", None, "invalid_api_key",
    )  # fmt: skip
    assert reply.headers["www-authenticate"] == "Bearer"
    assert ALICE not in reply.text
    assert reply.headers["x-request-id"]


async def test_a_key_is_shown_as_openai_or_as_anthropic_do(start_keyed: Any) -> None:
    async with start_keyed() as service:
        for headers in (
            bearer(ALICE), {"Authorization": f"bearer  {ALICE}"}, {"X-API-Key": ALICE},
        ):  # fmt: skip
            assert (await service.client.get("/v1/models", headers=headers)).status_code == 200
        # The path decides, not what a Host header makes of it.
        for host in ("a/v1?x", "health", "test/health?", "x#/health"):
            reply = await service.client.get("/v1/models", headers={"host": host})
            assert reply.status_code == 401, host


async def test_requests_a_minute_and_what_headers_say(start_keyed: Any) -> None:
    async with start_keyed(requests_per_minute=2, tokens_per_minute=6000) as service:
        prompt = len(service.tokenizer.encode("hello"))
        for left in (1, 0):
            reply = await service.post("/v1/completions", B, **bearer(ALICE))
            assert reply.status_code == 200
            told = {name: reply.headers[f"x-ratelimit-{name}"] for name in (
                "limit-requests", "remaining-requests", "limit-tokens", "remaining-tokens",
            )}  # fmt: skip
            assert told["limit-requests"] == "2"
            assert told["remaining-requests"] == str(left)
            assert told["limit-tokens"] == "6000"
            # Of the first call 8 tokens are settled; of this one a share is counted.
            counted = (2 - left) * prompt + (1 - left) * 8 + 8 // 4
            assert abs(6000 - counted - int(told["remaining-tokens"])) <= 5
            assert reply.headers["x-ratelimit-reset-tokens"].endswith("ms")
        assert reply.headers["x-ratelimit-reset-requests"] == "1m0s"
        reply = await service.post("/v1/chat/completions", chat(), **bearer(ALICE))
        assert reply.status_code == 429
        assert reply.json()["error"] == {
            "message": "this key has 2 requests per minute",
            "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded",
        }  # fmt: skip
        assert reply.headers["retry-after-ms"] == "30000"
        assert reply.headers["retry-after"] == "30"
        assert reply.headers["x-ratelimit-remaining-requests"] == "0"
        assert service.observer.refusals == ["rate"]
        # Others' keys have their own minute.
        reply = await service.post("/v1/completions", B, **bearer(BOB))
        assert reply.status_code == 200
        assert not [name for name in reply.headers if name.startswith("x-ratelimit")]


COUNTED: dict[str, tuple[str, str, Any]] = {
    "tokenize": ("POST", "/tokenize", {"prompt": "hello"}),
    "detokenize": ("POST", "/detokenize", {"tokens": [1]}),
    "attention": ("POST", "/v1/attention", {"tokens": [1]}),
    "count_tokens": (
        "POST", "/v1/messages/count_tokens",
        {"model": "tiny-model", "messages": [{"role": "user", "content": "hi"}]},
    ),
    "models": ("GET", "/v1/models", None),
    "a stream": ("GET", "/v1/streams/nonsense", None),
    "a response": ("GET", "/v1/responses/nonsense", None),
    "an invalid body": ("POST", "/v1/completions", {"model": "tiny-model", "prompt": 7}),
    "no JSON": ("POST", "/v1/completions", ...),
    "another model": ("POST", "/v1/completions", B | {"model": "other"}),
    "a bad grammar": (
        "POST", "/v1/completions", B | {"structured_outputs": {"regex": "(?=a)"}},
    ),
    "no route": ("GET", "/v1/nothing", None),
    "another method": ("PUT", "/v1/completions", B),
}  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body"), COUNTED.values(), ids=COUNTED)
async def test_every_call_of_a_key_counts(
    start_keyed: Any, method: str, path: str, body: Any
) -> None:
    """Only submissions were counted: refused calls and everything beside them had no limit."""
    async with start_keyed(requests_per_minute=2) as service:
        content = b"{" if body is ... else json.dumps(body)
        headers = bearer(ALICE) | {"content-type": "application/json"}

        async def call() -> Any:
            return await service.client.request(method, path, content=content, headers=headers)

        for left in ("1", "0"):
            reply = await call()
            assert reply.status_code != 429
            assert reply.headers["x-ratelimit-remaining-requests"] == left
        refused = await call()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "30")
        assert "this key has 2 requests per minute" in refused.text
        assert refused.headers["x-request-id"]
        assert service.observer.refusals == ["rate"]


async def test_what_ends_work_is_counted_and_never_refused(start_keyed: Any) -> None:
    """And neither are calls without a right to be counted: the probes, and the page's status."""
    async with start_keyed(requests_per_minute=2) as service:
        service.engine.pause = 0.05
        body = B | {"background": True, "input": "x"}
        del body["prompt"], body["max_tokens"]
        running = await service.post("/v1/responses", body, **bearer(ALICE))
        assert running.status_code == 200
        address = f"/v1/responses/{running.json()['id']}"
        cancelled = await service.post(f"{address}/cancel", {}, **bearer(ALICE))
        assert cancelled.status_code == 200
        assert cancelled.headers["x-ratelimit-remaining-requests"] == "0"
        for path in (f"/v1/streams/{running.headers['x-request-id']}", address):
            reply = await service.client.delete(path, headers=bearer(ALICE))
            assert reply.status_code == 200, reply.text
        assert (await service.client.get("/v1/models", headers=bearer(ALICE))).status_code == 429
        for path in ("/status", "/health", "/"):
            for _ in range(3):
                reply = await service.client.get(path, headers=bearer(ALICE))
                assert reply.status_code == 200


async def test_a_call_cannot_be_counted_while_the_queue_is_away(start_keyed: Any) -> None:
    async with start_keyed(requests_per_minute=2) as service:
        await service.queue.close()
        reply = await service.post("/tokenize", {"prompt": "x"}, **bearer(ALICE))
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert reply.json()["error"]["code"] == "backend_unavailable"
        assert (await service.client.get("/v1/models", headers=bearer(BOB))).status_code == 200


def chat() -> dict[str, Any]:
    return {"model": "tiny-model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


async def test_a_request_larger_than_its_minute_is_not_tried_again(start_keyed: Any) -> None:
    async with start_keyed(tokens_per_minute=20) as service:
        reply = await service.post("/v1/completions", B | {"n": 9}, **bearer(ALICE))
        assert reply.status_code == 429
        assert reply.headers["x-should-retry"] == "false"
        assert "20 per minute" in reply.json()["error"]["message"]


async def test_requests_in_flight(start_keyed: Any) -> None:
    async with start_keyed(max_in_flight=2) as service:
        reply = await service.post("/v1/completions", B | {"n": 3}, **bearer(ALICE))
        assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(reply.headers["retry-after"]) >= 1
        assert (await service.post("/v1/completions", B | {"n": 2}, **bearer(ALICE))).is_success
        assert (await service.post("/v1/completions", B | {"n": 3}, **bearer(BOB))).is_success


async def test_priorities_are_a_right(start_keyed: Any) -> None:
    """Alice has from 1 on, Bob all, Carol only the last."""
    async with start_keyed() as service:
        for secret, asked, given in (
            (ALICE, None, 1), (ALICE, 0, None), (ALICE, 1, 1), (ALICE, 2, 2),
            (BOB, None, 1), (BOB, 0, 0), (CAROL, None, 2), (CAROL, 1, None),
        ):  # fmt: skip
            reply = await service.post("/v1/completions", B | {"priority": asked}, **bearer(secret))
            if given is None:
                assert reply.status_code == 403
                error = reply.json()["error"]
                assert (error["type"], error["param"]) == ("invalid_request_error", "priority")
            else:
                assert reply.status_code == 200
                assert service.engine.seen[-1].priority == given
        for absurd in (-1, 3, 10**9):
            reply = await service.post("/v1/completions", B | {"priority": absurd}, **bearer(BOB))
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "priority")
        reply = await service.post("/v1/completions", B | {"cache_salt": "x"}, **bearer(BOB))
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "cache_salt")


async def test_tenants_see_nothing_of_one_another(start_keyed: Any) -> None:
    """Two keys of one tenant share its streams and idempotency keys; another's are not there."""
    async with start_keyed() as service:
        mine = await service.post("/v1/completions", B, **bearer(ALICE), idempotency_key="k")
        again = await service.post("/v1/completions", B, **bearer(BOB), idempotency_key="k")
        other = await service.post("/v1/completions", B, **bearer(CAROL), idempotency_key="k")
        assert mine.headers["x-request-id"] == again.headers["x-request-id"]
        assert other.headers["x-request-id"] != mine.headers["x-request-id"]
        assert [request.tenant for request in service.engine.seen] == ["one", "carol"]
        path = f"/v1/streams/{mine.headers['x-request-id']}"
        assert (await service.client.get(path, headers=bearer(BOB))).status_code == 200
        flipped = path[:-1] + ("0" if path[-1] != "0" else "1")
        replies = [
            await service.client.request(method, address, headers=bearer(CAROL))
            for method in ("GET", "DELETE")
            for address in (path, flipped, "/v1/streams/nonsense")
        ]
        assert {(reply.status_code, reply.text) for reply in replies} == {(404, replies[0].text)}, (
            "one answer for another's, an unknown and a malformed one"
        )
        assert replies[0].json()["error"]["code"] == "stream_not_found"


async def test_a_change_of_the_file_is_taken_over(
    start_keyed: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A good one wholly, also behind a link; a bad one, or none, changes nothing, and is told of
    once.
    """
    told: list[bool] = []
    real = write_keys(tmp_path / "a.toml", {ALICE: {"name": "alice"}})
    link = tmp_path / "link.toml"
    link.symlink_to(real)
    ring = KeyRing(link, on_reload=told.append)
    caplog.set_level(logging.INFO)
    async with start_keyed(ring) as service:

        async def let_in() -> set[str]:
            replies = {
                name: await service.client.get("/v1/models", headers=bearer(secret))
                for name, secret in (("alice", ALICE), ("bob", BOB), ("carol", CAROL))
            }
            return {name for name, reply in replies.items() if reply.is_success}

        ring.check()
        assert (await let_in(), told) == ({"alice"}, [])
        write_keys(real, {BOB: {"name": "bob"}, CAROL: {"name": "carol"}})
        ring.check()
        assert (await let_in(), told) == ({"bob", "carol"}, [True])
        for bad in ("[[keys]]\nname = 'x'\n", "[[keys", f'[[keys]]\nsha256 = "{ALICE}"\n'):
            real.write_text(bad)
            ring.check()
            ring.check()
        assert (await let_in(), told) == ({"bob", "carol"}, [True] + [False] * 3)
        assert ALICE not in caplog.text
        other = write_keys(tmp_path / "b.toml", {ALICE: {"name": "alice"}})
        (tmp_path / "new").symlink_to(other)
        (tmp_path / "new").rename(link)  # as Kubernetes changes a mounted Secret
        ring.check()
        assert (await let_in(), told[-1]) == ({"alice"}, True)


@pytest.mark.parametrize("content", ["", "# none\n", "keys = []\n", None])
async def test_an_empty_or_deleted_file_revokes_every_key(
    make_ring: Any, start_keyed: Any, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    """A file without keys kept the deleted keys in force: no key could be revoked as the last one.

    It revokes, and does not open: a call without a key is refused before and after.
    """
    ring = make_ring()
    told: list[bool] = []
    ring._on_reload = told.append
    path = ring._path
    before = path.read_text()
    async with start_keyed(ring) as service:
        assert (await service.client.get("/v1/models", headers=bearer(ALICE))).is_success
        if content is None:
            path.unlink()
        else:
            path.write_text(content)
        for _ in range(2):
            ring.check()
        for headers in (bearer(ALICE), bearer(CAROL), {}):
            reply = await service.client.get("/v1/models", headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert caplog.messages.count("keys file is empty or deleted: all keys are revoked") == 1
        path.write_text(before)
        ring.check()
        assert (await service.client.get("/v1/models", headers=bearer(ALICE))).is_success
        assert told == [True, True]


async def test_a_file_that_cannot_be_read_changes_nothing_and_is_tried_again(
    make_ring: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is unchanged when it can be read again, so its state does not show that."""
    ring = make_ring()
    told: list[bool] = []
    ring._on_reload = told.append
    write_keys(ring._path, {BOB: {"name": "bob"}})

    def fail(_path: Path, **_options: str) -> str:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        for _ in range(3):
            ring.check()
        assert ring.find(ALICE) is not None
    ring.check()
    assert ring.find(ALICE) is None
    assert ring.find(BOB) is not None
    assert told == [False, True], "reported once"


async def test_the_file_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.keys.CHECK_INTERVAL", 0.001)
    path = write_keys(tmp_path / "keys.toml", {ALICE: {"name": "alice"}})
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def told(_good: bool) -> None:
        loop.call_soon_threadsafe(changed.set)

    ring = KeyRing(path, on_reload=told)
    watching = asyncio.create_task(ring.watch())
    write_keys(path, {BOB: {"name": "bob"}})
    async with asyncio.timeout(PATIENCE):
        await changed.wait()
    watching.cancel()
    assert ring.find(ALICE) is None
    assert ring.find(BOB) is not None


ENTRY = new_entry(ALICE, name="alice")


@pytest.mark.parametrize(
    "content",
    [
        "", "keys = []", "[keys]\n", ENTRY + "x = ", ENTRY + "secret = 1\n", ENTRY + ENTRY,
        ENTRY + new_entry(BOB, name="alice"), ENTRY + new_entry(ALICE, name="bob"),
        ENTRY.replace('"alice"', '"a b"'), ENTRY.replace('"alice"', '""'),
        ENTRY.replace("sha256", "sha1"), ENTRY.replace(digest_of(ALICE), ALICE),
        ENTRY.replace(digest_of(ALICE), digest_of(ALICE).upper()),
        ENTRY + "requests_per_minute = 0\n", ENTRY + 'tokens_per_minute = "9"\n',
        ENTRY + "max_in_flight = 1.5\n", ENTRY.replace("priority = 1", "priority = 3"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_that_shows_nothing(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(StartupError, match="keys file") as caught:
        KeyRing(path, on_reload=lambda _good: None)
    assert "\n" not in str(caught.value)
    assert ALICE not in str(caught.value)


def test_an_entry_comes_back_as_it_was_made(tmp_path: Path) -> None:
    secret = new_secret()
    fields = {
        "name": "a", "tenant": "t", "requests_per_minute": 1, "tokens_per_minute": 2,
        "max_in_flight": 3, "highest_priority": 0,
    }  # fmt: skip
    path = write_keys(tmp_path / "keys.toml", {secret: fields})
    assert secret not in path.read_text(), "only its digest is kept"
    (key,) = read_keys(path).values()
    assert key.model_dump() == fields | {"sha256": digest_of(secret)}
    assert secret.startswith("qk-")
    assert len({new_secret() for _ in range(100)}) == 100


def test_the_command_prints_the_entry_and_shows_the_secret_once(tmp_path: Path) -> None:
    """The entry goes where the output is sent, the secret to the terminal."""
    path = tmp_path / "keys.toml"
    for name in ("alice", "bob"):
        run = CliRunner().invoke(command_line, ["key", name, "--requests-per-minute", "7"])
        assert run.exit_code == 0
        secret = run.stderr.split()[-1]
        assert secret not in run.stdout
        with path.open("a") as file:
            file.write(run.stdout)
        key = read_keys(path)[digest_of(secret)]
        assert (key.name, key.tenant, key.requests_per_minute) == (name, None, 7)
        assert key.highest_priority == 1
    assert len(read_keys(path)) == 2


def test_others_are_served_with_keys_or_by_decision() -> None:
    for flags, refused in (
        ({}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "0.0.0.0", "allow_anonymous": "true"}, False),
        ({"host": "0.0.0.0", "keys_file": "keys.toml"}, False),
    ):
        with pytest.raises(StartupError, match="keys-file") if refused else nullcontext():
            refuse_exposure(load_settings(flags, environ={}))


def test_a_secret_is_too_long_to_be_tried_out() -> None:
    """256 bits: what makes a plain SHA-256 of it safe to keep."""
    assert len(new_secret().removeprefix("qk-")) == 43


@pytest.mark.slow
async def test_openai_s_client_understands_refusals(start_keyed: Any, listen: Any) -> None:
    import openai

    async with start_keyed(requests_per_minute=2) as service, listen(service.app) as url:
        stranger = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-nobody", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            await stranger.completions.create(**B)
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=ALICE, max_retries=0)
        assert (await client.completions.create(**B)).choices
        with pytest.raises(openai.PermissionDeniedError):
            await client.completions.create(**B, extra_body={"priority": 0})
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(**B)
        for each in (stranger, client):
            await each.close()
