"""The endpoints that encode, over a real queue, worker and engine; only the network is a hash."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import httpx
import numpy as np
import pytest

from model.config import Problem
from model.runners.encoding import EncoderInfo, Encoding
from model.text.encoder_tokenizer import EncoderTokenizer
from model.text.tokenizer import Tokenizer
from service.api.http.auth import only_with_key
from service.api.http.context import ApiLimits, Models, ServedEncoder
from service.app import build_app, served_model
from service.keys import Key
from service.messages import ModelCard
from service.queues.contract import Queue, QueueLimits
from service.queues.memory.queue import MemoryQueue
from service.queues.redis.queue import RedisQueue
from service.queues.redis.servers import shards_of
from service.vectors import cosines, probabilities, shortened, sigmoid
from tests.api.conftest import RecordingObserver
from tests.cluster.redis_process import RedisServer
from tests.support.encoders import (
    NUMERIC_CLASS,
    VOCAB_SIZE,
    WIDTH,
    EncodingStation,
    HashEncoder,
    info_of,
    result_of,
    tiny_encoder_tokenizer,
)
from tests.support.fakes import ALL_WELL
from tests.support.waiting import PATIENCE

MODEL = "tiny-encoder"
LABELS = ("joy", "anger", "fear")
CLASSIFIER = info_of(width=3, labels=LABELS, problem=Problem.SINGLE_LABEL)
CROSS_ENCODER = info_of(width=1, labels=("LABEL_0",), problem=Problem.REGRESSION, sigmoid=True)


@dataclass
class Encoders:
    client: httpx.AsyncClient
    queue: Queue
    runner: HashEncoder
    observer: RecordingObserver
    gate: threading.Event  # steps wait for it

    async def post(self, path: str, **body: Any) -> httpx.Response:
        headers = body.pop("headers", {})
        return await self.client.post(path, json={"model": MODEL, **body}, headers=headers)

    async def ok(self, path: str, **body: Any) -> Any:
        reply = await self.post(path, **body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def refused(self, path: str, **body: Any) -> Any:
        reply = await self.post(path, **body)
        assert reply.status_code == 400, reply.text
        return reply.json()["error"]


@asynccontextmanager
async def encoders(
    info: EncoderInfo | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    limits: QueueLimits | None = None,
    queues: Sequence[Queue] = (),
    **options: Any,
) -> AsyncIterator[Encoders]:
    """A replica with an encoder; with a `tokenizer` also a model that generates, without engine.
    `queues`: the replica's and the engine's.
    """
    info = info or info_of()
    queue, engine_queue = queues or [MemoryQueue(limits or QueueLimits(lease=10 * PATIENCE))] * 2
    words = tiny_encoder_tokenizer(max_tokens=info.max_tokens)
    gate, observer = threading.Event(), RecordingObserver()
    gate.set()

    def wait(_batch: Sequence[Encoding]) -> None:
        assert gate.wait(PATIENCE)

    runner = HashEncoder(info, on_encode=wait)
    card = ModelCard(
        id=MODEL,
        max_model_len=info.max_tokens,
        vocab_size=VOCAB_SIZE,
        numeric_class=NUMERIC_CLASS,
        created=1,
        vocabulary=words.digest,
    )
    served = [served_model(None, lambda: card, encoder=ServedEncoder(tokenizer=words, info=info))]
    if tokenizer is not None:
        text = ModelCard(
            id="writer", max_model_len=64, vocab_size=300, numeric_class="c", created=1
        )
        served.append(served_model(tokenizer, lambda: text))
    app = build_app(
        queue,
        Models.of(*served),
        probes=ALL_WELL,
        limits=ApiLimits(),
        observer=observer,
        version="0",
        **options,
    )
    transport = httpx.ASGITransport(app=app)
    async with (
        EncodingStation(engine_queue, runner=runner, model=card.key) as station,
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=PATIENCE) as client,
    ):
        try:
            yield Encoders(client, queue, runner, observer, gate)
        finally:
            gate.set()
            await station.kill()  # a drain would wait for the claim in flight


def ids_of(*texts: str) -> list[list[int]]:
    words = tiny_encoder_tokenizer()
    return [list(each.ids) for each in words.encode_batch(texts)]


def rows_of(*texts: str, width: int = WIDTH) -> np.ndarray[Any, Any]:
    return np.array([result_of(each, width=width) for each in ids_of(*texts)])


def floats(body: Any) -> np.ndarray[Any, Any]:
    return np.array([each["embedding"] for each in body["data"]], np.float32)


async def test_the_forms_of_an_input_give_the_same_embedding_in_order() -> None:
    texts = ["a ax", "b", "a ax"]
    ids = ids_of(*texts)
    async with encoders() as service:
        listed = await service.ok("/v1/embeddings", input=texts)
        assert [each["index"] for each in listed["data"]] == [0, 1, 2]
        assert {each["object"] for each in listed["data"]} == {"embedding"}
        assert floats(listed).tobytes() == rows_of(*texts).tobytes()
        total = sum(map(len, ids))
        assert listed["usage"] == {"prompt_tokens": total, "total_tokens": total}
        assert (listed["model"], listed["system_fingerprint"]) == (MODEL, NUMERIC_CLASS)
        single = await service.ok("/v1/embeddings", input=texts[0], user="me")
        of_ids = await service.ok("/v1/embeddings", input=ids[0])
        of_lists = await service.ok("/v1/embeddings", input=ids)
        assert floats(single).tobytes() == floats(of_ids).tobytes() == rows_of(texts[0]).tobytes()
        assert floats(of_lists).tobytes() == floats(listed).tobytes()


async def test_base64_has_the_same_bits_and_dimensions_have_length_1() -> None:
    async with encoders() as service:
        body = await service.ok("/v1/embeddings", input=["a", "b"], encoding_format="base64")
        found = [base64.b64decode(each["embedding"]) for each in body["data"]]
        assert found == [row.tobytes() for row in rows_of("a", "b")]
        short = await service.ok("/v1/embeddings", input=["a", "b"], dimensions=2)
        assert floats(short).tobytes() == shortened(rows_of("a", "b"), 2).tobytes()
        error = await service.refused("/v1/embeddings", input="a", dimensions=WIDTH + 1)
        assert (error["param"], error["code"]) == ("dimensions", "integer_above_max_value")


@pytest.mark.slow
async def test_2048_inputs_are_one_call_and_more_are_refused() -> None:
    async with encoders() as service:
        texts = ["abcdef"[i % 6] + "x" * (i % 3) for i in range(2048)]
        body = await service.ok("/v1/embeddings", input=texts)
        assert floats(body).tobytes() == rows_of(*texts).tobytes()
        error = await service.refused("/v1/embeddings", input=["a"] * 2049)
        assert (error["param"], error["code"]) == ("input", "array_above_max_length")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, "input", "empty_prompt"),
        ({"input": []}, "input", "empty_prompt"),
        ({"input": ["a", ""]}, "input", "empty_prompt"),
        ({"input": ["a", 1]}, "input", "empty_prompt"),
        ({"input": [VOCAB_SIZE]}, "input", "invalid_token_id"),
        ({"input": [[1], [VOCAB_SIZE]]}, "input[1]", "invalid_token_id"),
        ({"input": [[1], [-1]]}, "input[1]", "invalid_token_id"),
        ({"input": [-1]}, "input", "invalid_token_id"),
        ({"input": ["a", "a " * 30]}, "input[1]", "context_length_exceeded"),
        ({"input": [1] * 17}, "input", "context_length_exceeded"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "invalid_value"),
        ({"input": "a", "truncate_prompt_tokens": 2}, "truncate_prompt_tokens", "invalid_value"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens",
         "integer_below_min_value"),
        ({"input": [1], "truncate_prompt_tokens": 0}, "truncate_prompt_tokens",
         "integer_below_min_value"),
        ({"input": "a", "prompt_name": "query"}, "prompt_name", "invalid_value"),
        ({"input": "a", "stream": True}, "stream", "unknown_parameter"),
        ({}, "input", "missing_required_parameter"),
    ],
)  # fmt: skip
async def test_a_bad_body_is_refused(fields: dict[str, Any], param: str, code: str) -> None:
    async with encoders() as service:
        error = await service.refused("/v1/embeddings", **fields)
        assert error["param"] == param
        if code != "empty_prompt" or error["code"] != "invalid_type":
            assert error["code"] == code


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"documents": []}, "documents", "a list of at least one text"),
        ({"documents": [{"txt": "a"}]}, "documents", 'objects with "text" and no other key'),
        ({"documents": [{"text": "a", "id": 1}]}, "documents", "must be texts, or objects"),
        ({"documents": [{"text": 1}]}, "documents", "must be texts, or objects"),
        ({"documents": ["a " * 30]}, "documents[0]", "set truncate_prompt_tokens"),
        ({"max_tokens_per_doc": 2}, "max_tokens_per_doc", "must be above 2"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1, or -1"),
        ({"truncate_prompt_tokens": 0, "max_tokens_per_doc": 9}, "truncate_prompt_tokens",
         "at least 1, or -1"),
    ],
)  # fmt: skip
async def test_bad_documents_are_refused(fields: Any, param: str, message: str) -> None:
    """truncate_prompt_tokens 0 was ignored, and max_tokens_per_doc had another field's error."""
    async with encoders() as service:
        body = {"query": "a", "documents": ["b"]} | fields
        error = await service.refused("/v1/rerank", **body)
        assert error["param"] == param
        assert message in error["message"]


