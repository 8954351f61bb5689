"""Admission: from a checked body to a stored submission. Every 4xx is decided before or here.

`plan_call` is pure: body, prompts and headers in, `Submission` out. `admit` hands it to the queue
and turns the queue's refusals into errors.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from service.api.context import ApiContext
from service.api.generation.call import Call
from service.api.generation.manifest import Endpoint, Manifest, PromptNote
from service.api.generation.prompts import PromptTokens
from service.api.generation.sampling import (
    asked_logprobs,
    asked_prompt_logprobs,
    choice_counts,
    sampling_params,
    stop_rules,
    token_limit,
)
from service.api.limits import ApiLimits
from service.api.openai.schema import ChatBody, CompletionBody, GenerationBody
from service.api.rates import over_rate
from service.api.tools.formats import tool_format_name
from service.api.tools.plan import ToolUse
from service.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    Gone,
    NotFound,
    RateLimited,
    Unavailable,
)
from service.messages import GenerationRequest, Submission, child_ids
from service.queues import QueueLimits, SubmitReply, SubmitStatus
from service.queues.admission import admission_cost, stored_bytes

DEFAULT_PRIORITY = 1


def check_open(body: GenerationBody, context: ApiContext) -> None:
    """Cheap reasons to refuse a call, before anything is tokenised."""
    if context.probes.draining():
        raise Unavailable("this replica is shutting down", code="shutting_down", retry_after=1)
    check_model(body.model, context)
    if not context.probes.served():
        context.observer.call_unserved()
        raise Unavailable("no engine is there to answer", code="backend_unavailable")
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options needs stream to be true", param="stream_options")


def check_model(name: str | None, context: ApiContext) -> None:
    """Raises NotFound for a model that is not served here."""
    if name not in {None, context.card.id}:
        raise NotFound(
            "this model is not served here; /v1/models lists those that are",
            code="model_not_found",
            param="model",
        )


def plan_call(
    body: CompletionBody | ChatBody,
    prompts: list[PromptTokens],
    context: ApiContext,
    *,
    call: Call,
    given_back: dict[str, Any] | None = None,
    tools: ToolUse | None = None,
    grammar: str | None = None,
) -> Submission:
    """All that a call asks for; `given_back` where it asks for a response. Raises BadRequest."""
    manifest = _manifest(body, prompts, context)
    if tools is not None:
        manifest = replace(manifest, notation=tool_format_name(context.tokenizer))
    if given_back is not None:
        manifest = replace(manifest, endpoint=Endpoint.RESPONSES, given_back=given_back)
    manifest = replace(manifest, grace=_grace(body, manifest, call=call, limits=context.limits))
    # best_of needs log probabilities to choose by, asked for or not.
    ranked = manifest.width > manifest.keep and manifest.logprobs is None
    sampling = sampling_params(body, context, top_logprobs=0 if ranked else manifest.logprobs)
    stop = stop_rules(body, context)
    manifest = replace(manifest, stop=stop.strings)
    requests = [
        GenerationRequest(
            id=call.id,
            prompt_ids=prompt.ids,
            sampling=sampling,
            max_tokens=token_limit(body, len(prompt.ids), context),
            min_tokens=body.min_tokens or 0,
            stop=stop.strings,
            stop_token_ids=stop.token_ids,
            ignore_eos=body.ignore_eos or False,
            prompt_logprobs=_prompt_logprobs(manifest),
            grammar=grammar,
            tenant=call.tenant.name,
            priority=_priority(body, call),
            timeout_ms=call.timeout_ms,
            trace=call.trace,
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
        # A caller's own leaving is seen where it was served; the queue sees that nobody serves it.
        grace=None if manifest.grace is None else manifest.grace or context.limits.replica_grace,
    )


def _priority(body: GenerationBody, call: Call) -> int:
    """Raises Forbidden where the key may not ask for as much."""
    highest = call.tenant.highest_priority
    if body.priority is None:
        return max(DEFAULT_PRIORITY, highest)
    if body.priority < highest:
        raise Forbidden(f"with this key the highest priority is {highest}", param="priority")
    return body.priority


def _choices(
    requests: list[GenerationRequest], width: int, call_id: str
) -> tuple[GenerationRequest, ...]:
    """Each prompt's request, once for each of its choices, under the children's ids."""
    ids = iter(child_ids(call_id, len(requests) * width))
    return tuple(
        replace(request, id=next(ids), sampling=replace(request.sampling, choice=choice))
        for request in requests
        for choice in range(width)
    )


def _manifest(
    body: CompletionBody | ChatBody, prompts: list[PromptTokens], context: ApiContext
) -> Manifest:
    width, keep = choice_counts(body, len(prompts), context.limits)
    echo = isinstance(body, CompletionBody) and body.echo is True
    asked = {
        "echo": echo,
        "return_token_ids": body.return_token_ids is True,
        "prompt_logprobs": body.prompt_logprobs is not None,
    }
    repeated = any(asked.values())
    if repeated and sum(len(prompt.ids) for prompt in prompts) > context.limits.max_echo_tokens:
        raise BadRequest(
            f"prompts of at most {context.limits.max_echo_tokens} tokens can be given back",
            param=next(name for name, wanted in asked.items() if wanted),
        )
    options = body.stream_options
    return Manifest(
        endpoint=body.endpoint,
        model=context.card.id,
        fingerprint=context.card.numeric_class,
        created=int(time.time()),
        prompts=tuple(
            PromptNote(
                num_tokens=len(prompt.ids),
                text=_shown(prompt, context) if echo else None,
                ids=prompt.ids if repeated else (),
            )
            for prompt in prompts
        ),
        width=width,
        keep=keep,
        stream=body.stream or False,
        logprobs=asked_logprobs(body, context.limits),
        prompt_logprobs=asked_prompt_logprobs(body, context.limits),
        echo=echo,
        return_token_ids=body.return_token_ids or False,
        include_usage=options is not None and options.include_usage is True,
        continuous_usage=options is not None and options.continuous_usage_stats is True,
    )


def _prompt_logprobs(manifest: Manifest) -> int | None:
    """As many as the greedier needs of an echo and of what is told beside the answer."""
    uses = (manifest.logprobs if manifest.echo else None, manifest.prompt_logprobs)
    return max((use for use in uses if use is not None), default=None)


def _shown(prompt: PromptTokens, context: ApiContext) -> str:
    return context.tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text


def _grace(
    body: GenerationBody, manifest: Manifest, *, call: Call, limits: ApiLimits
) -> float | None:
    """A caller may come back who has event ids, a response's numbers or an idempotency key."""
    if body.on_disconnect is not None:
        return None if body.on_disconnect == "continue" else 0.0
    response = manifest.endpoint is Endpoint.RESPONSES and manifest.stored
    resumable = body.stream and (call.event_ids or response)
    return limits.grace if resumable or call.idempotency_key is not None else 0.0


