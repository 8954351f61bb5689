"""Planning: from a request and its prompts to its grammar and the submission for the queue.

Everything that the configured limits or the model decide about a request is checked here. Only
`grammar_of` waits: for the validator of grammars.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from types import MappingProxyType
from typing import Any

from service.api.generation.manifest import Endpoint, Manifest, PromptNote, ToolNote
from service.api.generation.parts import reasoning_note, thinking
from service.api.generation.prompts import PromptTokens, call_rendering
from service.api.generation.request import (
    Call,
    Generation,
    banned_sequences,
    check_logprobs,
    check_stop_rules,
    check_token_ids,
    num_choices,
    output_limit,
)
from service.api.http.context import ApiLimits, ModelContext
from service.api.structured.grammar import JsonOutput, output_grammar
from service.api.tools.formats import TOOL_FORMATS, tool_format_name
from service.api.tools.grammar import validated_tools_grammar
from service.api.tools.tagged import parameter_types
from service.errors import BadRequest, Forbidden
from service.messages import GenerationRequest, ModelCard, Submission, child_ids
from service.prefixes import prompt_prefixes, source_prefix

DEFAULT_PRIORITY = 1
LOWEST_PRIORITY = 2
MAX_FOUND_PROMPTS = 4  # prompts of one call for which engines are found: hashing takes time
_TIERS = MappingProxyType({"auto": "default", "scale": "default", "fast": "priority"})


def plan(
    generation: Generation,
    prompts: Sequence[PromptTokens],
    context: ModelContext,
    *,
    endpoint: Endpoint,
    call: Call,
    grammar: str | None,
) -> Submission:
    """One request per prompt and choice. Raises BadRequest or Forbidden."""
    manifest = _manifest(generation, prompts, context, endpoint=endpoint, call=call)
    note = reasoning_note(generation, prompts[0].ids, context.tokenizer)
    # Text with the names of special tokens is returned as it is.
    manifest = replace(manifest, reasoning=note if generation.skip_special_tokens else None)
    check_token_ids([id_ for id_, _ in generation.sampling.logit_bias], context, param="logit_bias")
    check_stop_rules(generation, context.limits)
    check_token_ids(generation.stop_token_ids, context, param="stop_token_ids")
    # best_of compares log probabilities, whether they were requested or not.
    compared = manifest.width > manifest.keep and manifest.logprobs is None
    sampling = replace(
        generation.sampling,
        top_logprobs=0 if compared else manifest.logprobs,
        banned=banned_sequences(generation, context),
    )
    requests = [
        GenerationRequest(
            id=call.id,
            prompt_ids=prompt.ids,
            sampling=sampling,
            source=prompt.source,
            max_tokens=max(1, output_limit(generation, len(prompt.ids) - prompt.source, context)),
            min_tokens=generation.min_tokens,
            stop=generation.stop,
            prediction=prompt.prediction,
            include_stop=generation.include_stop,
            skip_special_tokens=generation.skip_special_tokens,
            stop_token_ids=generation.stop_token_ids,
            ignore_eos=generation.ignore_eos,
            prompt_logprobs=_prompt_logprobs(manifest),
            grammar=grammar,
            thinking=thinking(
                note,
                context.tokenizer,
                grammar=grammar is not None,
                budget=generation.thinking_budget,
            ),
            tenant=call.tenant.name,
            priority=priority_of(call, generation.priority, tier=generation.service_tier),
            timeout_ms=call.timeout_ms,
            trace=call.trace,
            model=context.card.key,
        )
        for prompt in prompts
    ]
    return Submission(
        id=call.id,
        tenant=call.tenant.name,
        requests=_choices(requests, manifest.width, call.id),
        manifest=manifest.to_json(),
        idempotency_key=call.idempotency_key,
        fingerprint=call.fingerprint,
        allowance=call.tenant.allowance,
        keep=None if generation.stored_input is None else context.limits.keep_responses,
        input=generation.stored_input or "",
        model=context.card.id,
        prefixes=named_prefixes(requests, manifest.width, context.card),
        # The replica sees its own client leave; the queue sees that a replica is gone.
        grace=None if manifest.grace is None else manifest.grace or context.limits.replica_grace,
    )


def _manifest(
    generation: Generation,
    prompts: Sequence[PromptTokens],
    context: ModelContext,
    *,
    endpoint: Endpoint,
    call: Call,
) -> Manifest:
    limits = context.limits
    width, keep = num_choices(generation, len(prompts), limits)
    returned = _returned(generation, sum(len(prompt.ids) for prompt in prompts), limits)
    check_logprobs(generation, limits)
    manifest = Manifest(
        endpoint=endpoint,
        model=context.card.id,
        model_key=context.card.key,
        fingerprint=context.card.numeric_class,
        created=int(time.time()),
        prompts=tuple(
            PromptNote(
                num_tokens=len(prompt.ids),
                text=_text(prompt, context, skip_special=generation.skip_special_tokens)
                if generation.echo
                else None,
                ids=prompt.ids if returned else (),
            )
            for prompt in prompts
        ),
        width=width,
        keep=keep,
        stream=generation.stream,
        logprobs=generation.logprobs,
        prompt_logprobs=generation.prompt_logprobs,
        tokens_as_ids=generation.tokens_as_ids,
        echo=generation.echo,
        prompt_only=generation.max_tokens == 0,
        return_token_ids=generation.return_token_ids,
        include_usage=generation.include_usage,
        continuous_usage=generation.continuous_usage,
        obfuscation=generation.obfuscation,
        service_tier=_tier_used(generation.service_tier),
        skip_special_tokens=generation.skip_special_tokens,
        stop=() if generation.include_stop else generation.stop,
        sealed_reasoning=generation.sealed_reasoning,
        **_called(generation, context),
        given_back=dict(generation.echoed),
    )
    return replace(manifest, grace=_grace(generation, manifest, call=call, limits=limits))


def _called(generation: Generation, context: ModelContext) -> dict[str, Any]:
    """The fields about tools. The chat template's rendering of calls is known by now."""
    if generation.tools is None:
        return {}
    name = tool_format_name(context.tokenizer.call_rendering)
    notes = []
    for function in generation.tools.functions:
        types: dict[str, tuple[str, ...]] = {}
        if TOOL_FORMATS[name].tags and not function.custom:
            types = parameter_types(function.schema)
        if types or function.custom:
            note = ToolNote(name=function.name, custom=function.custom, types=(*types.items(),))
            notes.append(note)
    return {"notation": name, "tools": tuple(notes)}


