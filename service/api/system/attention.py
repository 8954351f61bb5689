"""POST /v1/attention: which earlier tokens each token of a text attends to, by layer and head.

Served where there is a network to ask; a replica of the API alone refuses by name. It touches
neither queue nor engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson
from fastapi import APIRouter, Response

from service.api.body import JsonRoute
from service.api.context import ApiContext, Caller, Context
from service.api.generation.prompts import chat_prompt, check_token_ids, encode
from service.api.generation.submit import check_model
from service.api.system.attention_schema import AttentionBody
from service.errors import BadRequest, NotFound

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/attention",
    response_model=None,
    summary="Show attention",
    description="How much each token of a prompt, of messages through the model's chat template, "
    "or of token ids attends to itself and each earlier one: the softmax of a layer's head, or the "
    "mean over layers and heads. Served where a network is in the process (`quire serve`).",
)
async def show_attention(body: AttentionBody, context: Context, tenant: Caller) -> Response:
    """Exactly one of prompt, messages and tokens."""
    check_model(body.model, context)
    desk = context.attention
    if desk is None:
        raise NotFound(
            "attention is not available on this replica: it has no network, or it is turned off",
            code="attention_not_available",
            retryable=False,
        )
    _check_part(body.layer, "layer", desk.reader.num_layers)
    _check_part(body.head, "head", desk.reader.num_heads)
    tokens = await _tokens(body, context, tenant=tenant.name)
    positions = _positions(body, len(tokens))
    rows = await desk.read(tokens, positions, tenant=tenant.name, layer=body.layer, head=body.head)
    texts = [context.tokenizer.token_text(token) for token in tokens]
    fields = {
        "object": "attention",
        "model": context.card.id,
        "num_layers": desk.reader.num_layers,
        "num_heads": desk.reader.num_heads,
        "layer": body.layer,
        "head": body.head,
        "tokens": tokens,
        "token_strs": texts if body.return_token_strs else None,
        "rows": [
            {"position": position, "weights": weights}
            for position, weights in zip(positions, rows, strict=True)
        ],
    }
    return Response(orjson.dumps(fields), media_type="application/json")


def _check_part(index: int | None, name: str, count: int) -> None:
    if index is not None and index >= count:
        raise BadRequest(f"{name} must be from 0 to {count - 1}", param=name)


async def _tokens(body: AttentionBody, context: ApiContext, *, tenant: str) -> list[int]:
    """The text to look at. Raises BadRequest where there is none, or too much."""
    given = {"prompt": body.prompt, "messages": body.messages, "tokens": body.tokens}
    if sum(value is not None for value in given.values()) != 1:
        raise BadRequest(
            "exactly one of prompt, messages and tokens must be given",
            code="missing_required_parameter",
            param="prompt",
        )
    name = next(name for name, value in given.items() if value is not None)
    tokens: Sequence[int]
    if body.prompt is not None:
        add_bos = body.add_special_tokens is not False
        tokens = await encode(body.prompt, context, tenant=tenant, add_bos=add_bos)
    elif body.tokens is not None:
        tokens = body.tokens
    else:
        tokens = (await chat_prompt(body, context, tenant=tenant)).ids
    most = context.limits.max_attention_tokens
    if not 1 <= len(tokens) <= min(most, context.card.max_model_len):
        raise BadRequest(
            f"attention is shown for 1 to {min(most, context.card.max_model_len)} tokens",
            code="context_length_exceeded" if tokens else "empty_prompt",
            param=name,
        )
    check_token_ids(tokens, context, param=name)
    return list(tokens)


def _positions(body: AttentionBody, length: int) -> list[int]:
    """The rows to give, in order, each once."""
    if body.positions is None:
        return list(range(length))
    if not body.positions or not 0 <= min(body.positions) <= max(body.positions) < length:
        raise BadRequest(
            f"positions must be at least one, each from 0 to {length - 1}", param="positions"
        )
    return sorted(set(body.positions))
