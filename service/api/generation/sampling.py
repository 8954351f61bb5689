"""Sampling parameters of a body, and the checks of a request against the configured limits."""

from __future__ import annotations

import secrets
from dataclasses import fields

from pydantic import BaseModel

from service.api.context import ApiContext
from service.api.generation.prompts import check_token_ids
from service.api.generation.request import Chat, Generation
from service.api.limits import ApiLimits
from service.errors import BadRequest
from service.messages import SamplingParams

PLANNED = frozenset({"choice", "top_logprobs", "banned", "allowed"})
"""Sampling parameters that are not fields of a body under the same name."""

_BY_NAME = {field.name for field in fields(SamplingParams)} - PLANNED


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


def banned_sequences(generation: Generation, context: ApiContext) -> tuple[tuple[int, ...], ...]:
    """The token sequences of the bad words. Raises BadRequest, also if no token would be left."""
    words, limits = generation.bad_words, context.limits
    if len(words) > limits.max_bad_words:
        raise _too_many("bad_words", limits.max_bad_words)
    if any(len(word) > limits.max_bad_word_chars for word in words):
        raise BadRequest(
            f"a bad word may have at most {limits.max_bad_word_chars} characters",
            code="string_above_max_length",
            param="bad_words",
        )
    if generation.thinking_budget is not None and (words or generation.sampling.allowed):
        param = "bad_words" if words else "allowed_token_ids"
        message = f"{param} contradicts a budget of reasoning, which determines tokens"
        raise BadRequest(message, param=param)
    banned = {ids for word in words for ids in context.tokenizer.spellings(word)}
    allowed = generation.sampling.allowed
    if len(allowed) > limits.max_allowed_token_ids:
        raise _too_many("allowed_token_ids", limits.max_allowed_token_ids)
    check_token_ids(allowed, context, param="allowed_token_ids")
    lost = {ids[-1] for ids in banned}
    if generation.min_tokens:
        lost |= {*generation.stop_token_ids, *context.tokenizer.eos_ids}
    left = set(allowed) - lost if allowed else context.card.vocab_size - len(lost) > 0
    if not left:
        raise BadRequest(
            "allowed_token_ids must contain a token that bad_words and min_tokens do not exclude",
            param="allowed_token_ids",
        )
    return tuple(sorted(banned))


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
            f"the prompt must leave room for a token: the context length is {longest} tokens",
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


def _above(param: str, limit: int) -> BadRequest:
    return BadRequest(
        f"{param} may be at most {limit}", code="integer_above_max_value", param=param
    )


def _too_many(param: str, limit: int) -> BadRequest:
    return BadRequest(
        f"{param} may have at most {limit} items", code="array_above_max_length", param=param
    )