def _returned(generation: Generation, num_tokens: int, limits: ApiLimits) -> bool:
    """Whether the answer repeats the prompts. Raises BadRequest if they are too long for it."""
    fields = {
        "echo": generation.echo,
        "return_token_ids": generation.return_token_ids,
        "prompt_logprobs": generation.prompt_logprobs is not None,
    }
    given = [name for name, value in fields.items() if value]
    if given and num_tokens > limits.max_echo_tokens:
        raise BadRequest(
            f"prompts of at most {limits.max_echo_tokens} tokens can be returned", param=given[0]
        )
    return bool(given)


def _text(prompt: PromptTokens, context: ModelContext, *, skip_special: bool) -> str:
    if prompt.text is not None:
        return prompt.text
    return context.tokenizer.decode(prompt.ids, skip_special=skip_special)


def _prompt_logprobs(manifest: Manifest) -> int | None:
    """As many as the larger use needs: the echoed prompt, or the fields about the prompt."""
    uses = (manifest.logprobs if manifest.echo else None, manifest.prompt_logprobs)
    return max((use for use in uses if use is not None), default=None)


def _grace(
    generation: Generation, manifest: Manifest, *, call: Call, limits: ApiLimits
) -> float | None:
    """A client can come back if it has event ids, a retrievable answer or an idempotency key."""
    if call.is_line:
        return None
    if generation.on_disconnect is not None:
        return None if generation.on_disconnect == "continue" else 0.0
    retrievable = manifest.has_status and manifest.stored
    resumable = generation.stream and (call.event_ids or retrievable)
    return limits.grace if resumable or call.idempotency_key is not None else 0.0


