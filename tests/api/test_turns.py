"""Work that calls cause: refused by size before it begins, and done in turns of tenants.

A tokenizer that waits stands for one that is slow, so turns are counted and not seconds.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from starlette.types import Scope

from model.text.tokenizer import Tokenizer
from service.api import ROUTERS
from service.api.http.auth import Tenant, only_with_key
from service.api.http.context import Models
from service.keys import KeyRing, new_entry
from tests.support.waiting import PATIENCE

LONG = "hello world " * 1000
MODEL = "tiny-model"
ROOMY = 10**6
"""A context in which LONG fits."""
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"model": MODEL, "prompt": LONG, "max_tokens": 1}),
    "chat": (
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"role": "user", "content": LONG}], "max_tokens": 1},
    ),
    "many messages": (
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"role": "user", "content": "x"}] * 500, "max_tokens": 1},
    ),
    "responses": ("/v1/responses", {"model": MODEL, "input": LONG, "max_output_tokens": 16}),
    "messages": (
        "/v1/messages",
        {"model": MODEL, "messages": [{"role": "user", "content": LONG}], "max_tokens": 1},
    ),
    "count_tokens": (
        "/v1/messages/count_tokens",
        {"model": MODEL, "messages": [{"role": "user", "content": LONG}]},
    ),
    "tokenize": ("/tokenize", {"prompt": LONG}),
    "tokenize a chat": ("/tokenize", {"messages": [{"role": "user", "content": LONG}]}),
    "detokenize": ("/detokenize", {"tokens": [65] * 9000}),
}


class HeldTokenizer:
    """A tokenizer that begins each long text only when the test lets it."""

    def __init__(self, real: Tokenizer) -> None:
        self._real = real
        self.began: list[int] = []  # lengths, in order
        self.let = threading.Semaphore(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _hold(self, length: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.began.append(length)
            assert self.let.acquire(timeout=PATIENCE)

    def encode(self, text: str, **options: Any) -> list[int]:
        self._hold(len(text))
        return self._real.encode(text, **options)

    def decode(self, ids: list[int]) -> str:
        self._hold(len(ids))
        return self._real.decode(ids)

    def apply_chat_template(self, messages: Any, **options: Any) -> list[int]:
        self._hold(sum(len(message["content"]) for message in messages))
        return self._real.apply_chat_template(messages, **options)


def by_header(scope: Scope) -> Tenant:
    """The tenant that a test names."""
    return Tenant(name=dict(scope["headers"]).get(b"x-tenant", b"public").decode())


def hold(service: Any) -> HeldTokenizer:
    """Puts a held tokenizer in the place of the service's."""
    held = HeldTokenizer(service.tokenizer)
    context = service.app.state.context
    models = Models.of(replace(context.models.first, tokenizer=held))
    service.app.state.context = replace(context, models=models)
    return held


def waiting(service: Any) -> int:
    pools = service.app.state.context.pools
    return sum(pool.waiting for pool in (pools.bodies, pools.templates, pools.tokens))


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "body"), CALLS.values(), ids=CALLS)
async def test_a_flood_of_one_tenant_delays_another_by_one_turn(
    start_service: Any, small_limits: Any, path: str, body: Any
) -> None:
    """One line for all served the twelve of the flood first."""
    limits = small_limits(text_threads=1)
    async with start_service(limits=limits, authenticate=by_header, max_model_len=ROOMY) as service:
        held = hold(service)
        flood = [asyncio.create_task(service.post(path, body, x_tenant="flood")) for _ in range(12)]
        await until(lambda: len(held.began) == 1 and waiting(service) == 11)
        quiet = asyncio.create_task(service.post(path, body, x_tenant="quiet"))
        await until(lambda: waiting(service) == 12)
        held.let.release(2)  # one unit of the flood ends, and then this one
        reply = await quiet
        assert reply.status_code == 200, reply.text
        small = await service.post("/tokenize", {"prompt": "short"}, x_tenant="quiet")
        assert small.status_code == 200, "short texts need no turn"
        held.let.release(100)
        assert {reply.status_code for reply in await asyncio.gather(*flood)} == {200}


async def test_what_waits_of_a_tenant_is_bounded(start_service: Any, small_limits: Any) -> None:
    limits = small_limits(
        text_threads=1, max_tenant_waiting_bytes=2 * len(LONG), max_waiting_bytes=3 * len(LONG)
    )
    async with start_service(limits=limits, authenticate=by_header, max_model_len=ROOMY) as service:
        held = hold(service)

        def call(tenant: str) -> asyncio.Task[Any]:
            return asyncio.create_task(service.post("/tokenize", {"prompt": LONG}, x_tenant=tenant))

        calls = [call("a")]
        await until(lambda: len(held.began) == 1)
        calls += [call("a"), call("a")]
        await until(lambda: waiting(service) == 2)
        refused = await call("a")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        calls.append(call("b"))
        await until(lambda: waiting(service) == 3)
        refused = await call("c")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert service.observer.refusals == ["busy", "busy"]
        held.let.release(100)
        assert {reply.status_code for reply in await asyncio.gather(*calls)} == {200}