async def test_a_text_without_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders may put no special token around a text; an engine failed on the empty input."""

    def plain(self: EncoderTokenizer, texts: Sequence[str], **_options: Any) -> list[Encoding]:
        return [Encoding(tuple(5 for _ in text)) for text in texts]

    monkeypatch.setattr(EncoderTokenizer, "encode_batch", plain)
    async with encoders() as service:
        error = await service.refused("/v1/rerank", query="a", documents=["b", ""])
        assert (error["code"], error["param"]) == ("empty_prompt", "documents[1]")
        assert (await service.ok("/v1/score", text_1="a", text_2="b"))["data"]


async def test_an_input_is_cut_if_the_client_says_so() -> None:
    async with encoders() as service:
        long = " ".join("abcdef"[i % 6] for i in range(40))
        body = await service.ok("/v1/embeddings", input=long, truncate_prompt_tokens=-1)
        assert body["usage"]["prompt_tokens"] == 16
        body = await service.ok("/v1/embeddings", input=[7] * 40, truncate_prompt_tokens=5)
        assert floats(body).tobytes() == result_of([7] * 5, width=WIDTH).tobytes()


async def test_prompts_of_the_model_come_before_texts() -> None:
    info = info_of(prompts={"query": "ax ", "document": "bx "}, default_prompt=None)
    async with encoders(info) as service:
        body = await service.ok("/v1/embeddings", input="a", prompt_name="query")
        assert floats(body).tobytes() == rows_of("ax a").tobytes()
        assert floats(await service.ok("/v1/embeddings", input="a")).tobytes() == (
            rows_of("a").tobytes()
        )
        body = await service.ok("/v1/score", text_1="a", text_2="b")
        assert body["data"][0]["score"] == cosines(rows_of("ax a"), rows_of("bx b"))[0]


async def test_documents_are_ranked_by_the_cosine_of_their_embeddings() -> None:
    documents = ["a", "b", "cx", "dxx"]
    scores = cosines(rows_of(*["bx"] * 4), rows_of(*documents))
    order = sorted(range(4), key=lambda index: -scores[index])
    async with encoders() as service:
        for path in ("/v1/rerank", "/v2/rerank"):
            body = await service.ok(path, query="bx", documents=documents)
            assert [each["index"] for each in body["results"]] == order
            assert [each["relevance_score"] for each in body["results"]] == [
                scores[index] for index in order
            ]
            assert body["method"] == "cosine"
        body = await service.ok(
            "/v2/rerank",
            query="bx",
            documents=[{"text": text} for text in documents],
            top_n=2,
            return_documents=True,
        )
        assert [each["document"]["text"] for each in body["results"]] == [
            documents[index] for index in order[:2]
        ]
        scored = await service.ok("/v1/score", text_1="bx", text_2=documents)
        assert [each["score"] for each in scored["data"]] == scores


async def test_a_cross_encoder_scores_pairs() -> None:
    words = tiny_encoder_tokenizer()
    pairs = [words.encode_pair("a", text) for text in ("b", "cx")]
    expected = [sigmoid(float(result_of(p.ids, p.types, width=1)[0])) for p in pairs]
    async with encoders(CROSS_ENCODER) as service:
        body = await service.ok("/v1/score", text_1=["a", "a"], text_2=["b", "cx"])
        assert [each["score"] for each in body["data"]] == expected
        assert body["method"] == "cross-encoder"
        ranked = await service.ok("/v1/rerank", query="a", documents=["b", "cx"])
        assert {each["index"]: each["relevance_score"] for each in ranked["results"]} == dict(
            enumerate(expected)
        )
        error = await service.refused("/v1/embeddings", input="a")
        assert error["code"] == "unsupported_model"
        error = await service.refused("/v1/score", text_1=["a", "b"], text_2=["a", "b", "c"])
        assert error["param"] == "text_1"


async def test_a_classifier_names_its_labels() -> None:
    row = rows_of("a", width=3)[0]
    async with encoders(CLASSIFIER) as service:
        body = await service.ok("/v1/classify", input=["a", "b"])
        first = body["data"][0]
        assert first["probs"] == probabilities(row)
        assert first["label"] == LABELS[int(row.argmax())]
        assert first["num_classes"] == 3
        raw = await service.ok("/v1/classify", input="a", use_activation=False)
        assert raw["data"][0]["probs"] == [float(value) for value in row]
        listed = (await service.client.get("/v1/models")).json()["data"][0]
        assert (listed["kind"], listed["labels"]) == ("classify", list(LABELS))
        assert listed["endpoints"] == ["/v1/classify"]


async def test_each_model_names_its_endpoints_if_it_is_asked_for_another(
    tokenizer: Tokenizer,
) -> None:
    async with encoders(tokenizer=tokenizer) as service:
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("/v1/responses", {"input": "a"}),
            ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 9}),
            ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "a"}]}),
            ("/detokenize", {"tokens": [5]}),
        ):
            error = await service.refused(path, **body)
            assert "/v1/embeddings" in error["message"], path
        error = await service.refused("/v1/embeddings", input="a", model="writer")
        assert "/v1/chat/completions" in error["message"]
        tokens = await service.ok("/tokenize", prompt="a ax", return_token_strs=True)
        assert tokens["token_strs"] == ["[CLS]", "a", "ax", "[SEP]"]
        kinds = {each["id"]: each["kind"] for each in (
            await service.client.get("/v1/models")).json()["data"]}  # fmt: skip
        assert kinds == {MODEL: "embed", "writer": "generate"}


@pytest.mark.slow
async def test_results_come_from_an_engine_over_redis_and_are_read_by_any_replica(
    own_redis: RedisServer,
) -> None:
    """With vectors that are wider than a journal record of tokens is long."""
    (shard,), limits = shards_of(own_redis.url), QueueLimits(lease=10 * PATIENCE)
    queues = [RedisQueue(limits, shard=shard) for _ in range(3)]
    draw = random.Random(7)
    ids = [[draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 16))] for _ in range(1500)]
    info = info_of(width=384)
    try:
        for queue in queues:
            await queue.open()
        async with encoders(info, queues=queues[:2]) as service:
            body = await service.ok("/v1/embeddings", input=ids, encoding_format="base64")
            expected = [result_of(each, width=384).tobytes() for each in ids]
            assert [base64.b64decode(each["embedding"]) for each in body["data"]] == expected
        async with encoders(info, queues=[queues[2], queues[1]]) as other:
            found = (await other.client.get(f"/v1/encodings/{body['id']}")).json()
            assert found["result"] == body
            assert other.runner.steps == []
    finally:
        for queue in queues:
            await queue.close()


async def test_a_call_in_the_background_is_read_by_its_id() -> None:
    async with encoders() as service:
        service.gate.clear()
        begun = await service.ok("/v1/embeddings", input=["a"] * 40, background=True)
        assert (begun["status"], begun["inputs"], begun["result"]) == ("queued", 40, None)
        service.gate.set()
        path = f"/v1/encodings/{begun['id']}"

        async def state() -> Any:
            return (await service.client.get(path)).json()

        async with asyncio.timeout(PATIENCE):
            while (found := await state())["status"] != "completed":
                assert found["status"] in {"queued", "in_progress"}, found
                await asyncio.sleep(0.005)  # nothing else in the loop waits
        assert found["completed"] == 40
        head = await service.client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert floats(found["result"]).tobytes() == rows_of(*["a"] * 40).tobytes()
        stream = await service.client.get(f"/v1/streams/{begun['id']}")
        assert stream.json()["error"]["code"] == "not_a_stream"


async def test_a_cancelled_call_says_so() -> None:
    async with encoders() as service:
        service.gate.clear()
        begun = await service.ok("/v1/embeddings", input=["a"] * 40, background=True)
        await service.client.delete(f"/v1/streams/{begun['id']}")
        found = (await service.client.get(f"/v1/encodings/{begun['id']}")).json()
        assert (found["status"], found["result"]) == ("cancelled", None)


async def test_a_repeated_key_gets_the_same_call_and_another_body_a_conflict() -> None:
    async with encoders() as service:
        key = {"Idempotency-Key": "k"}
        first = await service.ok("/v1/embeddings", input="a", headers=key)
        again = await service.ok("/v1/embeddings", input="a", headers=key)
        assert first == again
        other = await service.post("/v1/embeddings", input="b", headers=key)
        assert other.status_code == 409
        assert sum(map(len, service.runner.steps)) == 1
        found = (await service.client.get(f"/v1/encodings/{first['id']}")).json()
        assert found["result"] == first


async def test_a_deadline_is_an_error() -> None:
    """By the queue's clock, which is past it as soon as an engine looks for work."""
    ticks = count()
    queue = MemoryQueue(QueueLimits(lease=10 * PATIENCE), clock=lambda: next(ticks) / 100)
    async with encoders(queues=[queue, queue]) as service:
        header = {"x-request-timeout-ms": "1"}
        begun = await service.post("/v1/embeddings", input="a", headers=header)
        assert begun.status_code == 504, begun.text


