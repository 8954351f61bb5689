"""OpenAI's completions and chat completions, with vLLM's extensions: dialects and routes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Response

from service.api.generation.manifest import Endpoint
from service.api.generation.request import Chat, Effort, Generation, Prompts, sampling_of
from service.api.generation.submit import answer
from service.api.http.body import JsonRoute
from service.api.http.context import Caller, Context, JsonRequest
from service.api.http.errors import FieldNames, error_body
from service.api.http.models import described
from service.api.openai.answer import ChunkRenderer, collect
from service.api.openai.schema import (
    ChatBody,
    ChatCompletion,
    Completion,
    CompletionBody,
    GenerationBody,
)
from service.api.structured.grammar import OutputFormat
from service.api.tools.chat import ToolUse, tool_use
from service.errors import BadRequest


class OpenAIDialect:
    """What the two dialects share."""

    id_headers: Sequence[bytes] = ()

    stream = staticmethod(ChunkRenderer)
    collect = staticmethod(collect)
    error = staticmethod(error_body)


class Completions(OpenAIDialect):
    """Completions of one prompt or several."""

    name = Endpoint.COMPLETIONS
    path = "/v1/completions"
    names = FieldNames()

    def parse(self, body: CompletionBody) -> Generation:
        """Raises BadRequest."""
        if body.max_tokens == 0 and not body.echo:
            raise BadRequest(
                "max_tokens must be at least 1; 0 needs echo, to score the prompt",
                code="integer_below_min_value",
                param="max_tokens",
            )
        common = _generation(body, _prompts(body), self.names, output=_output(body, self.names))
        return replace(
            common,
            max_tokens=body.max_tokens,
            default_max_tokens=16,
            best_of=body.best_of,
            logprobs=body.logprobs,
            echo=body.echo or False,
        )


class ChatCompletions(OpenAIDialect):
    """Answers to a chat."""

    name = Endpoint.CHAT
    path = "/v1/chat/completions"
    names = FieldNames(prompt="messages", logprobs="top_logprobs")

    def parse(self, body: ChatBody) -> Generation:
        """Raises BadRequest."""
        names = self.names
        tools = tool_use(
            [tool.definition() for tool in body.tools or ()],
            choice=body.tool_choice,
            parallel=body.parallel_tool_calls is not False,
            names=names,
        )
        max_tokens = body.max_tokens
        if body.max_completion_tokens is not None:
            if max_tokens not in {None, body.max_completion_tokens}:
                raise BadRequest(
                    "max_tokens and max_completion_tokens must agree", param="max_completion_tokens"
                )
            max_tokens = body.max_completion_tokens
            names = replace(names, max_tokens="max_completion_tokens")
        if body.top_logprobs and not body.logprobs:
            raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        chat = Chat(
            messages=tuple(message.chat_message() for message in body.messages),
            tools=tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message is True,
            effort=_effort(body),
            template_options=body.chat_template_kwargs or {},
        )
        common = _generation(body, chat, names, output=_output(body, names, tools=tools))
        return replace(
            common,
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            thinking_budget=body.thinking_token_budget,
            include_reasoning=body.include_reasoning is not False,
            service_tier=body.service_tier,
            prediction=None if body.prediction is None else body.prediction.content,
        )


def _effort(body: ChatBody) -> Effort | None:
    nested = None if body.reasoning is None else body.reasoning.effort
    if None not in {nested, body.reasoning_effort} and nested != body.reasoning_effort:
        raise BadRequest("reasoning.effort and reasoning_effort must agree", param="reasoning")
    return body.reasoning_effort or nested


def _prompts(body: CompletionBody) -> Prompts:
    given: Any = body.prompt
    prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    return Prompts(
        prompts=tuple(each if isinstance(each, str) else tuple(each) for each in prompts),
        decoder_prompt=body.decoder_prompt,
        add_bos=body.add_special_tokens is not False,
        parse_special=body.parse_special is not False,
    )


def _output(
    body: GenerationBody, names: FieldNames, *, tools: ToolUse | None = None
) -> OutputFormat | None:
    if body.structured_outputs is None:
        return None if body.response_format is None else body.response_format.output(names)
    if tools is not None:
        raise BadRequest("structured_outputs cannot be combined with tools", param="tools")
    if body.response_format is not None:
        raise BadRequest(
            "structured_outputs cannot be combined with response_format", param="structured_outputs"
        )
    return body.structured_outputs.constraint()


def _generation(
    body: GenerationBody,
    prompt: Prompts | Chat,
    names: FieldNames,
    *,
    output: OutputFormat | None,
) -> Generation:
    options = body.stream_options
    if options is not None and not body.stream:
        raise BadRequest("stream_options needs stream to be true", param="stream_options")
    return Generation(
        model=body.model,
        prompt=prompt,
        sampling=replace(sampling_of(body), allowed=tuple(body.allowed_token_ids or ())),
        names=names,
        min_tokens=body.min_tokens or 0,
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop=body.include_stop_str_in_output or False,
        bad_words=tuple(body.bad_words or ()),
        ignore_eos=body.ignore_eos or False,
        n=body.n or 1,
        prompt_logprobs=body.prompt_logprobs,
        return_token_ids=body.return_token_ids or False,
        skip_special_tokens=body.skip_special_tokens is not False,
        tokens_as_ids=body.return_tokens_as_token_ids or False,
        truncate_prompt=body.truncate_prompt_tokens,
        output=output,
        stream=body.stream or False,
        include_usage=options is not None and options.include_usage is True,
        continuous_usage=options is not None and options.continuous_usage_stats is True,
        obfuscation=options is not None and options.include_obfuscation is True,
        priority=body.priority,
        on_disconnect=body.on_disconnect,
    )


COMPLETIONS = Completions()
CHAT = ChatCompletions()


completions = APIRouter(route_class=JsonRoute)
chat = APIRouter(route_class=JsonRoute)


@completions.post("/v1/completions", responses=described(Completion, stream=True))
async def create_completion(
    body: CompletionBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """Continues a text or token ids, or several of them. With `stream` the answer comes as
    server-sent events; its `x-request-id` identifies it to be resumed or cancelled.
    """
    return await answer(COMPLETIONS, body, request, context, tenant)


@chat.post("/v1/chat/completions", responses=described(ChatCompletion, stream=True))
async def create_chat_completion(
    body: ChatBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """Answers the messages of a chat, using the model's chat template. With `stream` the answer
    comes as server-sent events; its `x-request-id` identifies it to be resumed or cancelled.
    """
    return await answer(CHAT, body, request, context, tenant)
