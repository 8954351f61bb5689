"""Results of encoding as JSON: a function of the manifest and the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import orjson

from service.api.generation.deltas import Accumulator
from service.api.generation.manifest import Endpoint
from service.api.generation.prompts import run_in_pool
from service.api.generation.reader import AnswerReader
from service.api.generation.results import ensure_complete
from service.api.http.context import EncoderFacts
from service.vectors import (
    Rows,
    cosines,
    from_text,
    probabilities,
    shortened,
    sigmoid,
    stacked,
    to_text,
)

COSINE, CROSS_ENCODER = "cosine", "cross-encoder"
MULTI_LABEL, REGRESSION = "multi_label_classification", "regression"
Item = dict[str, Any]


async def result_body(reader: AnswerReader, choices: Sequence[Accumulator], tenant: str) -> bytes:
    """The answer of the endpoint. Raises DeadlineExceeded or Conflict if it is not complete."""
    ensure_complete(choices)
    length = sum(choice.num_chars for choice in choices)
    context = reader.context

    def render() -> bytes:
        rows = stacked([from_text(each.text, count=len(each.ids)) for each in choices])
        head: Item = {
            "id": reader.id,
            "model": context.card.id,
            "usage": _usage(reader.manifest.prompt_tokens),
            "system_fingerprint": reader.fingerprint(),
        }
        if reader.manifest.endpoint is not Endpoint.RERANK:
            head |= {"object": "list", "created": reader.manifest.created}
        name = "results" if reader.manifest.endpoint is Endpoint.RERANK else "data"
        more, items = RENDERERS[reader.manifest.endpoint](reader, rows)
        # Item by item: one long call of the serializer would block all other threads.
        parts = b",".join(orjson.dumps(item, option=orjson.OPT_SERIALIZE_NUMPY) for item in items)
        return orjson.dumps(head | more)[:-1] + f',"{name}":['.encode() + parts + b"]}"

    return await run_in_pool(context.pools.tokens, tenant, render, length, context.limits)


def _usage(num_tokens: int) -> Item:
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _embeddings(reader: AnswerReader, rows: Rows) -> tuple[Item, Iterator[Item]]:
    note = _note(reader)
    rows = shortened(rows, note.dimensions)
    items = (
        {
            "object": "embedding",
            "index": index,
            "embedding": to_text(row) if note.base64 else row,
        }
        for index, row in enumerate(rows)
    )
    return {}, items


def _scores(reader: AnswerReader, rows: Rows) -> tuple[str, list[float]]:
    """What a score is, and the scores of all pairs."""
    note, info = _note(reader), _info(reader)
    if not note.num_queries:
        logits = [float(row[0]) for row in rows]
        use = info.sigmoid and note.activation
        return CROSS_ENCODER, [sigmoid(value) if use else value for value in logits]
    queries, others = rows[: note.num_queries], rows[note.num_queries :]
    if len(queries) == 1:
        queries = queries.repeat(len(others), axis=0)
    return COSINE, cosines(queries, others)


def _rerank(reader: AnswerReader, rows: Rows) -> tuple[Item, Iterator[Item]]:
    method, scores = _scores(reader, rows)
    note = _note(reader)
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    items = (
        {"index": index, "relevance_score": scores[index]}
        | ({"document": {"text": note.documents[index]}} if note.documents else {})
        for index in order[: note.top_n]
    )
    meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    return {"method": method, "meta": meta}, items


def _score(reader: AnswerReader, rows: Rows) -> tuple[Item, Iterator[Item]]:
    method, scores = _scores(reader, rows)
    items = (
        {"object": "score", "index": index, "score": score} for index, score in enumerate(scores)
    )
    return {"method": method}, items


def _classify(reader: AnswerReader, rows: Rows) -> tuple[Item, Iterator[Item]]:
    info, activation = _info(reader), _note(reader).activation

    def item(index: int, row: Rows) -> Item:
        probs = _probabilities(row, info) if activation else [float(value) for value in row]
        best = max(range(len(probs)), key=lambda each: (probs[each], -each))
        return {
            "index": index,
            "label": info.labels[best],
            "probs": probs,
            "num_classes": len(probs),
        }

    return {}, (item(index, row) for index, row in enumerate(rows))


def _probabilities(row: Rows, info: EncoderFacts) -> list[float]:
    if info.problem == REGRESSION and not info.sigmoid:
        return [float(value) for value in row]
    if info.problem == MULTI_LABEL:
        return [sigmoid(float(value)) for value in row]
    return probabilities(row)


def _note(reader: AnswerReader) -> Any:  # noqa: ANN401  # of an encoding call it has one
    return reader.manifest.encoding


def _info(reader: AnswerReader) -> EncoderFacts:
    return reader.context.encoder.info


RENDERERS: Mapping[
    Endpoint, Callable[[AnswerReader, Rows], tuple[Item, Iterator[Item]]]
] = MappingProxyType({
    Endpoint.EMBEDDINGS: _embeddings,
    Endpoint.RERANK: _rerank,
    Endpoint.SCORE: _score,
    Endpoint.CLASSIFY: _classify,
})  # fmt: skip
