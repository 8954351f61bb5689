"""Prompts: from texts and chats to token ids. Long texts are tokenised in a pool of threads, where
tenants take turns; texts that cannot fit the context are rejected by their size.

The text of a message that looks like a special token is not one: only the chat template writes
special tokens. In a raw prompt it is one, unless the client says otherwise.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from model.text.chat_template import ChatTemplateError, ChatTemplateLimitError
from model.text.disguise import strings_of
from model.text.template_calls import CallRendering
from model.text.template_renderer import TemplateUnavailableError
from service.api.generation.parts import thinking_options
from service.api.generation.request import Chat, Generation, check_token_ids
from service.api.http.context import ApiLimits, ModelContext
from service.api.http.errors import FieldNames
from service.api.tools.chat import template_input
from service.api.tools.formats import TOOL_FORMATS, tool_format_name
from service.errors import BadRequest, Unavailable
from service.fair_pool import FairPool

T = TypeVar("T")

_INSTRUCTIONS = ("system", "developer")
TEXT_COST = 32
"""The cost of one more text in a template, in characters to tokenise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTokens:
    """A prompt for the model; `text` if it was given as text. `prediction`: of the output.

    Of an encoder-decoder, the first `source` tokens are for the encoder.
    """

    ids: tuple[int, ...]
    source: int = 0
    text: str | None = None
    prediction: tuple[int, ...] = ()


async def prompt_tokens(
    generation: Generation, context: ModelContext, *, tenant: str
) -> list[PromptTokens]:
    """The prompts of a request as token ids. Raises BadRequest or Unavailable."""
    prompt, keep = generation.prompt, _kept_tokens(generation, context)
    if isinstance(prompt, Chat):
        if context.card.start_ids:
            raise BadRequest(
                "an encoder-decoder has no chats; use /v1/completions",
                code="chat_not_supported",
                param=generation.names.prompt,
            )
        render = partial(render_chat, context=context, tenant=tenant, names=generation.names)
        if prompt.truncate:
            room = context.card.max_model_len - (generation.max_tokens or 1)
            whole = await _render_newest(prompt, render, most=room)
        else:
            whole = _cut(await render(prompt, any_size=bool(keep)), keep)
        prediction = await _prediction(generation.prediction, context, tenant=tenant)
        return [replace(whole, prediction=prediction)]
    most = context.limits.max_prompts
    if len(prompt.prompts) > most:
        raise BadRequest(
            f"prompt may have at most {most} prompts",
            code="array_above_max_length",
            param=generation.names.prompt,
        )
    begun = await _decoder_prompt(generation, prompt.decoder_prompt, context, tenant=tenant)
    texts = [text for text in prompt.prompts if isinstance(text, str)]
    for each in prompt.prompts if keep is None else ():  # before any of them is tokenised
        _check_prompt(each, context, parse_special=prompt.parse_special)
    total = sum(map(len, texts))
    found = []
    for each in prompt.prompts:
        if isinstance(each, str):
            encode = partial(
                context.tokenizer.encode,
                each,
                add_bos=prompt.add_bos,
                parse_special=prompt.parse_special,
            )
            ids = await _text_ids(encode, context, tenant=tenant, total=total)
            if begun:
                ids = (*ids, context.card.source_end)
            found.append(_cut(PromptTokens(ids=ids, text=each), keep))
        else:
            if keep is not None:
                check_token_ids(each, context, param="prompt")
            found.append(_cut(PromptTokens(ids=each), keep))
    return [_with_source(each, begun, context) for each in found] if begun else found


async def _decoder_prompt(
    generation: Generation,
    given: str | None,
    context: ModelContext,
    *,
    tenant: str,
) -> tuple[int, ...]:
    """The tokens with which the decoder begins; empty if the model is no encoder-decoder."""
    start = context.card.start_ids
    if not start:
        if given is not None:
            raise BadRequest(
                "decoder_prompt needs an encoder-decoder; this model continues the prompt",
                code="unsupported_parameter",
                param="decoder_prompt",
            )
        return ()
    if generation.prompt_logprobs is not None or (generation.echo and generation.logprobs):
        raise BadRequest(
            "an encoder-decoder does not score its prompt: leave out prompt_logprobs, and logprobs"
            " beside echo",
            code="unsupported_parameter",
            param="prompt_logprobs",
        )
    if given is None:
        return start
    ids = await encode(
        given, context, tenant=tenant, add_bos=False, param="decoder_prompt", target=True
    )
    return (*start, *ids)


