"""The grammar validator: tenants in turns, bounded queues, and cached results."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from starlette.types import Scope

from model.grammar import Grammars
from service.api.http.auth import Tenant
from service.api.http.context import Models
from service.api.structured import validator as grammar_validator
from service.api.structured.validator import MAX_TENANT_WAITING, GrammarValidator
from service.errors import RateLimited
from service.messages import Allowance
from tests.support.waiting import PATIENCE

TEXT = {"model": "tiny-model", "prompt": "hi", "max_tokens": 4}


class HeldValidator(GrammarValidator):
    """Compiles as many grammars as `let` permits, without a process; `bad` ones are invalid."""

    def __init__(self) -> None:
        super().__init__(self._none)
        self.let = threading.Semaphore(0)
        self.compiled: list[str] = []

    def _none(self) -> Grammars:
        raise AssertionError("no process is needed")

    def _compile(self, grammar: str) -> str | None:
        self.compiled.append(grammar)
        assert self.let.acquire(timeout=PATIENCE)
        return "is bad" if "bad" in grammar else None


@pytest.fixture
def held() -> HeldValidator:
    return HeldValidator()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_tenant_waits_for_one_grammar_of_another_and_not_for_its_queue(
    held: HeldValidator,
) -> None:
    flood = [
        asyncio.create_task(held.error(f"regex:bad{n}", tenant="flood"))
        for n in range(MAX_TENANT_WAITING + 18)
    ]
    await until(lambda: len(held.compiled) == 1 and sum(task.done() for task in flood) == 17)
    quiet = [asyncio.create_task(held.error(f"regex:{n}", tenant="quiet")) for n in range(3)]
    other = asyncio.create_task(held.error("regex:other", tenant="other"))
    await until(lambda: held._pool.waiting == MAX_TENANT_WAITING + 4)
    held.let.release(2)
    assert await quiet[0] is None
    held.let.release(1)
    assert await other is None
    await until(lambda: len(held.compiled) == 4)  # the thread takes the next grammar
    assert held.compiled == ["regex:bad0", "regex:0", "regex:other", "regex:bad1"]
    held.let.release(100)
    assert [await task for task in quiet] == [None] * 3
    results = await asyncio.gather(*flood, return_exceptions=True)
    refused = [result for result in results if isinstance(result, RateLimited)]
    assert len(refused) == 17, "of the tenant that floods, and of no other"
    assert results.count("is bad") == len(results) - 17


async def test_results_of_bad_grammars_are_cached(held: HeldValidator) -> None:
    held.let.release(100)
    for tenant in ("a", "b"):
        assert await held.error("regex:bad", tenant=tenant) == "is bad"
        assert await held.error("regex:fine", tenant=tenant) is None
    assert held.compiled == ["regex:bad", "regex:fine"]


async def test_equal_grammars_that_wait_are_compiled_once(held: HeldValidator) -> None:
    calls = [asyncio.create_task(held.error("regex:bad", tenant=tenant)) for tenant in "aaabbbccc"]
    await until(lambda: held._pool.waiting == 2)
    held.let.release(1)
    assert await asyncio.gather(*calls) == ["is bad"] * 9
    assert held.compiled == ["regex:bad"]


async def test_equal_grammars_of_a_tenant_share_an_entry_in_its_queue(held: HeldValidator) -> None:
    """A burst of calls with one new schema is no flood; cancelling one affects no other."""
    first = asyncio.create_task(held.error("regex:first", tenant="t"))
    await until(lambda: held.compiled != [])
    calls = [
        asyncio.create_task(held.error("regex:same", tenant="t"))
        for _ in range(4 * MAX_TENANT_WAITING)
    ]
    await until(
        lambda: sum(entry.num_callers for entry in held._entries.values()) == len(calls) + 1
    )
    assert held._pool.waiting == 1
    for call in calls[::2]:
        call.cancel()
    held.let.release(2)
    assert await first is None
    assert await asyncio.gather(*calls[1::2]) == [None] * (2 * MAX_TENANT_WAITING)
    assert held.compiled == ["regex:first", "regex:same"]
    assert not held._entries


async def test_the_number_of_results_is_bounded(
    held: HeldValidator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least recently used result is evicted, and texts are not stored."""
    monkeypatch.setattr(grammar_validator, "MAX_RESULTS", 3)
    held.let.release(100)
    for name in ("a", "b", "c", "a", "d"):
        await held.error(f"regex:{name}", tenant="t")
    assert len(held._results._cached) == 3
    held.compiled.clear()
    for name in ("c", "a", "d", "b"):
        await held.error(f"regex:{name}", tenant="t")
    assert held.compiled == ["regex:b"]
    assert {len(key) for key in held._results._cached} == {32}


async def test_a_cancelled_call_leaves_the_queue(held: HeldValidator) -> None:
    """The running compilation continues, and its result is cached."""
    calls = [asyncio.create_task(held.error(f"regex:{n}", tenant="t")) for n in range(5)]
    await until(lambda: held._pool.waiting == 4)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert held._pool.waiting == 0
    held.let.release(1)
    assert await held.error("regex:0", tenant="t") is None
    assert held.compiled == ["regex:0"]


def by_header(scope: Scope) -> Tenant:
    """A tenant for each value of `x-tenant`."""
    return Tenant(name=dict(scope["headers"]).get(b"x-tenant", b"public").decode())


async def test_bad_regexes_of_one_tenant_keep_no_schema_out(start_service: Any) -> None:
    """34 calls with bad regexes at once; another tenant's grammar is accepted meanwhile."""
    async with start_service(authenticate=by_header) as service:

        def ask(tenant: str, **outputs: Any) -> Any:
            body = TEXT | {"structured_outputs": outputs}
            return service.post("/v1/completions", body, x_tenant=tenant)

        flood = [asyncio.create_task(ask("flood", regex=f"(line {n}")) for n in range(34)]
        await until(lambda: any(task.done() for task in flood))
        quiet = await ask("quiet", choice=["a new one", "or another"])
        assert quiet.status_code == 200, quiet.text
        replies = await asyncio.gather(*flood)
        assert {reply.status_code for reply in replies} == {400}
        again = await ask("flood", regex="(line 0")
        assert again.json()["error"]["code"] == "invalid_grammar"


async def test_calls_over_the_rate_limit_reach_no_validation(
    start_service: Any, held: HeldValidator
) -> None:
    """Requests per minute are charged before the validation."""
    allowance = Allowance(key="k", requests_per_minute=1)
    held.let.release(100)
    async with start_service(
        authenticate=lambda _scope: Tenant(name="t", allowance=allowance)
    ) as service:
        context = service.app.state.context
        models = Models.of(replace(context.models.first, grammars=held))
        service.app.state.context = replace(context, models=models)
        replies = [
            await service.post("/v1/completions", TEXT | {"structured_outputs": {"regex": f"a{n}"}})
            for n in range(5)
        ]
    assert [reply.status_code for reply in replies] == [200, 429, 429, 429, 429]
    assert len(held.compiled) == 1
