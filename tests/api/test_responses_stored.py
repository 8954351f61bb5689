"""Stored responses: chains of them, their input items, references to items, and their lifetime."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.types import Scope

from service.api.http.auth import Tenant
from service.api.tools.formats import TOOL_FORMATS
from service.messages import FinishReason
from service.queues.contract import QueueLimits
from service.queues.memory.queue import MemoryQueue
from tests.support.waiting import PATIENCE, until

URL = "/v1/responses"
B: dict[str, Any] = {"max_output_tokens": 6, "seed": 3}
TOOLS = [{"type": "function", "name": "now"}]
CALL = TOOL_FORMATS["plain"].render([("now", '{"a": "é"}')])
LONG = QueueLimits(lease=10 * PATIENCE)


@pytest.fixture
async def service(start_service: Any) -> AsyncIterator[Any]:
    """A replica with room for conversations."""
    async with start_service(max_model_len=8192) as started:
        yield started


def random_turn(draw: random.Random) -> Any:
    """What a client sends next."""
    return draw.choice([
        "and then?",
        [{"role": "user", "content": "one"}, {"role": "developer", "content": "be short"}],
        [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
         {"role": "assistant", "content": [{"type": "output_text", "text": "x é"}]},
         {"role": "user", "content": [{"type": "input_text", "text": "go on"}]}],
        [{"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}"},
         {"type": "function_call_output", "call_id": "c1", "output": "12:00 😀"}],
    ])  # fmt: skip


def as_items(sent: Any) -> list[Any]:
    return [{"role": "user", "content": sent}] if isinstance(sent, str) else sent


@pytest.mark.parametrize("seed", range(6))
async def test_a_chain_is_one_conversation(start_service: Any, seed: int) -> None:
    """Each turn gets the prompt of all items sent at once, at any replica of the queue."""
    draw = random.Random(seed)
    async with (
        start_service(max_model_len=8192) as service,
        start_service(queue=service.queue, running=False, max_model_len=8192) as other,
    ):
        items: list[Any] = []
        previous = None
        for turn in range(4):
            with_call = draw.random() < 0.4
            said = service.tokenizer.encode(CALL if with_call else "fine", add_bos=False)
            service.engine.script = lambda _, said=said: said
            service.engine.end = draw.choice([FinishReason.STOP, FinishReason.LENGTH])
            sent = random_turn(draw)
            items += as_items(sent)
            options = B | {"tools": TOOLS, "instructions": draw.choice([None, f"be {turn}"])}
            replica = draw.choice([service, other])
            reply = await replica.post(
                URL, options | {"input": sent, "previous_response_id": previous}
            )
            response = reply.json()
            assert reply.status_code == 200, response
            assert response["previous_response_id"] == previous
            await service.post(URL, options | {"input": items, "store": False})
            chained, whole = service.engine.seen[-2:]
            assert chained.prompt_ids == whole.prompt_ids
            items += response["output"]
            previous = response["id"]


async def test_a_stream_continues_a_chain(service: Any, read_events: Any) -> None:
    first = (await service.post(URL, B | {"input": "hello"})).json()
    body = B | {"input": "more", "previous_response_id": first["id"]}
    second = (await service.post(URL, body)).json()
    streamed = await service.post(URL, body | {"stream": True})
    final = read_events(streamed.content)[-1]["response"]
    assert final["output"][0]["content"] == second["output"][0]["content"]
    again = await service.client.get(f"{URL}/{final['id']}", params={"stream": "true"})
    assert again.content == streamed.content


async def code_of(
    service: Any, body: dict[str, Any], **headers: str
) -> tuple[int, str | None, str | None]:
    reply = await service.post(URL, B | {"input": "x"} | body, **headers)
    error = reply.json().get("error") or {}
    return reply.status_code, error.get("code"), error.get("param")


async def test_parents_that_are_not_there(start_service: Any) -> None:
    """Deleted, foreign, unstored, unknown and malformed ids get the same answer."""

    def by_header(scope: Scope) -> Tenant:
        return Tenant(name=dict(scope["headers"]).get(b"x-tenant", b"public").decode())

    missing = (404, "previous_response_not_found", "previous_response_id")
    async with start_service(authenticate=by_header, max_model_len=8192) as service:
        ids = [(await service.post(URL, B | {"input": "hi"})).json()["id"] for _ in range(3)]
        unstored = (await service.post(URL, B | {"input": "hi", "store": False})).json()["id"]
        child = {"input": "b", "previous_response_id": ids[0]}
        grandchild = (await service.post(URL, B | child)).json()["id"]
        await service.client.delete(f"{URL}/{ids[0]}")
        for name in (ids[0], grandchild, unstored, "resp_x", "", "resp_s0-" + "0" * 32):
            assert await code_of(service, {"previous_response_id": name}) == missing, name
        foreign = {"previous_response_id": ids[1]}
        assert await code_of(service, foreign, x_tenant="other") == missing
        assert (await service.post(URL, B | {"input": "x"} | foreign)).status_code == 200
        reference = [{"type": "item_reference", "id": f"msg_{ids[1].removeprefix('resp_')}"}]
        assert (await code_of(service, {"input": reference}))[0] == 200
        nowhere = (404, "item_not_found", "input[0].id")
        assert await code_of(service, {"input": reference}, x_tenant="other") == nowhere
        assert len(service.engine.seen) == 7


async def test_a_parent_must_have_ended(service: Any) -> None:
    service.engine.pause = PATIENCE
    running = (await service.post(URL, B | {"input": "a", "background": True})).json()
    body = {"previous_response_id": running["id"]}
    busy = (409, "response_in_progress", "previous_response_id")
    assert await code_of(service, body) == busy
    await until(lambda: bool(service.engine.seen))
    await service.client.post(f"{URL}/{running['id']}/cancel")
    service.engine.pause = 0.0
    assert (await code_of(service, body))[0] == 200


async def test_chains_are_bounded(start_service: Any, small_limits: Any) -> None:
    async with start_service(limits=small_limits(max_chain=3), max_model_len=8192) as service:
        previous = None
        for _ in range(4):
            body = B | {"input": "a", "previous_response_id": previous}
            previous = (await service.post(URL, body)).json()["id"]
        too_long = (400, "chain_too_long", "previous_response_id")
        assert await code_of(service, {"previous_response_id": previous}) == too_long
    small = small_limits(max_body_bytes=1500)
    async with start_service(limits=small, max_model_len=8192) as service:
        previous = None
        for length in (700, 700):
            body = B | {"input": "a" * length, "previous_response_id": previous}
            previous = (await service.post(URL, body)).json()["id"]
        assert await code_of(service, {"previous_response_id": previous}) == too_long


async def test_input_items_are_listed_in_pages(service: Any) -> None:
    sent = [
        {"role": "user", "content": "one"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "12:00"},
        {"role": "assistant", "content": "two"},
    ]
    response = (await service.post(URL, B | {"input": sent})).json()
    path = f"{URL}/{response['id']}/input_items"
    whole = (await service.client.get(path, params={"order": "asc"})).json()
    assert whole["object"] == "list"
    assert [item["type"] for item in whole["data"]] == [
        "message", "reasoning", "function_call", "function_call_output", "message",
    ]  # fmt: skip
    assert whole["data"][0]["content"] == [{"type": "input_text", "text": "one"}]
    assert whole["data"][4]["content"][0]["type"] == "output_text"
    assert (whole["first_id"], whole["last_id"]) == (
        whole["data"][0]["id"], whole["data"][4]["id"],
    )  # fmt: skip
    newest_first = (await service.client.get(path)).json()
    assert newest_first["data"] == whole["data"][::-1]
    for order, expected in (("asc", whole["data"]), ("desc", whole["data"][::-1])):
        for limit in (1, 2, 5, 100):
            paged: list[Any] = []
            after: dict[str, Any] = {}
            has_more = True
            while has_more:
                options = {"order": order, "limit": limit, **after}
                page = (await service.client.get(path, params=options)).json()
                paged += page["data"]
                after, has_more = {"after": page["last_id"]}, page["has_more"]
            assert paged == expected
    for bad in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "msg_1"}):
        assert (await service.client.get(path, params=bad)).status_code == 400
    await service.client.delete(f"{URL}/{response['id']}")
    assert (await service.client.get(path)).status_code == 404


async def test_references_stand_for_items(service: Any) -> None:
    """Of input and output; a stored reference does not depend on the response that it named."""
    first = (await service.post(URL, B | {"input": "hello"})).json()
    path = f"{URL}/{first['id']}/input_items"
    (asked,) = (await service.client.get(path)).json()["data"]
    (said,) = first["output"]
    references = [{"id": asked["id"]}, {"type": "item_reference", "id": said["id"]}]
    second = (await service.post(URL, B | {"input": references})).json()
    plain = [{"role": "user", "content": "hello"}, said]
    await service.post(URL, B | {"input": plain})
    assert service.engine.seen[-2].prompt_ids == service.engine.seen[-1].prompt_ids
    await service.client.delete(f"{URL}/{first['id']}")
    body = {"input": "more", "previous_response_id": second["id"]}
    assert (await code_of(service, body))[0] == 200
    for unknown in (said["id"], "msg_x", second["output"][0]["id"] + "_9"):
        reference = [{"type": "item_reference", "id": unknown}]
        nowhere = (404, "item_not_found", "input[0].id")
        assert await code_of(service, {"input": reference}) == nowhere


async def test_there_is_no_compaction(service: Any) -> None:
    reply = await service.post(f"{URL}/compact", B | {"input": "a"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "unknown_url")


class Clock:
    """Seconds that only tests move."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_responses_are_kept_for_their_time(start_service: Any, small_limits: Any) -> None:
    """Each use of a chain starts the time of all of it again."""
    clock = Clock()
    queue = MemoryQueue(LONG, clock=clock)
    limits = small_limits(keep_responses=5000.0)
    async with start_service(queue=queue, limits=limits, max_model_len=8192) as service:
        first = (await service.post(URL, B | {"input": "a"})).json()["id"]
        unused = (await service.post(URL, B | {"input": "a"})).json()["id"]
        unstored = await service.post(URL, B | {"input": "a", "store": False})
        stored = await queue.lookup(unstored.headers["x-request-id"])
        assert stored is not None, "until the resume window is over"
        assert await queue.read_input(stored.id) is None
        previous = first
        for _ in range(4):
            clock.now += 4000
            body = B | {"input": "b", "previous_response_id": previous}
            previous = (await service.post(URL, body)).json()["id"]
        assert await queue.lookup(stored.id) is None
        assert (await service.client.get(f"{URL}/{unused}")).status_code == 404
        assert (await service.client.get(f"{URL}/{first}")).status_code == 200
        assert (await service.client.get(f"{URL}/{first}/input_items")).status_code == 200
        clock.now += 5001
        assert (await service.client.get(f"{URL}/{previous}")).status_code == 404