def test_no_call_needs_a_shared_thread() -> None:
    """Handlers and dependencies that are no coroutines would be called in FastAPI's own pool."""
    routes = [route for router in ROUTERS.values() for route in router.routes]
    dependants = [route.dependant for route in routes if isinstance(route, APIRoute)]
    assert len(dependants) > 10
    while dependants:
        dependant = dependants.pop()
        assert inspect.iscoroutinefunction(dependant.call), dependant.call
        dependants += dependant.dependencies


@pytest.mark.slow
async def test_a_deleted_key_stops_working_while_the_pools_are_full(
    start_service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys file was read in the pool that these calls fill, after all of them."""
    monkeypatch.setattr("service.keys.CHECK_INTERVAL", 0.001)
    secrets = {name: f"qk-{name * 43}"[:46] for name in "ab"}
    path = tmp_path / "keys.toml"
    path.write_text("\n".join(new_entry(secret, name=name) for name, secret in secrets.items()))
    ring = KeyRing(path, on_reload=lambda _good: None)
    find = only_with_key(ring.find)
    async with start_service(authenticate=find, max_model_len=ROOMY) as service:
        held = hold(service)
        watching = asyncio.create_task(ring.watch())
        auth = {"authorization": f"Bearer {secrets['a']}"}
        flood = [
            asyncio.create_task(service.post(*CALLS[name], **auth))
            for name in ("tokenize", "chat")
            for _ in range(40)
        ]
        await until(lambda: len(held.began) == 4 and waiting(service) == 76)
        path.write_text(new_entry(secrets["a"], name="a"))
        auth_b = {"authorization": f"Bearer {secrets['b']}"}
        async with asyncio.timeout(60):
            while (await service.client.get("/v1/models", headers=auth_b)).status_code != 401:
                await asyncio.sleep(0.01)
        assert len(held.began) == 4, "no call of the flood was over by then"
        held.let.release(1000)
        await asyncio.gather(*flood)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


TOO_LARGE = "hello world " * 30_000
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "completions": ("/v1/completions", {"model": MODEL, "prompt": ["a", TOO_LARGE]}, "prompt"),
    "chat": (
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"role": "user", "content": TOO_LARGE}]},
        "messages",
    ),
    "many messages": (
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"role": "user", "content": TOO_LARGE[:400]}] * 900},
        "messages",
    ),
    "tools": (
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "x"}],
            "tools": [
                {"type": "function", "function": {"name": "f", "description": TOO_LARGE}}
            ],
        },
        "messages",
    ),
    "responses": ("/v1/responses", {"model": MODEL, "input": TOO_LARGE}, "input"),
    "instructions": (
        "/v1/responses", {"model": MODEL, "input": "x", "instructions": TOO_LARGE}, "input",
    ),
    "messages": (
        "/v1/messages",
        {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": TOO_LARGE}]},
        "messages",
    ),
    "count_tokens": (
        "/v1/messages/count_tokens",
        {"model": MODEL, "messages": [{"role": "user", "content": TOO_LARGE}]},
        "messages",
    ),
    "tokenize": ("/tokenize", {"prompt": TOO_LARGE}, "prompt"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("path", "body", "param"), REFUSED.values(), ids=REFUSED)
async def test_text_that_cannot_fit_is_refused_before_it_is_tokenised(
    service: Any, path: str, body: Any, param: str
) -> None:
    """Twelve prompts of 4 MB, each to be refused, occupied all threads for over a minute."""
    held = hold(service)
    held.let.release(10**6)
    reply = await service.post(path, body)
    error = reply.json()["error"]
    assert reply.status_code == 400, error
    if not path.startswith("/v1/messages"):
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    message = f"{param} must leave room for a token: the context length is 256 tokens"
    assert error["message"] == message
    assert held.began == []


async def test_what_fits_is_never_refused_for_its_size(service: Any) -> None:
    """The longest token, as often as the context holds it."""
    longest = max(service.tokenizer.token_bytes, key=len).decode()
    text = longest * 200
    count = len(service.tokenizer.encode(text, add_bos=False))
    assert count <= 200
    reply = await service.post("/v1/completions", {"model": MODEL, "prompt": text})
    assert reply.status_code == 200, reply.text
