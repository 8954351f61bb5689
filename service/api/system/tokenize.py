"""POST /tokenize and /detokenize."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Response
from pydantic import Field

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
from service.api.fields import FieldNames, ModelName, Text, TokenIds
from service.api.generation.prompts import check_token_ids, encode, render_chat, run_in_pool
from service.api.generation.request import Chat
from service.api.generation.submit import check_model
from service.api.tools.chat import ToolUse
from service.api.tools.schema import Tools
from service.api.wire import MAX_MESSAGES, Message, TemplateOptions, WireModel
from service.errors import BadRequest

router = APIRouter(route_class=JsonRoute)

NAMES = FieldNames(prompt="messages")


class TokenizeBody(TemplateOptions):
    """The body of POST /tokenize: a prompt or messages."""

    model: ModelName | None = Field(
        None, description="The id of the model. Default: the only one served."
    )
    prompt: Text | None = Field(None, description="The text to tokenize.")
    messages: list[Message] | None = Field(
        None, min_length=1, max_length=MAX_MESSAGES, description="A chat, instead of a prompt."
    )
    tools: Tools = Field(None, description="Functions that the prompt describes.")
    add_special_tokens: bool | None = Field(
        None, description="Prepend the model's begin token to the prompt. Default true."
    )
    parse_special: bool | None = Field(
        None, description="Read special tokens that the prompt spells as such. Default true."
    )
    return_token_strs: bool | None = Field(None, description="Also return each token's text.")

    def chat(self) -> Chat:
        functions = tuple(tool.definition() for tool in self.tools or ())
        return Chat(
            messages=tuple(message.chat_message() for message in self.messages or ()),
            tools=ToolUse(functions=functions, may_call=(), forced=False, parallel=True),
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message is True,
            template_options=self.chat_template_kwargs or {},
        )


class DetokenizeBody(WireModel):
    """The body of POST /detokenize."""

    model: ModelName | None = Field(
        None, description="The id of the model. Default: the only one served."
    )
    tokens: TokenIds = Field(description="The token ids.")


class Tokenized(AnswerModel):
    """The tokens of a text."""

    count: Count = Field(description="The number of tokens.")
    max_model_len: ContextLength
    tokens: TokenList
    token_strs: list[str] | None = Field(description="The text of each token, if requested.")


class TokenText(AnswerModel):
    """The text of tokens."""

    prompt: str = Field(description="The text.")


@router.post("/tokenize", responses=described(Tokenized))
async def tokenize(body: TokenizeBody, context: Context, tenant: Caller) -> Response:
    """The token ids of a prompt, or of messages through the model's chat template."""
    check_model(body.model, context)
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest(
            "exactly one of prompt and messages must be given",
            code="missing_required_parameter",
            param="prompt",
        )
    if body.prompt is None:
        ids = (await render_chat(body.chat(), context, tenant=tenant.name, names=NAMES)).ids
    else:
        ids = await encode(
            body.prompt,
            context,
            tenant=tenant.name,
            add_bos=body.add_special_tokens is not False,
            parse_special=body.parse_special is not False,
        )
    texts = None
    if body.return_token_strs:
        texts = await run_in_pool(
            context.pools.tokens,
            tenant.name,
            lambda: [context.tokenizer.token_text(token) for token in ids],
            len(ids),
            context.limits,
        )
    return json_response({
        "count": len(ids),
        "max_model_len": context.card.max_model_len,
        "tokens": ids,
        "token_strs": texts,
    })  # fmt: skip


@router.post("/detokenize", responses=described(TokenText))
async def detokenize(body: DetokenizeBody, context: Context, tenant: Caller) -> Response:
    """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
    check_model(body.model, context)
    check_token_ids(body.tokens, context, param="tokens")
    work, length = partial(context.tokenizer.decode, body.tokens), len(body.tokens)
    text = await run_in_pool(context.pools.tokens, tenant.name, work, length, context.limits)
    return json_response({"prompt": text})