async def test_what_is_kept_does_not_refuse_new_calls(start_service: Any) -> None:
    """With a full store the oldest go; every new response can be continued."""
    limits = QueueLimits(lease=10 * PATIENCE, max_tenant_bytes=130_000)
    async with start_service(queue_limits=limits, max_model_len=8192) as service:
        ids = []
        for _ in range(12):
            reply = await service.post(URL, B | {"input": "a" * 4000})
            assert reply.status_code == 200
            ids.append(reply.json()["id"])
            follow = {"input": "b", "store": False, "previous_response_id": ids[-1]}
            assert (await code_of(service, follow))[0] == 200
        assert (await service.queue.depth()).stored_bytes <= 130_000
        assert (await code_of(service, {"previous_response_id": ids[0]}))[0] == 404


@pytest.mark.parametrize("seed", range(5))
async def test_truncation_drops_the_fewest_oldest_turns(start_service: Any, seed: int) -> None:
    draw = random.Random(seed)
    turns: list[list[dict[str, Any]]] = []
    for i in range(draw.randint(3, 8)):
        said = f"{i} " + "word " * draw.randint(1, 9)
        turn: list[dict[str, Any]] = [{"role": "user", "content": said}]
        if draw.random() < 0.5:
            turn += [
                {"type": "function_call", "call_id": f"c{i}", "name": "now", "arguments": "{}"},
                {"type": "function_call_output", "call_id": f"c{i}", "output": "12"},
            ]
        turns.append([*turn, {"role": "assistant", "content": "yes"}])
    turns.append([{"role": "user", "content": "last"}])
    system = [{"role": "system", "content": "be kind"}]

    def items(first: int) -> list[dict[str, Any]]:
        return [*system, *(item for turn in turns[first:] for item in turn)]

    async with start_service(max_model_len=256) as service:
        body = B | {"instructions": "short", "store": False}
        reply = await service.post(URL, body | {"input": items(0), "truncation": "auto"})
        assert reply.json()["truncation"] == "auto"
        (truncated,) = service.engine.seen
        fits = []
        for first in range(len(turns)):
            reply = await service.post(URL, body | {"input": items(first)})
            fits.append(reply.status_code == 200)
        assert fits == sorted(fits)
        whole = service.engine.seen[1] if any(fits) else None
        assert whole is not None
        assert truncated.prompt_ids == whole.prompt_ids
        long = [{"role": "user", "content": "word " * 400}]
        assert (await code_of(service, {"input": long, "truncation": "auto"}))[1] == (
            "context_length_exceeded"
        )


async def test_deleting_during_a_chain_is_an_error_of_the_client(service: Any) -> None:
    """Never one of the server, whichever is first."""
    for _ in range(10):
        first = (await service.post(URL, B | {"input": "a"})).json()["id"]
        replies = await asyncio.gather(
            service.post(URL, B | {"input": "b", "previous_response_id": first}),
            service.client.delete(f"{URL}/{first}"),
        )
        assert replies[0].status_code in {200, 404}
        assert replies[1].status_code == 200