def priority_of(call: Call, requested: int | None, *, tier: str | None = None) -> int:
    """Raises Forbidden if the key does not allow the requested priority."""
    if call.is_line:
        return LOWEST_PRIORITY
    highest = call.tenant.highest_priority
    if requested is not None:
        if requested < highest:
            raise Forbidden(f"with this key the highest priority is {highest}", param="priority")
        return requested
    default = max(DEFAULT_PRIORITY, highest)
    return {"flex": LOWEST_PRIORITY, "priority": highest}.get(_tier_used(tier) or "", default)


def _tier_used(tier: str | None) -> str | None:
    """OpenAI's name of the tier that a requested one stands for."""
    return None if tier is None else _TIERS.get(tier, tier)


def _choices(
    requests: Sequence[GenerationRequest], width: int, call_id: str
) -> tuple[GenerationRequest, ...]:
    """Each prompt's request once per choice, with an id of its own."""
    ids = iter(child_ids(call_id, len(requests) * width))
    return tuple(
        replace(request, id=next(ids), sampling=replace(request.sampling, choice=choice))
        for request in requests
        for choice in range(width)
    )


def named_prefixes(
    requests: Sequence[GenerationRequest], width: int, card: ModelCard
) -> tuple[tuple[str, ...], ...]:
    """Names by which an engine that holds the beginning of a prompt is found, per choice."""
    if not card.block_size or len(requests) > MAX_FOUND_PROMPTS:
        return ()
    return tuple(names for request in requests for names in repeat(_prefixes(request, card), width))


def _prefixes(request: GenerationRequest, card: ModelCard) -> tuple[str, ...]:
    source, numeric_class = request.prompt_ids[: request.source], card.numeric_class
    if source:
        return source_prefix(source, tenant=request.tenant, numeric_class=numeric_class)
    return prompt_prefixes(
        request.prompt_ids,
        tenant=request.tenant,
        numeric_class=numeric_class,
        block_size=card.block_size,
    )


async def grammar_of(generation: Generation, context: ModelContext, *, tenant: str) -> str | None:
    """In `model.grammar`'s notation, validated; None: any text. Raises BadRequest, RateLimited or
    Unavailable.
    """
    output, tools, names = generation.output, generation.tools, generation.names
    if output is None and tools is None:
        return None
    _reject_conflicting_fields(generation)
    validate = partial(context.grammars.error, tenant=tenant)
    if tools is not None:
        rendering = await call_rendering(context, tenant=tenant, param=names.prompt)
        tool_format = TOOL_FORMATS[tool_format_name(rendering)]
        marker_ids = tool_format.marker_ids(context.tokenizer)
        json = output if isinstance(output, JsonOutput) else None
        return await validated_tools_grammar(
            tools, tool_format, marker_ids, validate, output=json, names=names
        )
    return None if output is None else await output_grammar(output, validate, names=names)


def _reject_conflicting_fields(generation: Generation) -> None:
    """Stop strings and stop tokens are no conflict: they cut the output, as the limit does."""
    ends = {"min_tokens": generation.min_tokens, "ignore_eos": generation.ignore_eos}
    tokens = {
        "bad_words": generation.bad_words,
        "allowed_token_ids": generation.sampling.allowed,
        "skip_special_tokens": generation.tools and not generation.skip_special_tokens,
    }
    for name, given in (ends | tokens).items():
        if given:
            what = "the end" if name in ends else "the tokens"
            raise BadRequest(
                f"{name} contradicts a grammar, which determines {what} of the output", param=name
            )