@pytest.mark.slow
async def test_a_key_with_few_requests_in_flight_can_embed_many_inputs() -> None:
    """However many tokens the inputs have, they are no more requests than the key may have."""
    key = Key(name="small", sha256="0" * 64, max_in_flight=1)
    async with encoders(
        info_of(max_tokens=16), authenticate=only_with_key(lambda _secret: key)
    ) as service:
        header = {"Authorization": "Bearer x"}
        body = await service.ok("/v1/embeddings", input=[[5] * 16] * 1500, headers=header)
        assert len(body["data"]) == 1500


@pytest.mark.slow
async def test_a_long_call_has_no_more_requests_than_the_queue_takes() -> None:
    """It was refused with 429, again and again."""
    limits = QueueLimits(lease=10 * PATIENCE, max_requests=1)
    async with encoders(info_of(max_tokens=16), limits=limits) as service:
        body = await service.ok("/v1/embeddings", input=[[5] * 16] * 1500)
        assert len(body["data"]) == 1500


async def test_results_count_as_stored_bytes() -> None:
    """They are known before: what does not fit is refused, and nothing is computed."""
    async with encoders(limits=QueueLimits(max_tenant_bytes=20_000)) as service:
        reply = await service.post("/v1/embeddings", input=[[5]] * 1000)
        assert reply.status_code == 429
        assert "bytes to store" in json.loads(reply.text)["error"]["message"]
        assert service.runner.steps == []


