"""Resuming after the store lost a part of the journal: exact continuation, a wait, or an error."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from model.text.tokenizer import Tokenizer
from service.engine.output import OutputBuilder
from service.messages import (
    End,
    FinishReason,
    GenerationRequest,
    Record,
    TokenLogprob,
    Tokens,
    rolling_digest,
)
from service.queues.contract import QueueLimits, Write
from service.queues.memory.queue import MemoryQueue
from tests.queues.builders import make_engine
from tests.support.builders import at_length, slowly

B = {"model": "tiny-model", "prompt": "hello", "max_tokens": 40, "seed": 3, "stream": True}
IDS = {"x_quire_event_ids": "1"}
Starts = Callable[..., Any]


def event_ids(content: bytes) -> list[str]:
    lines = content.decode().split("\n")
    return [line.removeprefix("id: ") for line in lines if line.startswith("id: ")]


def choices_of(content: bytes) -> list[dict[str, Any]]:
    """The choices of a stream's events, without what differs between two calls."""
    lines = [line[6:] for line in content.split(b"\n") if line.startswith(b"data: {")]
    return [choice for line in lines for choice in json.loads(line).get("choices", [])]


def text_of(content: bytes) -> str:
    return "".join(choice["text"] for choice in choices_of(content))


def after(content: bytes, event_id: str) -> bytes:
    """What follows the event with this id."""
    events = content.split(b"\n\n")
    index = next(i for i, e in enumerate(events) if e.startswith(f"id: {event_id}\n".encode()))
    return b"\n\n".join(events[index + 1 :])


def in_pieces(
    tokenizer: Tokenizer, request: GenerationRequest, ids: Sequence[int], sizes: Iterator[int]
) -> list[Record]:
    """The journal that an engine writes whose steps give so many tokens each."""
    skip = request.skip_special_tokens
    table = tokenizer.token_bytes if skip else tokenizer.visible_bytes
    answer = OutputBuilder(request, token_bytes=table, eos_ids=tokenizer.eos_ids)
    records: list[Record] = []
    while answer.reason is None:
        step = ids[answer.count : answer.count + next(sizes)]
        scored: list[TokenLogprob] = []
        if request.sampling.top_logprobs is not None:
            scored = [TokenLogprob(-token / 7, ((token, -token / 7),)) for token in step]
        records.append(answer.take(step, scored))
    records.append(answer.end(answer.reason))
    return records


def replace_journal(queue: MemoryQueue, request_id: str, records: Sequence[Record]) -> None:
    """As after the loss of all of it, when another engine has written it again."""
    entry = queue._entries[request_id]
    entry.journal[:] = [record for record in records if isinstance(record, Tokens)]
    entry.end = next((record for record in records if isinstance(record, End)), None)


@pytest.mark.parametrize("seed", [0, *slowly(1, 2, 3), *at_length(*range(4, 10))])
async def test_a_journal_in_other_pieces_goes_on_from_every_token(
    service: Any, tokenizer: Tokenizer, seed: int
) -> None:
    """Wherever the new pieces are cut: characters of several tokens, held back stop strings, log
    probabilities. What a reader has before an event and gets after it is one answer.
    """
    draw = random.Random(seed)
    text = "hello €5 één 😀😀 world<s> how are you €"
    plain = tokenizer.encode(text, add_bos=False, parse_special=True)
    ids = [draw.choice(plain) for _ in range(40)]
    shown = draw.random() < 0.5
    middle = tokenizer.decode(ids[25:30], skip_special=not shown)
    stop = [[], ["zzz", " w"], [middle], [middle, "😀 never", "é"]][seed % 4]
    body = B | {
        "stop": stop, "logprobs": draw.choice([None, 1]), "ignore_eos": True,
        "skip_special_tokens": not shown, "include_stop_str_in_output": draw.random() < 0.5,
    }  # fmt: skip
    ones: Iterator[int] = iter(lambda: 1, 0)
    service.engine.records = lambda request: iter(in_pieces(tokenizer, request, ids, ones))
    whole = await service.post("/v1/completions", body, **IDS)
    assert whole.status_code == 200
    request = service.engine.seen[-1]
    sizes: Iterator[int] = iter(lambda: draw.choice([1, 2, 5, 11]), 0)
    for pieces in (iter(lambda: 99, 0), sizes):
        replace_journal(service.queue, request.id, in_pieces(tokenizer, request, ids, pieces))
        path = f"/v1/streams/{whole.headers['x-request-id']}"
        for event_id in event_ids(whole.content):
            resumed = await service.client.get(path, params={"after": event_id})
            assert resumed.status_code == 200, (event_id, resumed.text)
            rest = after(whole.content, event_id)
            assert text_of(resumed.content) == text_of(rest), event_id
            assert scored(resumed.content) == scored(rest), event_id
            assert resumed.content.endswith(b"data: [DONE]\n\n")