def _with_source(
    prompt: PromptTokens, begun: tuple[int, ...], context: ModelContext
) -> PromptTokens:
    """A source and what the decoder begins with. Raises BadRequest for an empty or long one."""
    longest = context.card.max_model_len
    if not 1 <= len(prompt.ids) <= longest:
        raise BadRequest(
            f"the prompt of an encoder-decoder must have 1 to {longest} tokens",
            code="context_length_exceeded",
            param="prompt",
        )
    return replace(prompt, ids=(*prompt.ids, *begun), source=len(prompt.ids))


async def _prediction(text: str | None, context: ModelContext, *, tenant: str) -> tuple[int, ...]:
    """The ids of a predicted text. Raises BadRequest if it cannot fit the model's context."""
    if text is None:
        return ()
    ids = await encode(text, context, tenant=tenant, add_bos=False, param="prediction")
    return ids[: context.limits.max_prediction_tokens]


def _kept_tokens(generation: Generation, context: ModelContext) -> int | None:
    """How many of a prompt's last tokens are kept; None: all."""
    keep = generation.truncate_prompt
    if keep != -1:
        return keep
    limit = generation.max_tokens or generation.default_max_tokens or 1
    return max(1, context.card.max_model_len - limit)


def _cut(prompt: PromptTokens, keep: int | None) -> PromptTokens:
    if keep is None or len(prompt.ids) <= keep:
        return prompt
    return PromptTokens(ids=prompt.ids[-keep:])


async def _render_newest(
    chat: Chat, render: Callable[[Chat], Awaitable[PromptTokens]], *, most: int
) -> PromptTokens:
    """The prompt without as many of the oldest turns as it takes to have at most `most` tokens.

    The instructions at the beginning and the last turn stay. A turn begins with a user message, so
    no tool result loses its call.
    """
    roles = [message.role for message in chat.messages]
    head = next((i for i, role in enumerate(roles) if role not in _INSTRUCTIONS), len(roles))
    starts = [head, *(i for i, role in enumerate(roles) if role == "user" and i > head)]

    def newest(first: int) -> Chat:
        return replace(chat, messages=(*chat.messages[:head], *chat.messages[first:]))

    async def fitting(first: int) -> PromptTokens | None:
        try:
            prompt = await render(newest(first))
        except BadRequest as error:
            if error.code == "context_length_exceeded":
                return None
            raise
        return prompt if len(prompt.ids) <= most else None

    found = await fitting(head)
    low, high = (1, len(starts)) if found is None else (0, 0)
    while low < high:  # prompts before turn `low` are too long; `found` is that from turn `high` on
        middle = (low + high) // 2
        prompt = await fitting(starts[middle])
        if prompt is None:
            low = middle + 1
        else:
            high, found = middle, prompt
    return found or await render(newest(starts[-1]))


async def render_chat(
    chat: Chat,
    context: ModelContext,
    *,
    tenant: str,
    names: FieldNames,
    any_size: bool = False,
) -> PromptTokens:
    """The prompt that the model's chat template makes of the messages and the tools. With
    `any_size` it may exceed the context length.
    """
    param = names.prompt
    if context.tokenizer.chat_template is None:
        raise BadRequest(
            "this model has no chat template; use /v1/completions",
            code="chat_not_supported",
            param=param,
        )
    functions = () if chat.tools is None else chat.tools.functions
    rendering = CallRendering()
    if functions or any(message.tool_calls or message.tool_call_id for message in chat.messages):
        rendering = await call_rendering(context, tenant=tenant, param=param)
    tool_format = TOOL_FORMATS[tool_format_name(rendering)]
    messages, variables = template_input(chat.messages, functions, tool_format, rendering)
    continued = chat.continue_final_message
    generation_prompt = chat.add_generation_prompt
    if generation_prompt is None:
        generation_prompt = not continued
    elif continued and generation_prompt:
        raise BadRequest(
            "continue_final_message cannot be combined with add_generation_prompt",
            param="continue_final_message",
        )
    texts = list(strings_of([messages, variables]))
    if not any_size:
        check_size(texts, context, param=param)
    render = partial(
        context.tokenizer.apply_chat_template,
        messages,
        add_generation_prompt=generation_prompt,
        continue_final_message=continued,
        **variables,
        **thinking_options(context.tokenizer.chat_template, chat),
        **_template_options(chat.template_options, context.limits),
    )
    length = sum(map(len, texts)) + TEXT_COST * len(texts)
    if not context.tokenizer.renders_in_process:  # waits for a process: never on the event loop
        length = max(length, context.limits.inline_text_chars + 1)
    with _template_errors(param):
        ids = await run_in_pool(context.pools.templates, tenant, render, length, context.limits)
    check_token_ids(ids, context, param=param)
    return PromptTokens(ids=tuple(ids))


