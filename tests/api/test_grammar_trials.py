"""Grammar checks: tenants in turns, bounded lines, and verdicts that are kept."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from starlette.types import Scope

from model.grammar import Grammars
from service.api.auth import Tenant
from service.api.structured import validator as grammar_trials
from service.api.structured.validator import MAX_TENANT_WAITING, GrammarTrials
from service.errors import RateLimited
from service.messages import Allowance

TEXT = {"model": "tiny-model", "prompt": "hi", "max_tokens": 4}


class HeldTrials(GrammarTrials):
    """Tries as many grammars as it is let, without a process; those with `bad` are refused."""

    def __init__(self) -> None:
        super().__init__(self._none)
        self.let = threading.Semaphore(0)
        self.tried: list[str] = []

    def _none(self) -> Grammars:
        raise AssertionError("no process is needed")

    def _try(self, notation: str) -> str | None:
        self.tried.append(notation)
        assert self.let.acquire(timeout=30)
        return "is bad" if "bad" in notation else None


@pytest.fixture
def held() -> HeldTrials:
    return HeldTrials()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_tenant_waits_for_one_trial_of_another_and_not_for_its_line(
    held: HeldTrials,
) -> None:
    flood = [
        asyncio.create_task(held.fault(f"regex:bad{n}", tenant="flood"))
        for n in range(MAX_TENANT_WAITING + 18)
    ]
    await until(lambda: len(held.tried) == 1 and sum(task.done() for task in flood) == 17)
    quiet = [asyncio.create_task(held.fault(f"regex:{n}", tenant="quiet")) for n in range(3)]
    other = asyncio.create_task(held.fault("regex:other", tenant="other"))
    await until(lambda: held._pool.waiting == MAX_TENANT_WAITING + 4)
    held.let.release(2)
    assert await quiet[0] is None
    held.let.release(1)
    assert await other is None
    assert held.tried == ["regex:bad0", "regex:0", "regex:other", "regex:bad1"]
    held.let.release(100)
    assert [await task for task in quiet] == [None] * 3
    results = await asyncio.gather(*flood, return_exceptions=True)
    refused = [result for result in results if isinstance(result, RateLimited)]
    assert len(refused) == 17, "of the tenant that floods, and of no other"
    assert results.count("is bad") == len(results) - 17


async def test_verdicts_are_kept_of_bad_grammars_too(held: HeldTrials) -> None:
    held.let.release(100)
    for tenant in ("a", "b"):
        assert await held.fault("regex:bad", tenant=tenant) == "is bad"
        assert await held.fault("regex:fine", tenant=tenant) is None
    assert held.tried == ["regex:bad", "regex:fine"]


async def test_equal_grammars_that_wait_are_tried_once(held: HeldTrials) -> None:
    calls = [asyncio.create_task(held.fault("regex:bad", tenant=tenant)) for tenant in "aaabbbccc"]
    await until(lambda: held._pool.waiting == 2)
    held.let.release(1)
    assert await asyncio.gather(*calls) == ["is bad"] * 9
    assert held.tried == ["regex:bad"]


async def test_equal_grammars_of_a_tenant_share_a_place_in_its_line(held: HeldTrials) -> None:
    """A burst of calls with one new schema is no flood; one that gives up takes nothing along."""
    first = asyncio.create_task(held.fault("regex:first", tenant="t"))
    await until(lambda: held.tried != [])
    calls = [
        asyncio.create_task(held.fault("regex:same", tenant="t"))
        for _ in range(4 * MAX_TENANT_WAITING)
    ]
    await until(lambda: sum(place.num_calls for place in held._places.values()) == len(calls) + 1)
    assert held._pool.waiting == 1
    for call in calls[::2]:
        call.cancel()
    held.let.release(2)
    assert await first is None
    assert await asyncio.gather(*calls[1::2]) == [None] * (2 * MAX_TENANT_WAITING)
    assert held.tried == ["regex:first", "regex:same"]
    assert not held._places


async def test_the_number_of_verdicts_is_bounded(
    held: HeldTrials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was not asked for the longest goes first, and texts are not kept."""
    monkeypatch.setattr(grammar_trials, "MAX_VERDICTS", 3)
    held.let.release(100)
    for name in ("a", "b", "c", "a", "d"):
        await held.fault(f"regex:{name}", tenant="t")
    assert len(held._verdicts._kept) == 3
    held.tried.clear()
    for name in ("c", "a", "d", "b"):
        await held.fault(f"regex:{name}", tenant="t")
    assert held.tried == ["regex:b"]
    assert {len(key) for key in held._verdicts._kept} == {32}


async def test_a_call_that_is_given_up_leaves_the_line(held: HeldTrials) -> None:
    """The trial under way goes on, and its verdict is kept."""
    calls = [asyncio.create_task(held.fault(f"regex:{n}", tenant="t")) for n in range(5)]
    await until(lambda: held._pool.waiting == 4)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert held._pool.waiting == 0
    held.let.release(1)
    assert await held.fault("regex:0", tenant="t") is None
    assert held.tried == ["regex:0"]


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


async def test_calls_over_the_rate_reach_no_trial(start_service: Any, held: HeldTrials) -> None:
    """Requests per minute are counted before the trial."""
    allowance = Allowance(key="k", requests_per_minute=1)
    held.let.release(100)
    async with start_service(
        authenticate=lambda _scope: Tenant(name="t", allowance=allowance)
    ) as service:
        context = service.app.state.context
        service.app.state.context = replace(context, grammars=held)
        replies = [
            await service.post("/v1/completions", TEXT | {"structured_outputs": {"regex": f"a{n}"}})
            for n in range(5)
        ]
    assert [reply.status_code for reply in replies] == [200, 429, 429, 429, 429]
    assert len(held.tried) == 1