def scored(content: bytes) -> list[Any]:
    """Tokens with their log probabilities and offsets."""
    columns = [choice["logprobs"] for choice in choices_of(content) if choice["logprobs"]]
    names = ("tokens", "token_logprobs", "text_offset")
    return [item for c in columns for item in zip(*(c[name] for name in names), strict=True)]


async def test_an_open_stream_goes_on_in_other_pieces(
    start_service: Starts, tokenizer: Tokenizer
) -> None:
    """The reader of a running answer is in the middle of a piece, and comes back there."""
    ids = tokenizer.encode("hello world how are you, and so on", add_bos=False)
    async with start_service(running=False) as service:
        call = asyncio.create_task(service.post("/v1/completions", B | {"max_tokens": len(ids)}))
        while not (claims := await service.queue.claim(make_engine(), limit=1, wait=1.0)):
            await asyncio.sleep(0)
        (claim,) = claims
        request = claim.request
        ones = in_pieces(tokenizer, request, ids, iter(lambda: 1, 0))
        path = f"/v1/streams/{request.id.removesuffix('.0')}"
        await service.queue.write([Write(claim.lease, record) for record in ones[:5]])
        replace_journal(service.queue, request.id, ones[:2])
        digest = rolling_digest(ids[:5])
        waiting = asyncio.create_task(
            service.client.get(path, params={"after": f"5.{digest & 0xFFFFFF:06x}"})
        )
        await asyncio.sleep(0.05)
        assert not waiting.done()
        pieces = in_pieces(tokenizer, request, ids, iter([2, 4, 99]))
        await service.queue.write([Write(claim.lease, record) for record in pieces[1:]])
        resumed = await waiting
        assert text_of(resumed.content) == tokenizer.decode(ids[5:])
        assert text_of((await call).content) == tokenizer.decode(ids)


class Stuck(MemoryQueue):
    """Its journals can be set back, and no engine writes them again."""

    def set_back(self, request_id: str, *, count: int) -> None:
        entry = self._entries[request_id]
        entry.journal[:] = [record for record in entry.journal if record.end <= count]


def reply_of(reply: Any) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


async def begun(service: Any, *, tokens: int) -> tuple[asyncio.Task[Any], str, list[int]]:
    """A running call, its request's id and the tokens of its journal, of which there are enough."""
    service.engine.pause = 0.002
    call = asyncio.create_task(service.post("/v1/completions", B | {"max_tokens": 200}))
    while not service.engine.seen:
        await asyncio.sleep(0.001)
    request_id = service.engine.seen[-1].id
    while service.queue._entries[request_id].count < tokens:
        await asyncio.sleep(0.001)
    service.engine.pause = 30.0
    records = await service.queue.read(request_id)
    return call, request_id, [token for record in records for token in record.ids]


def event_id_of(ids: Sequence[int]) -> str:
    return f"{len(ids)}.{rolling_digest(ids) & 0xFFFFFF:06x}"


async def test_a_journal_that_stays_behind_is_no_divergence(start_service: Starts) -> None:
    """After the time of a failover: 503, and when to come again."""
    queue = Stuck(QueueLimits(lease=0.2, failover_margin=0.1))
    async with start_service(queue=queue) as service:
        call, request_id, ids = await begun(service, tokens=20)
        queue.set_back(request_id, count=10)
        path = f"/v1/streams/{request_id.removesuffix('.0')}"
        began = asyncio.get_running_loop().time()
        reply = await service.client.get(path, params={"after": event_id_of(ids)})
        waited = asyncio.get_running_loop().time() - began
        assert reply_of(reply) == (503, "journal_behind")
        assert int(reply.headers["retry-after"]) >= 1
        assert "x-should-retry" not in reply.headers
        assert waited >= queue.limits.failover - 0.05
        call.cancel()


