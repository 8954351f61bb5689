"""POST /tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastapi import APIRouter, Response
from pydantic import Field

from model.text.tokenizer import Tokenizer
from service.api.answers import (
    AnswerModel,
    ContextLength,
    Count,
    TokenList,
    described,
    json_response,
)
from service.api.body import JsonRoute
from service.api.context import Caller, Context
from service.api.generation.prompts import aside, chat_prompt, check_token_ids, encode
from service.api.generation.submit import check_model
from service.api.openai.schema import DetokenizeBody, TokenizeBody
from service.api.tools.plan import told_of
from service.errors import BadRequest

router = APIRouter(route_class=JsonRoute)


class Tokens(AnswerModel):
    """The tokens of a text."""

    count: Count = Field(description="The number of tokens.")
    max_model_len: ContextLength
    tokens: TokenList
    token_strs: list[str] | None = Field(description="The text of each token, if requested.")


class TokenText(AnswerModel):
    """The text of tokens."""

    prompt: str = Field(description="The text.")


@router.post(
    "/tokenize",
    response_model=None,
    responses=described(Tokens),
    summary="Text to token ids",
    description="The token ids of a prompt, or of messages through the model's chat template.",
)
async def tokenize(body: TokenizeBody, context: Context, tenant: Caller) -> Response:
    check_model(body.model, context)
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest(
            "exactly one of prompt and messages must be given",
            code="missing_required_parameter",
            param="prompt",
        )
    if body.prompt is None:
        tools = told_of(body.tools)
        ids = (await chat_prompt(body, context, tenant=tenant.name, tools=tools)).ids
    else:
        add_bos = body.add_special_tokens is not False
        ids = await encode(body.prompt, context, tenant=tenant.name, add_bos=add_bos)
    texts = None
    if body.return_token_strs:
        work = partial(_texts, ids, context.tokenizer)
        texts = await aside(context.pools.tokens, tenant.name, work, len(ids), context.limits)
    return json_response({
        "count": len(ids),
        "max_model_len": context.card.max_model_len,
        "tokens": ids,
        "token_strs": texts,
    })  # fmt: skip


def _texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.token_text(token) for token in ids]


@router.post(
    "/detokenize",
    response_model=None,
    responses=described(TokenText),
    summary="Token ids to text",
    description="The text of token ids; bytes that are not UTF-8 become U+FFFD.",
)
async def detokenize(body: DetokenizeBody, context: Context, tenant: Caller) -> Response:
    check_model(body.model, context)
    check_token_ids(body.tokens, context, param="tokens")
    work, length = partial(context.tokenizer.decode, body.tokens), len(body.tokens)
    text = await aside(context.pools.tokens, tenant.name, work, length, context.limits)
    return json_response({"prompt": text})