async def call_rendering(context: ModelContext, *, tenant: str, param: str) -> CallRendering:
    """What the chat template writes for tools and calls. Raises BadRequest or Unavailable."""
    tokenizer, limits = context.tokenizer, context.limits
    known = "call_rendering" in vars(tokenizer) or tokenizer.renders_in_process
    length = 0 if known else limits.inline_text_chars + 1  # never on the event loop
    with _template_errors(param):
        return await run_in_pool(
            context.pools.templates, tenant, lambda: tokenizer.call_rendering, length, limits
        )


@contextmanager
def _template_errors(param: str) -> Iterator[None]:
    """Errors of the chat template as errors of the request."""
    try:
        yield
    except ChatTemplateLimitError as error:
        raise BadRequest(str(error), code="chat_template_limit", param=param) from None
    except TemplateUnavailableError as error:
        raise Unavailable(str(error)) from None
    except ChatTemplateError:
        raise BadRequest(
            "the model's chat template rejects these messages",
            code="chat_template_error",
            param=param,
        ) from None


def _check_prompt(
    prompt: str | Sequence[int], context: ModelContext, *, parse_special: bool
) -> None:
    if isinstance(prompt, str):
        check_size([prompt], context, param="prompt", parse_special=parse_special)
    elif len(prompt) < context.card.max_model_len:  # longer ones are rejected later
        check_token_ids(prompt, context, param="prompt")


async def encode(
    text: str,
    context: ModelContext,
    *,
    tenant: str,
    add_bos: bool,
    parse_special: bool = False,
    param: str = "prompt",
    target: bool = False,
) -> tuple[int, ...]:
    """Token ids of a text; `target`: one of a decoder that splits its own texts in another way.
    Raises BadRequest if it cannot fit the model's context.
    """
    check_size([text], context, param=param, parse_special=parse_special)
    work = partial(
        context.tokenizer.encode,
        text,
        add_bos=add_bos,
        parse_special=parse_special,
        target=target,
    )
    return await _text_ids(work, context, tenant=tenant, total=len(text))


async def _text_ids(
    work: Callable[[], list[int]], context: ModelContext, *, tenant: str, total: int
) -> tuple[int, ...]:
    """The ids of a text that `work` encodes. `total` is the length of all texts of the call, in
    characters.
    """
    ids = await run_in_pool(context.pools.tokens, tenant, work, total, context.limits)
    check_token_ids(ids, context, param="prompt")  # a vocabulary may exceed the embedding
    return tuple(ids)


def check_size(
    texts: Iterable[str], context: ModelContext, *, param: str, parse_special: bool = False
) -> None:
    """Raises BadRequest for texts whose size alone exceeds the context length."""
    longest = context.card.max_model_len
    if context.tokenizer.fewest_tokens(texts, parse_special=parse_special) > longest:
        raise BadRequest(
            f"{param} must leave room for a token: the context length is {longest} tokens",
            code="context_length_exceeded",
            param=param,
        )


def _template_options(options: Mapping[str, Any], limits: ApiLimits) -> Mapping[str, Any]:
    """Raises BadRequest for an option that is not allowed or no boolean."""
    for name, value in options.items():
        if name not in limits.template_kwargs:
            allowed = ", ".join(sorted(limits.template_kwargs))
            raise BadRequest(
                f"chat_template_kwargs may have only: {allowed}",
                code="unsupported_parameter",
                param="chat_template_kwargs",
            )
        if not isinstance(value, bool):
            raise BadRequest(
                "the values of chat_template_kwargs must be true or false",
                code="invalid_type",
                param="chat_template_kwargs",
            )
    return options


async def run_in_pool(
    pool: FairPool, tenant: str, work: Callable[[], T], length: int, limits: ApiLimits
) -> T:
    """The result of `work` on a text of this length. A long one runs in a thread of the pool,
    because it would block the event loop.
    """
    if length <= limits.inline_text_chars:
        return work()
    return await pool.run(tenant, work, weight=length)