async def test_only_other_tokens_are_a_divergence(start_service: Starts) -> None:
    """Found at once, also while the answer runs; the same tokens go on."""
    async with start_service() as service:
        call, request_id, ids = await begun(service, tokens=20)
        path = f"/v1/streams/{request_id.removesuffix('.0')}"
        other = [*ids[:9], ids[9] ^ 1]
        reply = await service.client.get(path, params={"after": event_id_of(other)})
        assert reply_of(reply) == (409, "stream_divergence")
        assert reply.headers["x-should-retry"] == "false"
        await service.queue.stop([request_id], FinishReason.CANCELLED)
        same = await service.client.get(path, params={"after": event_id_of(ids[:10])})
        assert same.status_code == 200
        beyond = [*ids, 5]  # the answer has ended, and never had this token
        reply = await service.client.get(path, params={"after": event_id_of(beyond)})
        assert reply_of(reply) == (409, "stream_divergence")
        await call


async def test_a_reader_ahead_of_the_journal_waits_for_it(service: Any) -> None:
    """The tail that the store lost is written again by the engine that lives."""
    whole = await service.post("/v1/completions", B, **IDS)
    event_id = next(each for each in event_ids(whole.content) if each.startswith("2"))
    service.engine.pause = 0.004
    call = asyncio.create_task(service.post("/v1/completions", B))
    while len(service.engine.seen) < 2:
        await asyncio.sleep(0.001)
    path = f"/v1/streams/{service.engine.seen[1].id.removesuffix('.0')}"
    resumed = await service.client.get(path, params={"after": event_id})
    assert choices_of(resumed.content) == choices_of(after(whole.content, event_id))
    await call


@pytest.mark.slow
async def test_a_wait_lasts_as_long_as_the_journal_grows(
    start_service: Starts, tokenizer: Tokenizer
) -> None:
    """A failover bounds each silence, not the time that an engine takes to catch up."""
    queue = MemoryQueue(QueueLimits(lease=0.4, failover_margin=0.1))
    ids = tokenizer.encode("hello world how are you, and so on", add_bos=False)
    async with start_service(queue=queue, running=False) as service:
        body = B | {"max_tokens": len(ids)}
        call = asyncio.create_task(service.post("/v1/completions", body))
        while not (claims := await queue.claim(make_engine(), limit=1, wait=1.0)):
            await asyncio.sleep(0)
        (claim,) = claims
        path = f"/v1/streams/{claim.request.id.removesuffix('.0')}"
        event_id = event_id_of(ids[:-1])
        waiting = asyncio.create_task(service.client.get(path, params={"after": event_id}))
        began = asyncio.get_running_loop().time()
        for record in in_pieces(tokenizer, claim.request, ids, iter(lambda: 1, 0)):
            await queue.write([Write(claim.lease, record)])
            await asyncio.sleep(1.5 * queue.limits.failover / len(ids))
        assert asyncio.get_running_loop().time() - began > queue.limits.failover
        resumed = await waiting
        assert resumed.status_code == 200, resumed.text
        assert text_of(resumed.content) == tokenizer.decode(ids[-1:])
        await call


@pytest.mark.slow
@pytest.mark.parametrize("clients", [40])
async def test_replays_leave_the_event_loop_to_others(
    start_service: Starts, tokenizer: Tokenizer, clients: int
) -> None:
    """Many readers of a long answer at once: between two pages others have their turn."""
    async with start_service(max_model_len=3000) as service:
        body = B | {"max_tokens": 2000}
        whole = await service.post("/v1/completions", body, **IDS)
        middle = event_ids(whole.content)[700]
        path = f"/v1/streams/{whole.headers['x-request-id']}"
        replays = [
            asyncio.create_task(service.client.get(path, params={"after": event_id}))
            for event_id in ["", middle] * (clients // 2)
        ]
        answered = 0
        while not all(replay.done() for replay in replays):
            small = await service.post("/v1/completions", B | {"max_tokens": 2, "stream": False})
            answered += small.status_code == 200
        contents = [(await replay).content for replay in replays]
        assert set(contents[::2]) == {whole.content}
        assert set(contents[1::2]) == {after(whole.content, middle)}
        assert answered >= 5
