"""From the sampling fields of a body to `SamplingParams` and stop rules, within the limits."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, fields

from pydantic import BaseModel

from service.api.context import ApiContext
from service.api.generation.prompts import check_token_ids
from service.api.generation.request import Chat, Generation
from service.api.limits import ApiLimits
from service.api.openai.schema import ChatBody, CompletionBody
from service.api.wire import SamplingBody
from service.errors import BadRequest
from service.messages import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRules:
    """What ends an answer early."""

    strings: tuple[str, ...]
    token_ids: tuple[int, ...]


def asked_logprobs(body: CompletionBody | ChatBody, limits: ApiLimits) -> int | None:
    """None, or how many of the likeliest tokens to tell beside each chosen one."""
    if isinstance(body, CompletionBody):
        if body.logprobs is not None and body.logprobs > limits.max_logprobs:
            raise _above("logprobs", limits.max_logprobs)
        return body.logprobs
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    if (body.top_logprobs or 0) > limits.max_top_logprobs:
        raise _above("top_logprobs", limits.max_top_logprobs)
    return (body.top_logprobs or 0) if body.logprobs else None


def asked_prompt_logprobs(body: CompletionBody | ChatBody, limits: ApiLimits) -> int | None:
    """None, or how many of the likeliest tokens to tell beside each of the prompt's."""
    if (body.prompt_logprobs or 0) > limits.max_top_logprobs:
        raise _above("prompt_logprobs", limits.max_top_logprobs)
    return body.prompt_logprobs


