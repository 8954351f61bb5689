"""POST /v1/responses: body, stream, resumed stream and state agree, on any replica."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Scope

from service.api.http.auth import Tenant
from service.messages import FinishReason
from tests.support.waiting import PATIENCE, until

B: dict[str, Any] = {"model": "tiny-model", "input": "hello", "max_output_tokens": 8, "seed": 3}
URL = "/v1/responses"
TERMINAL = {
    "response.completed",
    "response.incomplete",
    "response.failed",
    "response.cancelled",
}


def random_body(draw: random.Random) -> dict[str, Any]:
    """Random requests for text, in all forms of input."""
    inputs: list[Any] = [
        "hello 😀",
        [{"role": "user", "content": "how are you"}],
        [
            {"type": "message", "role": "developer", "content": "be short"},
            {"role": "user", "content": [{"type": "input_text", "text": "one €"}]},
            {
                "type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
                "content": [
                    {"type": "output_text", "text": "x", "annotations": [], "logprobs": []}
                ],
            },
            {"role": "user", "content": "and?"},
        ],
    ]  # fmt: skip
    body = B | {
        "input": draw.choice(inputs),
        "seed": draw.randrange(2**64),
        "max_output_tokens": draw.randint(1, 20),
        "instructions": draw.choice([None, "be kind"]),
        "metadata": draw.choice([None, {"a": "b"}]),
    }
    if draw.random() < 0.4:
        body |= {"include": ["message.output_text.logprobs"], "top_logprobs": draw.randint(0, 3)}
    return body


def numbers(events: list[dict[str, Any]]) -> list[int]:
    return [event["sequence_number"] for event in events]


def core(response: dict[str, Any]) -> dict[str, Any]:
    """A response without its ids, its times and `background`."""
    apart = {"id", "created_at", "completed_at", "background"}
    fields = {k: v for k, v in response.items() if k not in apart}
    fields["output"] = [{k: v for k, v in item.items() if k != "id"} for item in response["output"]]
    return fields


def assemble(events: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    """Text and log probabilities of the deltas."""
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    return "".join(d["delta"] for d in deltas), [item for d in deltas for item in d["logprobs"]]


async def settled(service: Any, response_id: str) -> dict[str, Any]:
    """The response once it is final."""
    async with asyncio.timeout(PATIENCE):
        while True:
            reply = await service.client.get(f"{URL}/{response_id}")
            assert reply.status_code == 200
            response: dict[str, Any] = reply.json()
            if response["status"] not in {"queued", "in_progress"}:
                return response
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("seed", range(8))
async def test_body_stream_state_and_background_agree(
    service: Any, read_events: Any, seed: int
) -> None:
    draw = random.Random(seed)
    body = random_body(draw)
    service.engine.end = draw.choice([FinishReason.STOP, FinishReason.LENGTH])
    whole = (await service.post(URL, body)).json()
    (item,) = whole["output"]
    (part,) = item["content"]
    request = service.engine.seen[0]
    assert part["text"] == service.tokenizer.decode(service.engine.script(request))
    ended = service.engine.end is FinishReason.STOP
    assert (whole["status"], item["status"]) == (("completed" if ended else "incomplete"),) * 2
    assert whole["incomplete_details"] == (None if ended else {"reason": "max_output_tokens"})
    assert whole["usage"]["output_tokens"] == body["max_output_tokens"]
    assert (await service.client.get(f"{URL}/{whole['id']}")).json() == whole

    streamed = read_events((await service.post(URL, body | {"stream": True})).content)
    assert core(streamed[-1]["response"]) == core(whole)
    assert assemble(streamed) == (part["text"], part["logprobs"])
    assert numbers(streamed) == sorted(set(numbers(streamed)))
    kinds = [event["type"] for event in streamed]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:-1] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
    ]  # fmt: skip
    assert [kind for kind in kinds if kind in TERMINAL] == kinds[-1:]
    assert kinds[-1] == f"response.{whole['status']}"

    reply = await service.post(URL, body | {"background": True})
    queued = reply.json()
    assert (queued["status"], queued["output"], queued["usage"]) == ("queued", [], None)
    assert core(await settled(service, queued["id"])) == core(whole)


@pytest.mark.parametrize("seed", range(4))
async def test_a_stream_resumes_after_any_number(service: Any, seed: int) -> None:
    """With the same bytes, during the generation and after it."""
    draw = random.Random(100 + seed)
    body = random_body(draw) | {"stream": True, "background": draw.random() < 0.5}
    service.engine.pause = 0.001
    reply = await service.post(URL, body)
    events = reply.content.split(b"\n\n")[:-1]
    response_id = f"resp_{reply.headers['x-request-id']}"
    again = await service.client.get(f"{URL}/{response_id}", params={"stream": "true"})
    assert again.content == reply.content
    assert again.headers["content-type"].startswith("text/event-stream")
    for index, event in enumerate(events):
        number = json.loads(event.split(b"data: ")[1])["sequence_number"]
        rest = await service.client.get(
            f"{URL}/{response_id}", params={"stream": "true", "starting_after": number}
        )
        assert rest.content == b"".join(e + b"\n\n" for e in events[index + 1 :]), number


@pytest.mark.slow
async def test_readers_join_during_the_generation(start_service: Any, read_events: Any) -> None:
    """On two replicas of one queue, from the start and from the middle."""
    async with (
        start_service() as service,
        start_service(queue=service.queue, running=False) as other,
    ):
        service.engine.pause = 0.03
        body = B | {"stream": True, "max_output_tokens": 60}
        call = asyncio.create_task(service.post(URL, body))
        while not service.engine.seen:
            await asyncio.sleep(0.001)
        path = f"{URL}/resp_{service.engine.seen[0].id.removesuffix('.0')}"
        while (await other.client.get(path)).json()["status"] == "queued":
            await asyncio.sleep(0.002)
        state = (await other.client.get(path)).json()
        assert (state["status"], state["usage"]) == ("in_progress", None)
        assert state["output"][0]["status"] == "in_progress"
        replies = await asyncio.gather(
            other.client.get(path, params={"stream": "true"}),
            other.client.get(path, params={"stream": "true", "starting_after": 3}),
        )
        events = read_events((await call).content)
        assert read_events(replies[0].content) == events
        assert read_events(replies[1].content) == events[4:]


async def test_numbers_within_a_record_and_beyond_the_end(
    service: Any, read_events: Callable[[bytes], list[dict[str, Any]]]
) -> None:
    """A number counts tokens, so it may lie within a record if the journal was written again."""
    service.engine.script = lambda request: [10] * request.max_tokens
    reply = await service.post(URL, B | {"stream": True})
    path = f"{URL}/resp_{reply.headers['x-request-id']}"
    seen = set(numbers_of(reply.content))
    assert max(seen) == 7 + 8
    for number in range(17):
        rest = await service.client.get(path, params={"stream": "1", "starting_after": number})
        assert rest.status_code == (200 if number <= 15 else 400), number
        deltas = [e["delta"] for e in read_events(rest.content) if "delta" in e]
        left = service.tokenizer.decode([10] * min(8, 11 - number))
        assert "".join(deltas) == (left if number < 11 else ""), number
    assert len(seen) < 16, "a record of several tokens was among them"
    for bad in ("-1", "x", "1.5", "9" * 30):
        rest = await service.client.get(path, params={"stream": "1", "starting_after": bad})
        assert (rest.status_code, rest.json()["error"]["param"]) == (400, "starting_after")
    rest = await service.client.get(path, params={"starting_after": 1})
    assert rest.status_code == 400


def numbers_of(content: bytes) -> list[int]:
    lines = [line for line in content.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line[6:])["sequence_number"] for line in lines]


async def test_cancelling(service: Any, read_events: Any) -> None:
    service.engine.pause = 0.01
    body = B | {"max_output_tokens": 200, "stream": True}
    call = asyncio.create_task(service.post(URL, body))
    while not service.engine.seen:
        await asyncio.sleep(0.001)
    path = f"{URL}/resp_{service.engine.seen[0].id.removesuffix('.0')}"
    while (await service.client.get(path)).json()["status"] == "queued":
        await asyncio.sleep(0.002)
    cancelled = (await service.client.post(f"{path}/cancel")).json()
    last = read_events((await call).content)[-1]
    assert (last["type"], last["response"]) == ("response.cancelled", cancelled)
    assert (cancelled["status"], cancelled["output"][0]["status"]) == ("cancelled", "incomplete")
    assert (await service.client.post(f"{path}/cancel")).json() == cancelled
    await until(lambda: bool(service.engine.fenced))
    assert service.engine.fenced == [service.engine.seen[0].id]


async def test_deleting(service: Any) -> None:
    response = (await service.post(URL, B)).json()
    path = f"{URL}/{response['id']}"
    gone = await service.client.delete(path)
    assert gone.json() == {"id": response["id"], "object": "response", "deleted": True}
    for method, url in (("GET", path), ("DELETE", path), ("POST", f"{path}/cancel")):
        reply = await service.client.request(method, url)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "response_not_found")
    running = (await service.post(URL, B | {"background": True, "max_output_tokens": 99})).json()
    await service.client.delete(f"{URL}/{running['id']}")
    assert (await service.queue.depth()).running_requests == 0


async def test_a_response_that_is_not_stored_cannot_be_retrieved(service: Any) -> None:
    for stream in (False, True):
        reply = await service.post(URL, B | {"store": False, "stream": stream})
        assert reply.status_code == 200
        call_id = reply.headers["x-request-id"]
        for path in (f"{URL}/resp_{call_id}", f"/v1/streams/{call_id}"):
            assert (await service.client.get(path)).status_code == 404
    refused = await service.post(URL, B | {"store": False, "background": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "background")


async def test_unknown_ids(start_service: Any) -> None:
    """Another tenant's, a chat's, malformed and expired ids get the same error."""

    def by_header(scope: Scope) -> Tenant:
        return Tenant(name=dict(scope["headers"]).get(b"x-tenant", b"public").decode())

    async with start_service(authenticate=by_header) as service:
        mine = (await service.post(URL, B)).json()["id"]
        chat = {"model": "tiny-model", "prompt": "x", "max_tokens": 2}
        other = (await service.post("/v1/completions", chat)).headers["x-request-id"]
        bodies = set()
        for name, tenant in (
            (mine, "other"),
            (mine.removeprefix("resp_"), "public"),
            (f"resp_{other}", "public"),
            ("resp_" + "x" * 3000, "public"),
            ("resp_s0-" + "0" * 32, "public"),
        ):
            reply = await service.client.get(f"{URL}/{name}", headers={"x-tenant": tenant})
            assert reply.status_code == 404
            bodies.add(reply.text)
        assert len(bodies) == 1


async def test_a_failed_response(service: Any, read_events: Any) -> None:
    """A client that waits for the body gets an HTTP status; other readers get the state."""
    service.engine.end, service.engine.error = FinishReason.ERROR, "engine_crash_loop"
    reply = await service.post(URL, B)
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "engine_crash_loop")
    assert reply.headers["x-should-retry"] == "false"
    state = (await service.client.get(f"{URL}/resp_{reply.headers['x-request-id']}")).json()
    assert (state["status"], state["error"]["code"]) == ("failed", "engine_crash_loop")
    last = read_events((await service.post(URL, B | {"stream": True})).content)[-1]
    assert last["type"] == "response.failed"
    assert core(last["response"]) == core(state)


async def test_deadlines(start_service: Any, small_limits: Any, read_events: Any) -> None:
    async with start_service(running=False) as service:
        call = asyncio.create_task(service.post(URL, B, x_request_timeout_ms="20"))
        while not call.done():  # until it is admitted
            await asyncio.sleep(0.02)
            await service.queue.sweep()
        reply = await call
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
        state = await settled(service, f"resp_{reply.headers['x-request-id']}")
        assert (state["status"], state["error"]["code"]) == ("failed", "deadline_exceeded")
    async with start_service() as service:
        service.engine.end = FinishReason.DEADLINE
        last = read_events((await service.post(URL, B | {"stream": True})).content)[-1]
        assert last["type"] == "response.incomplete"
        assert last["response"]["incomplete_details"] == {"reason": "deadline"}


async def test_an_idempotency_key_has_one_response(service: Any) -> None:
    service.engine.pause = 0.003
    replies = await asyncio.gather(*(service.post(URL, B, idempotency_key="k1") for _ in range(10)))
    assert len({reply.content for reply in replies}) == 1
    assert len(service.engine.seen) == 1
    other = await service.post(URL, B | {"background": True}, idempotency_key="k1")
    assert other.status_code == 409
    assert other.headers["x-should-retry"] == "false"
    first = (await service.post(URL, B | {"background": True}, idempotency_key="k2")).json()
    await settled(service, first["id"])
    second = (await service.post(URL, B | {"background": True}, idempotency_key="k2")).json()
    assert (second["id"], second["status"]) == (first["id"], "incomplete")


async def test_a_divergence_ends_the_stream(service: Any, read_events: Any) -> None:
    service.engine.bad_digest_at = 3
    events = read_events((await service.post(URL, B | {"stream": True})).content)
    assert (events[-1]["type"], events[-1]["code"]) == ("error", "stream_divergence")
    assert not TERMINAL & {event["type"] for event in events}


INVALID: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{"type": "web_surf"}]}, "tools[0].type", "invalid_value"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"conversation": "c"}, "conversation", "unsupported_parameter"),
    ({"reasoning": {"effort": "lots"}}, "reasoning.effort", "invalid_value"),
    ({"text": {"verbosity": "lots"}}, "text.verbosity", "invalid_value"),
    ({"text": {"format": {"type": "yaml"}}}, "text.format.type", "invalid_value"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format", "missing_required_parameter"),
    ({"truncation": "some"}, "truncation", "invalid_value"),
    ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
    ({"max_tool_calls": 0}, "max_tool_calls", "integer_below_min_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options.include_usage",
     "unknown_parameter"),
    ({"n": 2}, "n", "unsupported_parameter"),
    ({"max_tokens": 2}, "max_tokens", "unknown_parameter"),
    ({"messages": []}, "messages", "unknown_parameter"),
    ({"include": ["file_search_call"]}, "include[0]", "invalid_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
    ({"max_output_tokens": 10**6}, "max_output_tokens", "context_length_exceeded"),
    ({"input": "a b " * 300}, "input", "context_length_exceeded"),
    ({"input": []}, "input", "array_below_min_length"),
    ({"input": 5}, "input", "invalid_type"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "invalid_value"),
    ({"input": [{"type": "computer_call"}]}, "input[0].type", "invalid_value"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content",
        "unsupported_content",
    ),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "object_above_max_length"),
    ({"background": True, "on_disconnect": "cancel"}, "on_disconnect", "invalid_value"),
]  # fmt: skip


async def test_unsupported_and_invalid_fields(service: Any) -> None:
    wrong = []
    for fields, param, code in INVALID:
        reply = await service.post(URL, B | fields)
        error = reply.json().get("error", {})
        got = (reply.status_code, error.get("param"), error.get("code"))
        if got != (400, param, code):
            wrong.append((fields, got))
    assert wrong == []
    harmless: dict[str, Any] = {
        "tools": [], "tool_choice": "auto", "text": {"format": {"type": "text"}},
        "truncation": "disabled", "parallel_tool_calls": True, "reasoning": None,
        "previous_response_id": None, "service_tier": "auto", "include": [], "user": "u",
    }  # fmt: skip
    assert (await service.post(URL, B | harmless)).status_code == 200
