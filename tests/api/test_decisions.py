"""POST /v1/decisions over a real queue: the engine answers with the tokens that a request scores,
whose log probabilities are functions of the tokens.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from service.api.http.auth import only_with_key
from service.keys import Key
from service.messages import GenerationRequest
from service.queues.contract import QueueLimits
from tests.api.conftest import MODEL, Service, StartService
from tests.support.waiting import PATIENCE

PATH = "/v1/decisions"
WORDS = ("hello", "world", "the answer", "the answer is", "the", "plain", "é", "h", "hell", "yes")
PREDICATE = {"type": "predicate", "instructions": "It is plain."}


def scored_tokens(request: GenerationRequest) -> Sequence[int]:
    return [each[-1] for each in request.scored]


@pytest.fixture
async def decider(start_service: StartService) -> AsyncIterator[Service]:
    async with start_service() as service:
        service.engine.script = scored_tokens
        yield service


def body_of(*questions: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "hello world", "questions": list(questions), **fields}


def choice(*values: str | bool, **fields: Any) -> dict[str, Any]:
    listed = [{"value": value} for value in values]
    return {"type": "choice", "instructions": "Which?", "choices": listed, **fields}


async def answers(service: Service, *questions: dict[str, Any], **fields: Any) -> list[Any]:
    reply = await service.post(PATH, body_of(*questions, **fields))
    assert reply.status_code == 200, reply.text
    return list(reply.json()["answers"])


async def refused(service: Service, body: dict[str, Any], **headers: str) -> Any:
    reply = await service.post(PATH, body, **headers)
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


def expected(service: Service, texts: Sequence[str]) -> list[float]:
    """By the products of the probabilities that the engine gives to tokens, without logarithms."""
    encode = service.tokenizer.encode
    ids = [tuple(encode(text, add_bos=False)) for text in texts]
    nested = any(a != b and b[: len(a)] == a for a in ids for b in ids)
    (end,) = service.tokenizer.eos_ids
    products = [
        math.prod(math.exp(-token / 7) for token in (*each, *([end] if nested else [])))
        for each in ids
    ]
    return [each / sum(products) for each in products]


@pytest.mark.parametrize("seed", range(20))
async def test_a_probability_is_the_share_of_the_product_over_tokens(
    decider: Service, seed: int
) -> None:
    draw = random.Random(seed)
    values = draw.sample(WORDS, draw.randint(2, len(WORDS)))
    (found,) = await answers(decider, choice(*values, name="n"))
    probs = [each["probability"] for each in found["probabilities"]]
    assert probs == pytest.approx(expected(decider, values), rel=1e-9)
    assert [each["value"] for each in found["probabilities"]] == values
    assert (found["type"], found["name"]) == ("choice", "n")
    assert (found["choice"], found["confidence"]) == (values[probs.index(max(probs))], max(probs))
    levels = {
        "type": "score", "instructions": "?", "levels": [{"label": value} for value in values]
    }  # fmt: skip
    (score,) = await answers(decider, levels)
    assert [each["probability"] for each in score["probabilities"]] == probs
    assert score["score"] == pytest.approx(sum(i * prob for i, prob in enumerate(probs)))
    assert [(each["label"], each["value"]) for each in score["probabilities"]] == [
        (value, index) for index, value in enumerate(values)
    ]


async def test_a_predicate_has_the_probability_of_yes(decider: Service) -> None:
    (found,) = await answers(decider, PREDICATE)
    yes, _ = expected(decider, ["yes", "no"])
    assert found == {"type": "predicate", "name": None, "probability": pytest.approx(yes)}


async def test_a_text_and_a_boolean_are_distinct(decider: Service) -> None:
    (plain,) = await answers(decider, choice(True, False))
    assert {each["value"] for each in plain["probabilities"]} == {True, False}
    assert all(type(each["value"]) is bool for each in plain["probabilities"])
    (mixed,) = await answers(decider, choice("true", True))
    assert [each["value"] for each in mixed["probabilities"]] == ["true", True]
    probs = [each["probability"] for each in mixed["probabilities"]]
    assert probs == pytest.approx(expected(decider, ['"true"', "true"]))


@pytest.mark.parametrize("seed", range(5))
async def test_a_question_is_answered_alone_as_among_others_in_any_order(
    decider: Service, seed: int
) -> None:
    draw = random.Random(seed)
    asked = [
        {**PREDICATE, "instructions": f"Number {n}."} if n % 2 else choice(*draw.sample(WORDS, 3))
        for n in range(6)
    ]
    alone = [json.dumps(await answers(decider, each)) for each in asked]
    order = draw.sample(range(6), 6)
    together = await answers(decider, *(asked[n] for n in order))
    assert [json.dumps([each]) for each in together] == [alone[n] for n in order]


async def test_requests_share_prompts_and_tokens_that_options_have_in_common(
    decider: Service,
) -> None:
    """One request per question, which scores each token once; its prompt counts once, in the answer
    and in the usage.
    """
    reply = await decider.post(PATH, body_of(choice("the answer", "the answer is"), PREDICATE))
    asked = decider.engine.seen
    assert len(asked) == 2
    for each in asked:
        assert len(set(each.scored)) == len(each.scored) == each.max_tokens
    num = sum(len(each.scored) for each in asked)
    usage = reply.json()["usage"]
    prompts = sum(len(each.prompt_ids) for each in asked)
    assert (usage["input_tokens"], usage["output_tokens"]) == (prompts, num)
    assert usage["input_tokens_details"]["cached_tokens"] == 2 * 2  # the engine's constant
    (used,) = (await decider.client.get("/v1/usage")).json()["data"]
    assert (used["prompt_tokens"], used["generated_tokens"]) == (prompts, num)
    (report,) = decider.observer.reports
    assert (report.prompt_tokens, report.cached_tokens) == (prompts, 4)


async def test_an_input_is_a_text_or_items_whose_json_is_text(decider: Service) -> None:
    items = [
        {"role": "developer", "content": "Be fair."},
        {"role": "user", "content": [
            {"type": "input_text", "text": "hi", "prompt_cache_breakpoint": {"mode": "explicit"}},
            {"type": "input_json", "data": {"a": [1]}},
        ]},
        {"type": "message", "role": "user", "content": "world"},
    ]  # fmt: skip
    await answers(decider, PREDICATE, input=items)
    ids = min((each.prompt_ids for each in decider.engine.seen), key=len)
    prompt = decider.tokenizer.decode(ids, skip_special=False)
    assert "system\nBe fair.<|im_end|>" in prompt
    assert 'user\nhi\n{"a":[1]}\n\n\nworld\n\nIt is plain.\n\nIs this true?' in prompt
    assert prompt.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"questions": []}, "questions", "must have 1 or more items"),
        ({"questions": [{"type": [], "instructions": ""}]}, "questions[0].type",
         "must be predicate, choice or score"),
        ({"questions": [{"type": "choice", "instructions": "", "choices": ["a", "b"]}]},
         "questions[0].choices[0]", "must be an object"),
        ({"questions": [choice("a") | {"choices": [{"value": 1}] * 2}]},
         "questions[0].choices[0].value", "string or a boolean"),
        ({"questions": {}}, "questions", "must be a list"),
        ({"input": None}, "input", "must be a string or a list of items"),
        ({"questions": [choice("a", "a")]}, "questions[0].choices", "same option twice"),
        ({"questions": [choice("a", "")]}, "questions[0].choices[1].value", "must not be empty"),
        ({"questions": [choice("a")]}, "questions[0].choices", "must have 2 or more items"),
        ({"questions": [choice("h" * 400, "e")]}, "input", "context length"),
        ({"questions": [choice("h" * 60 + str(n), "e" * 60 + str(n)) for n in range(200)]},
         "questions", "at most 16384 tokens"),
        ({"questions": [choice("a", "b")] * 401}, "questions", "at most 400"),
        ({"input": "word " * 300}, "input", "context length"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": ""}]},
         "input[0].call_id", "needs an earlier call"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type", "message"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]},
         "input[0].content", "only parts"),
        ({"input": [{"role": "user", "content": [{"type": "input_json", "data": [1]}]}]},
         "input", "input_json"),
        ({"temperature": 1}, "temperature", "extra"),
    ],
)  # fmt: skip
async def test_what_cannot_be_decided_is_refused(
    decider: Service, fields: dict[str, Any], param: str, message: str
) -> None:
    error = await refused(decider, body_of(PREDICATE) | fields)
    assert error["param"] == param
    assert message in error["message"]
    assert decider.engine.seen == []


@pytest.mark.parametrize("limits", [{"max_requests": 2}, {"max_per_tenant": 2}, {}])
async def test_more_questions_than_requests_in_flight_are_refused_for_good(
    start_service: StartService, limits: dict[str, int]
) -> None:
    """A 429 would have clients try again, for ever."""
    key = Key(name="small", sha256="0" * 64, max_in_flight=None if limits else 2)
    async with start_service(
        authenticate=only_with_key(lambda _secret: key),
        queue_limits=QueueLimits(lease=10 * PATIENCE, **limits),
    ) as service:
        service.engine.script = scored_tokens
        error = await refused(service, body_of(*[PREDICATE] * 3), authorization="Bearer x")
        assert "at most 2 questions" in error["message"]
        reply = await service.post(PATH, body_of(*[PREDICATE] * 2), authorization="Bearer x")
        assert reply.status_code == 200


@pytest.mark.slow
async def test_as_many_questions_as_openai_takes(decider: Service) -> None:
    asked = [choice(*WORDS, name=str(number)) for number in range(400)]
    found = await answers(decider, *asked)
    (alone,) = await answers(decider, choice(*WORDS))
    assert [each.pop("name") for each in found] == [str(number) for number in range(400)]
    assert all(each | {"name": None} == alone for each in found)
    assert len(decider.engine.seen) == 401


async def test_many_options_share_their_first_tokens(start_service: StartService) -> None:
    values = [chr(0x100 + number) for number in range(200)]  # of two bytes, each a token
    async with start_service(max_model_len=4096) as decider:
        decider.engine.script = scored_tokens
        (found,) = await answers(decider, choice(*values))
        (asked,) = decider.engine.seen
        assert 200 < len(asked.scored) < 400
        probs = [each["probability"] for each in found["probabilities"]]
        assert probs == pytest.approx(expected(decider, values), rel=1e-9)


async def test_a_repeated_key_gets_the_same_decision(decider: Service) -> None:
    first = await decider.post(PATH, body_of(PREDICATE), idempotency_key="k")
    computed = len(decider.engine.seen)
    again = await decider.post(PATH, body_of(PREDICATE), idempotency_key="k")
    assert first.content == again.content
    assert len(decider.engine.seen) == computed
    other = await decider.post(PATH, body_of(choice("a", "b")), idempotency_key="k")
    assert other.status_code == 409
    stored = (await decider.client.get(f"{PATH}/{first.json()['id']}")).json()
    assert (stored["status"], stored["result"]) == ("completed", first.json())


async def test_a_decision_in_the_background_is_read_by_its_id(start_service: StartService) -> None:
    async with start_service(running=False) as service:
        service.engine.script = scored_tokens
        begun = (await service.post(PATH, body_of(PREDICATE, background=True))).json()
        assert (begun["status"], begun["completed"], begun["result"]) == ("queued", 0, None)
        path = f"{PATH}/{begun['id']}"
        running = asyncio.create_task(service.engine.run())
        async with asyncio.timeout(PATIENCE):
            while (found := (await service.client.get(path)).json())["status"] != "completed":
                await asyncio.sleep(0.005)  # nothing else in the loop waits
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        (asked,) = service.engine.seen
        assert found["completed"] == found["inputs"] == len(asked.scored)
        (answer,) = found["result"]["answers"]
        assert answer["probability"] == pytest.approx(expected(service, ["yes", "no"])[0])
        stream = await service.client.get(f"/v1/streams/{begun['id']}")
        assert stream.json()["error"]["code"] == "not_a_stream"
        assert PATH in stream.json()["error"]["message"]
        elsewhere = await service.client.get(f"/v1/encodings/{begun['id']}")
        assert elsewhere.status_code == 404
        unknown = await service.client.get("/v1/encodings/nothing")
        assert unknown.json()["error"]["code"] == "call_not_found"


async def test_a_cancelled_decision_says_so(start_service: StartService) -> None:
    async with start_service(running=False) as service:
        begun = (await service.post(PATH, body_of(PREDICATE, background=True))).json()
        await service.client.delete(f"/v1/streams/{begun['id']}")
        found = (await service.client.get(f"{PATH}/{begun['id']}")).json()
        assert (found["status"], found["result"]) == ("cancelled", None)


async def test_a_deadline_is_an_error(start_service: StartService, small_limits: Any) -> None:
    limits = replace(small_limits(), sweep_interval=0.01)
    async with (
        start_service(running=False, limits=limits) as service,
        service.app.router.lifespan_context(service.app),
    ):
        reply = await service.post(PATH, body_of(PREDICATE), x_request_timeout_ms="1")
        assert reply.status_code == 504, reply.text
