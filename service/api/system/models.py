"""GET /v1/models and /version; POST /tokenize and /detokenize."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Response
from pydantic import Field

from service.api.generation.prompts import encode, render_chat, run_in_pool
from service.api.generation.request import Chat, check_token_ids
from service.api.http.body import JsonRoute
from service.api.http.context import (
    ENDPOINTS,
    Caller,
    Context,
    ModelContext,
    ServedModel,
)
from service.api.http.errors import FieldNames
from service.api.http.fields import OptionalModel, Text, TokenIds
from service.api.http.models import (
    MAX_MESSAGES,
    AnswerModel,
    ContextLength,
    Count,
    Created,
    ModelId,
    NumericClass,
    TemplateOptions,
    TokenList,
    WireModel,
    described,
    json_response,
)
from service.api.tools.chat import ToolUse
from service.api.tools.schema import Message, Tools
from service.errors import BadRequest

router = APIRouter()


class Model(AnswerModel):
    """A model that is served here."""

    id: ModelId
    object: Literal["model"] = Field(description="The type of this object.")
    created: Created
    owned_by: str = Field(description="The server.")
    root: str = Field(description="The id of the model that an alias stands for, or its own.")
    parent: str | None = Field(
        description="Of an adapter, the id of the model that it changes; null of others."
    )
    kind: Literal["generate", "embed", "score", "classify"] = Field(
        description="What the model does: generate text, embed, score pairs, or classify."
    )
    endpoints: list[str] = Field(description="The endpoints that compute something with it.")
    dimensions: int | None = Field(description="Values of an embedding; null if it does not embed.")
    labels: list[str] | None = Field(description="Of a classifier; null if it does not classify.")
    max_model_len: ContextLength
    numeric_class: NumericClass
    system_fingerprint: NumericClass


class ModelList(AnswerModel):
    """All models."""

    object: Literal["list"] = Field(description="The type of this object.")
    data: list[Model] = Field(description="The models.")


class Version(AnswerModel):
    """The server's version."""

    version: str = Field(description="The server's version.")


def _entry(name: str, model: ServedModel) -> dict[str, Any]:
    card = model.card
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "quire",
        "root": card.id,
        "parent": card.parent or None,
        "kind": model.kind.value,
        "endpoints": ENDPOINTS[model.kind],
        **_encoder_fields(model),
        "max_model_len": card.max_model_len,
        "system_fingerprint": card.numeric_class,
        "numeric_class": card.numeric_class,
    }


def _encoder_fields(model: ServedModel) -> dict[str, Any]:
    info = None if model.encoder is None else model.encoder.info
    return {
        "dimensions": info.width if info is not None and not info.has_head else None,
        "labels": [*info.labels] if info is not None and info.has_head else None,
    }


@router.get("/v1/models", responses=described(ModelList))
async def list_models(context: Context) -> Response:
    """The models that engines serve now, and their aliases, with their maximum context length and
    numeric class: within a class, equal requests get bit-identical answers.
    """
    entries = [_entry(name, model) for name, model in context.models.named() if model.served()]
    return json_response({"object": "list", "data": entries})


@router.get("/v1/models/{model:path}", responses=described(Model))
async def show_model(
    model: Annotated[str, Path(description="The id of the model.")], context: Context
) -> Response:
    """One model of the list, by its id or an alias."""
    chosen = context.model(model)
    chosen.ensure_served()
    return json_response(_entry(model, chosen.served))


@router.get("/version", responses=described(Version))
async def version(context: Context) -> Response:
    """The server's version."""
    return json_response({"version": context.version})


tokens_router = APIRouter(route_class=JsonRoute)

NAMES = FieldNames(prompt="messages")


class TokenizeBody(TemplateOptions):
    """The body of POST /tokenize: a prompt or messages."""

    model: OptionalModel = None
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

    model: OptionalModel = None
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


async def input_ids(body: TokenizeBody, context: ModelContext, *, tenant: str) -> tuple[int, ...]:
    """The token ids of the prompt or, without one, of the messages. Raises BadRequest if they
    cannot fit the model's context.
    """
    if body.prompt is None:
        return (await render_chat(body.chat(), context, tenant=tenant, names=NAMES)).ids
    if context.served.encoder is not None:
        work = partial(context.encoder.tokenizer.encode, body.prompt)
        pool, length = context.pools.tokens, len(body.prompt)
        return (await run_in_pool(pool, tenant, work, length, context.limits)).ids
    return await encode(
        body.prompt,
        context,
        tenant=tenant,
        add_bos=body.add_special_tokens is not False,
        parse_special=body.parse_special is not False,
    )


@tokens_router.post("/tokenize", responses=described(Tokenized))
async def tokenize(body: TokenizeBody, context: Context, tenant: Caller) -> Response:
    """The token ids of a prompt, or of messages through the model's chat template."""
    chosen = context.model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest(
            "exactly one of prompt and messages must be given",
            code="missing_required_parameter",
            param="prompt",
        )
    ids = await input_ids(body, chosen, tenant=tenant.name)
    texts = None
    if body.return_token_strs:
        texts = await run_in_pool(
            context.pools.tokens,
            tenant.name,
            lambda: [chosen.vocabulary.token_text(token) for token in ids],
            len(ids),
            context.limits,
        )
    return json_response({
        "count": len(ids),
        "max_model_len": chosen.card.max_model_len,
        "tokens": ids,
        "token_strs": texts,
    })  # fmt: skip


@tokens_router.post("/detokenize", responses=described(TokenText))
async def detokenize(body: DetokenizeBody, context: Context, tenant: Caller) -> Response:
    """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
    chosen = context.model(body.model)
    check_token_ids(body.tokens, chosen, param="tokens")
    work, length = partial(chosen.tokenizer.decode, body.tokens), len(body.tokens)
    text = await run_in_pool(context.pools.tokens, tenant.name, work, length, context.limits)
    return json_response({"prompt": text})