async def admit(
    submission: Submission, reply: SubmitReply, context: ApiContext
) -> tuple[str, Manifest]:
    """The id and the manifest of the submission to follow: this one, or the earlier one with the
    same idempotency key. `reply` is the queue's. Raises Unavailable, RateLimited, Conflict or Gone.
    """
    if reply.status is SubmitStatus.OK:
        context.observer.call_accepted(len(submission.requests))
    elif reply.status is not SubmitStatus.EXISTS:
        context.observer.call_refused(reply.status.value)
        raise _refusal(submission, reply, context)
    if reply.submission_id == submission.id:
        return submission.id, Manifest.from_json(submission.manifest)
    earlier = await context.queue.lookup(reply.submission_id)
    await context.queue.attend([reply.submission_id])
    if earlier is None:
        raise Gone("the answer to this Idempotency-Key is no longer kept", retryable=False)
    return earlier.id, Manifest.from_json(earlier.manifest)


def _refusal(
    submission: Submission, reply: SubmitReply, context: ApiContext
) -> Conflict | RateLimited | Unavailable:
    if reply.status is SubmitStatus.CONFLICT:
        return Conflict("this Idempotency-Key came before with another body", retryable=False)
    if reply.status is SubmitStatus.RATE:
        return _over_rate(submission, reply)
    if reply.status in {SubmitStatus.STORAGE, SubmitStatus.TENANT_STORAGE}:
        return _over_storage(submission, reply.status, context.queue.limits)
    speed = context.probes.tokens_per_second()
    wait = reply.queued_tokens / speed if speed > 0 else 1.0
    if reply.status is SubmitStatus.TENANT:
        return RateLimited("you have too many requests in flight", retry_after=wait)
    return Unavailable("the queue is full", retry_after=wait)


def _over_storage(
    submission: Submission, status: SubmitStatus, limits: QueueLimits
) -> RateLimited | Unavailable:
    """Room comes with the end of a request or of a resume window, whichever is first."""
    wait = limits.resume_window
    if status is SubmitStatus.STORAGE:
        message = f"stored requests may have at most {limits.max_bytes} bytes in all"
        return Unavailable(message, code="storage_full", retry_after=wait)
    most, size = limits.max_tenant_bytes, stored_bytes(submission)
    if size > most:
        message = f"the request takes {size} bytes to store, and you may have at most {most}"
        return RateLimited(message, retryable=False)
    return RateLimited(f"your stored requests may have at most {most} bytes", retry_after=wait)


def _over_rate(submission: Submission, reply: SubmitReply) -> RateLimited:
    usage, cost = reply.usage, sum(map(admission_cost, submission.requests))
    if usage.tokens is not None and cost > usage.tokens.limit:
        return RateLimited(
            f"the request counts {cost} tokens, and this key has {usage.tokens.limit} a minute",
            retryable=False,
        )
    return over_rate(usage)