async def answered_in_a_batch(service: Encoders, url: str, *bodies: Any) -> list[Any]:
    """The answers to lines of these bodies, in order."""
    lines = "\n".join(
        json.dumps({"custom_id": str(number), "method": "POST", "url": url, "body": body})
        for number, body in enumerate(bodies)
    )
    app: Any = service.client._transport.app  # type: ignore[attr-defined]
    async with app.router.lifespan_context(app):
        form: Any = {"files": {"file": ("in", lines)}, "data": {"purpose": "batch"}}
        file = (await service.client.post("/v1/files", **form)).json()
        body = {"input_file_id": file["id"], "endpoint": url, "completion_window": "1h"}
        batch = (await service.client.post("/v1/batches", json=body)).json()
        async with asyncio.timeout(PATIENCE):
            while batch["status"] != "completed":
                await asyncio.sleep(0.01)
                batch = (await service.client.get(f"/v1/batches/{batch['id']}")).json()
        path = f"/v1/files/{batch['output_file_id']}/content"
        rows = [json.loads(row) for row in (await service.client.get(path)).text.splitlines()]
    return [row["response"]["body"] for row in rows]


async def test_a_batch_embeds_its_lines_and_usage_counts_their_tokens() -> None:
    texts = ["a ax", "b", "ax"]
    async with encoders() as service:
        bodies = [{"model": MODEL, "input": each} for each in texts]
        found = await answered_in_a_batch(service, "/v1/embeddings", *bodies)
        assert np.concatenate([*map(floats, found)]).tobytes() == rows_of(*texts).tobytes()
        (used,) = (await service.client.get("/v1/usage")).json()["data"]
        counted = (used["requests"], used["prompt_tokens"], used["generated_tokens"])
        assert counted == (3, sum(map(len, ids_of(*texts))), 0)


@pytest.mark.parametrize(
    ("url", "info", "body"),
    [
        ("/v1/rerank", info_of(), {"query": "a", "documents": ["b", "ax a"], "top_n": 1}),
        ("/v2/rerank", CROSS_ENCODER, {"query": "a", "documents": ["b", "ax a"]}),
        ("/v1/score", info_of(), {"text_1": "a", "text_2": ["b", "ax"]}),
        ("/v1/classify", CLASSIFIER, {"input": ["a", "b ax"]}),
    ],
)
async def test_a_line_of_a_batch_has_the_answer_that_it_has_online(
    url: str, info: EncoderInfo, body: Any
) -> None:
    async with encoders(info) as service:
        (found,) = await answered_in_a_batch(service, url, {"model": MODEL, **body})
        online = await service.ok(url, **body)
        varying = {"id", "created"}
        assert {k: v for k, v in found.items() if k not in varying} == {
            k: v for k, v in online.items() if k not in varying
        }