def sampling_params(
    body: SamplingBody, context: ApiContext, *, top_logprobs: int | None
) -> SamplingParams:
    """How tokens are chosen; a seed is drawn where none was given."""
    bias = body.logit_bias or ()
    check_token_ids([token for token, _ in bias], context, param="logit_bias")
    return SamplingParams(
        seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
        temperature=_given(body.temperature, 1.0),
        top_k=body.top_k if body.top_k is not None and body.top_k > 0 else None,
        top_p=_given(body.top_p, 1.0),
        min_p=_given(body.min_p, 0.0),
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        logit_bias=bias,
        top_logprobs=top_logprobs,
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def stop_rules(body: SamplingBody, context: ApiContext) -> StopRules:
    """The stop strings and token ids, each within its limits."""
    limits = context.limits
    strings = body.stop or []
    token_ids = body.stop_token_ids or []
    if len(strings) > limits.max_stop_strings:
        raise _too_many(body.stop_field, limits.max_stop_strings)
    if any(len(string) > limits.max_stop_chars for string in strings):
        raise BadRequest(
            f"a stop string may have at most {limits.max_stop_chars} characters",
            code="string_above_max_length",
            param=body.stop_field,
        )
    if len(token_ids) > limits.max_stop_token_ids:
        raise _too_many("stop_token_ids", limits.max_stop_token_ids)
    check_token_ids(token_ids, context, param="stop_token_ids")
    return StopRules(strings=tuple(strings), token_ids=tuple(token_ids))


def _above(param: str, limit: int) -> BadRequest:
    return BadRequest(
        f"{param} may be at most {limit}", code="integer_above_max_value", param=param
    )


def _too_many(param: str, limit: int) -> BadRequest:
    return BadRequest(
        f"{param} may hold at most {limit} items", code="array_above_max_length", param=param
    )


def choice_counts(
    body: CompletionBody | ChatBody, num_prompts: int, limits: ApiLimits
) -> tuple[int, int]:
    """(choices generated, choices shown) for each prompt."""
    keep = body.n or 1
    if keep > limits.max_choices:
        raise _above("n", limits.max_choices)
    width = keep
    if isinstance(body, CompletionBody) and body.best_of is not None:
        width = body.best_of
        if width > limits.max_choices:
            raise _above("best_of", limits.max_choices)
        if width < keep:
            raise BadRequest("best_of must not be less than n", param="best_of")
        if body.stream and width > keep:
            raise BadRequest(
                "best_of cannot be streamed", code="unsupported_parameter", param="best_of"
            )
    if num_prompts * width > limits.max_work_units:
        raise BadRequest(
            f"prompts times choices may be at most {limits.max_work_units}",
            code="integer_above_max_value",
            param="n" if width == keep else "best_of",
        )
    return width, keep


def token_limit(body: CompletionBody | ChatBody, prompt_length: int, context: ApiContext) -> int:
    """The most tokens to generate, such that prompt and answer fit the model together."""
    longest = context.card.max_model_len
    room = longest - prompt_length
    if room < 1:
        raise BadRequest(
            f"the prompt must leave room for a token: the model holds {longest} tokens",
            code="context_length_exceeded",
            param=body.prompt_field,
        )
    param, asked = "max_tokens", body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        if asked not in {None, body.max_completion_tokens}:
            raise BadRequest(
                "max_tokens and max_completion_tokens must agree", param="max_completion_tokens"
            )
        param, asked = body.limit_field, body.max_completion_tokens
    if asked is None:
        # 16 is OpenAI's default for completions, and for chat it is all there is.
        asked = room if isinstance(body, ChatBody) else min(16, room)
    if asked > room:
        raise BadRequest(
            f"prompt and {param} together may be at most {longest} tokens",
            code="context_length_exceeded",
            param=param,
        )
    if (body.min_tokens or 0) > asked:
        raise BadRequest("min_tokens must not be more than max_tokens", param="min_tokens")
    return asked


# === new ===
_BY_NAME = {field.name for field in fields(SamplingParams)} - {"choice", "top_logprobs"}


def sampling_of(body: BaseModel) -> SamplingParams:
    """The fields of a body that have the names of `SamplingParams`; a missing seed is drawn."""
    given = {name: value for name in _BY_NAME if (value := getattr(body, name, None)) is not None}
    given["seed"] = given["seed"] % 2**64 if "seed" in given else secrets.randbits(64)
    if given.get("top_k", 1) <= 0:  # all tokens
        del given["top_k"]
    return SamplingParams(**given)


def check_stop_rules(generation: Generation, limits: ApiLimits) -> None:
    """Raises BadRequest for too many stop strings or token ids, or too long ones."""
    param = generation.names.stop
    if len(generation.stop) > limits.max_stop_strings:
        raise _too_many(param, limits.max_stop_strings)
    if any(len(string) > limits.max_stop_chars for string in generation.stop):
        raise BadRequest(
            f"a stop string may have at most {limits.max_stop_chars} characters",
            code="string_above_max_length",
            param=param,
        )
    if len(generation.stop_token_ids) > limits.max_stop_token_ids:
        raise _too_many("stop_token_ids", limits.max_stop_token_ids)


def check_logprobs(generation: Generation, limits: ApiLimits) -> None:
    """Raises BadRequest for too many top log probabilities."""
    most = limits.max_top_logprobs if isinstance(generation.prompt, Chat) else limits.max_logprobs
    if (generation.logprobs or 0) > most:
        raise _above(generation.names.logprobs, most)
    if (generation.prompt_logprobs or 0) > limits.max_top_logprobs:
        raise _above("prompt_logprobs", limits.max_top_logprobs)


def num_choices(generation: Generation, num_prompts: int, limits: ApiLimits) -> tuple[int, int]:
    """(choices generated, choices returned) per prompt. Raises BadRequest."""
    keep = generation.n
    width = keep if generation.best_of is None else generation.best_of
    if keep > limits.max_choices:
        raise _above("n", limits.max_choices)
    if width > limits.max_choices:
        raise _above("best_of", limits.max_choices)
    if width < keep:
        raise BadRequest("best_of must not be less than n", param="best_of")
    if generation.stream and width > keep:
        raise BadRequest(
            "best_of cannot be streamed", code="unsupported_parameter", param="best_of"
        )
    if num_prompts * width > limits.max_work_units:
        raise BadRequest(
            f"prompts times choices may be at most {limits.max_work_units}",
            code="integer_above_max_value",
            param="n" if width == keep else "best_of",
        )
    return width, keep


def output_limit(generation: Generation, prompt_length: int, context: ApiContext) -> int:
    """The maximum number of output tokens: prompt and output must fit the context length."""
    longest, names = context.card.max_model_len, generation.names
    room = longest - prompt_length
    if room < 1:
        raise BadRequest(
            f"the prompt must leave room for a token: the model holds {longest} tokens",
            code="context_length_exceeded",
            param=names.prompt,
        )
    limit = generation.max_tokens
    if limit is None:
        default = generation.default_max_tokens
        limit = room if default is None else min(default, room)
    if limit > room:
        raise BadRequest(
            f"prompt and {names.max_tokens} together may be at most {longest} tokens",
            code="context_length_exceeded",
            param=names.max_tokens,
        )
    if generation.min_tokens > limit:
        raise BadRequest("min_tokens must not be more than max_tokens", param="min_tokens")
    return limit
