"""POST /v1/embeddings, /v1/rerank, /v2/rerank, /v1/score and /v1/classify, and their answers by id.

A call is a submission like any other: admitted by the queue, encoded by any engine of the model,
and answered from the journal. With an `Idempotency-Key`, a repeated call gets the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from service.api.encoding.plan import Input, Wanted, plan, tokenised
from service.api.encoding.results import result_body
from service.api.encoding.schema import (
    Classes,
    ClassifyBody,
    Embeddings,
    EmbeddingsBody,
    RerankBody,
    Reranked,
    ScoreBody,
    Scores,
    StoredEncoding,
)
from service.api.generation.manifest import EncodingNote, Endpoint
from service.api.generation.request import read_call
from service.api.generation.results import answer_result, find_result, show_result
from service.api.generation.submit import ensure_accepting
from service.api.http.auth import Tenant
from service.api.http.body import JsonRoute
from service.api.http.context import (
    Caller,
    Context,
    EncoderFacts,
    JsonRequest,
    ModelContext,
    ModelKind,
)
from service.api.http.models import described
from service.errors import BadRequest

router = APIRouter(route_class=JsonRoute)

_PAIRS = (ModelKind.EMBED, ModelKind.SCORE)


@router.post("/v1/embeddings", responses=described(Embeddings, stored=StoredEncoding))
async def create_embeddings(
    body: EmbeddingsBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """Embeds a text or token ids, or up to 2,048 of them."""
    chosen = ensure_accepting(body.model, context, kinds=[ModelKind.EMBED])
    info = chosen.encoder.info
    if body.dimensions is not None and body.dimensions > info.width:
        raise BadRequest(
            f"dimensions must be at most {info.width}, the model's own",
            code="integer_above_max_value",
            param="dimensions",
        )
    prompt = _prompt(info, body.prompt_name)
    inputs = _inputs(body.input)
    wanted = Wanted(
        endpoint=Endpoint.EMBEDDINGS,
        inputs=[prompt + each if isinstance(each, str) else each for each in inputs],
        name=_name_of("input", listed=inputs is body.input),
        note=EncodingNote(
            num_inputs=len(inputs),
            base64=body.encoding_format == "base64",
            dimensions=body.dimensions,
            background=body.background or False,
        ),
        truncate=body.truncate_prompt_tokens,
        priority=body.priority,
    )
    return await _answer(wanted, request, chosen, tenant)


@router.post("/v1/rerank", responses=described(Reranked, stored=StoredEncoding))
@router.post("/v2/rerank", responses=described(Reranked, stored=StoredEncoding))
async def rerank_documents(
    body: RerankBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """Sorts documents by their relevance to a query: the score of a cross-encoder, or the cosine of
    the embeddings.
    """
    chosen = ensure_accepting(body.model, context, kinds=_PAIRS)
    inputs = _pairs(chosen, [body.query], body.documents)
    by_document = body.truncate_prompt_tokens is None and body.max_tokens_per_doc is not None
    note = EncodingNote(
        num_inputs=len(inputs),
        num_queries=_num_queries(chosen, 1),
        top_n=body.top_n or None,
        documents=tuple(body.documents) if body.return_documents else (),
        background=body.background or False,
    )
    wanted = Wanted(
        endpoint=Endpoint.RERANK,
        inputs=inputs,
        name=_name_of_pair("query", "documents", note.num_queries),
        note=note,
        truncate=body.max_tokens_per_doc if by_document else body.truncate_prompt_tokens,
        truncate_name="max_tokens_per_doc" if by_document else "truncate_prompt_tokens",
        priority=body.priority,
    )
    return await _answer(wanted, request, chosen, tenant)


@router.post("/v1/score", responses=described(Scores, stored=StoredEncoding))
async def score_pairs(
    body: ScoreBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """Scores pairs of texts: one with each of several, or two lists of one length."""
    chosen = ensure_accepting(body.model, context, kinds=_PAIRS)
    if len(body.text_1) not in {1, len(body.text_2)}:
        raise BadRequest("text_1 must be one text, or as many as text_2 has", param="text_1")
    inputs = _pairs(chosen, body.text_1, body.text_2)
    note = EncodingNote(
        num_inputs=len(inputs),
        num_queries=_num_queries(chosen, len(body.text_1)),
        background=body.background or False,
    )
    wanted = Wanted(
        endpoint=Endpoint.SCORE,
        inputs=inputs,
        name=_name_of_pair("text_1", "text_2", note.num_queries),
        note=note,
        truncate=body.truncate_prompt_tokens,
        priority=body.priority,
    )
    return await _answer(wanted, request, chosen, tenant)


@router.post("/v1/classify", responses=described(Classes, stored=StoredEncoding))
async def classify_inputs(
    body: ClassifyBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """Classifies a text or token ids, or up to 2,048 of them, by the labels of the checkpoint."""
    kinds = [ModelKind.CLASSIFY, ModelKind.SCORE]
    chosen = ensure_accepting(body.model, context, kinds=kinds)
    inputs = _inputs(body.input)
    wanted = Wanted(
        endpoint=Endpoint.CLASSIFY,
        inputs=inputs,
        name=_name_of("input", listed=inputs is body.input),
        note=EncodingNote(
            num_inputs=len(inputs),
            activation=body.use_activation is not False,
            background=body.background or False,
        ),
        truncate=body.truncate_prompt_tokens,
        priority=body.priority,
    )
    return await _answer(wanted, request, chosen, tenant)


@router.get("/v1/encodings/{call_id}", responses=described(StoredEncoding))
async def show_encoding(
    call_id: Annotated[str, Path(description="The id of the call, its x-request-id.")],
    request: Request,
    context: Context,
    tenant: Caller,
) -> Response:
    """The state of a call that encodes and, once it is completed, its result: of calls with
    `background` for --keep-responses, and of all others for a while after their end.
    """
    reader = await find_result(call_id, request, context, tenant, kind=EncodingNote)
    return await show_result(reader, result_body, tenant=tenant.name)


async def _answer(
    wanted: Wanted, request: JsonRequest, context: ModelContext, tenant: Tenant
) -> Response:
    call = read_call(request, tenant, context.limits)
    encodings = await tokenised(wanted, context, tenant=tenant.name)
    submission = plan(wanted, encodings, context, call)
    return await answer_result(submission, request, context, call, result_body)


def _inputs(given: Any) -> Sequence[Input]:  # noqa: ANN401  # as the field validated it
    """The inputs of a body, which may be one; each is a text or token ids."""
    single = isinstance(given, str) or isinstance(given[0], int)
    found: Sequence[Input] = [given] if single else given
    return found


def _name_of(field: str, *, listed: bool) -> Callable[[int], str]:
    return lambda index: f"{field}[{index}]" if listed else field


def _name_of_pair(first: str, second: str, num_queries: int) -> Callable[[int], str]:
    """The field of an input: those of the second one are a list."""

    def name(index: int) -> str:
        return first if index < num_queries else f"{second}[{index - num_queries}]"

    return name


def _num_queries(context: ModelContext, num: int) -> int:
    return 0 if context.served.kind is ModelKind.SCORE else num


def _pairs(context: ModelContext, firsts: Sequence[str], seconds: Sequence[str]) -> list[Input]:
    """Pairs for a cross-encoder. Else each text, the first ones before all of the second ones."""
    if context.served.kind is ModelKind.SCORE:
        all_firsts = firsts if len(firsts) == len(seconds) else [*firsts] * len(seconds)
        return list(zip(all_firsts, seconds, strict=True))
    info = context.encoder.info
    query, document = (_side_prompt(info, each) for each in ("query", "document"))
    return [*(query + each for each in firsts), *(document + each for each in seconds)]


def _side_prompt(info: EncoderFacts, name: str) -> str:
    """The model's prompt for one side of a comparison; its default one if it has none for it."""
    return _prompt(info, name if name in info.prompts else None)


def _prompt(info: EncoderFacts, name: str | None) -> str:
    """The text of a prompt. Raises BadRequest if the model has none of this name."""
    name = info.default_prompt if name is None else name
    if name is None:
        return ""
    if name not in info.prompts:
        known = ", ".join(sorted(info.prompts))
        message = f"prompt_name must be one of {known}" if known else "this model has no prompts"
        raise BadRequest(message, param="prompt_name")
    return info.prompts[name]
