"""POST /tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
from fastapi import APIRouter, Response

from model.tokenizer import Tokenizer
from service.api.admission import check_model
from service.api.body import JsonRoute
from service.api.context import Context
from service.api.prompts import aside, chat_prompt, check_token_ids, encode
from service.api.schemas import DetokenizeBody, TokenizeBody
from service.api.tools import told_of
from service.errors import BadRequest

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/tokenize",
    response_model=None,
    summary="Text to token ids",
    description="The token ids of a prompt, or of messages through the model's chat template.",
)
async def tokenize(body: TokenizeBody, context: Context) -> Response:
    """Exactly one of prompt and messages."""
    check_model(body.model, context)
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest(
            "exactly one of prompt and messages must be given",
            code="missing_required_parameter",
            param="prompt",
        )
    if body.prompt is None:
        ids = (await chat_prompt(body, context, tools=told_of(body.tools))).ids
    else:
        add_bos = body.add_special_tokens is not False
        ids = await encode(body.prompt, context, add_bos=add_bos)
    texts = None
    if body.return_token_strs:
        texts = await aside(context.limits, len(ids), _texts, ids, context.tokenizer)
    fields = {
        "count": len(ids),
        "max_model_len": context.card.max_model_len,
        "tokens": ids,
        "token_strs": texts,
    }
    return Response(orjson.dumps(fields), media_type="application/json")


def _texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.token_text(token) for token in ids]


@router.post(
    "/detokenize",
    response_model=None,
    summary="Token ids to text",
    description="The text of token ids.",
)
async def detokenize(body: DetokenizeBody, context: Context) -> Response:
    """The text; bytes that are no UTF-8 become U+FFFD."""
    check_model(body.model, context)
    check_token_ids(body.tokens, context, param="tokens")
    decode = context.tokenizer.decode
    text = await aside(context.limits, len(body.tokens), decode, body.tokens)
    return Response(orjson.dumps({"prompt": text}), media_type="application/json")
