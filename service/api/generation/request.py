"""What a client requests: `Generation`, the body in no dialect's terms, and `Call`, the headers.

A dialect parses its body into a `Generation`; everything after that, from the prompt to the
journal, works on it alone. It has the client's values: limits are checked and defaults that depend
on the model are applied when it is planned (see `plan`).
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pydantic import BaseModel

from service.api.http.auth import Tenant
from service.api.http.call import LINE
from service.api.http.context import ApiLimits, JsonRequest, ModelContext
from service.api.http.errors import FieldNames
from service.api.structured.grammar import OutputFormat
from service.api.tools.chat import ChatMessage, ToolUse
from service.errors import BadRequest
from service.messages import SamplingParams

_DIGITS = re.compile(r"[0-9]{1,12}")
_PRINTABLE = re.compile(r"[!-~]+")

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """One prompt or several, each a text or token ids."""

    prompts: tuple[str | tuple[int, ...], ...]
    decoder_prompt: str | None = None  # of an encoder-decoder
    add_bos: bool = True  # to texts
    parse_special: bool = True  # texts of special tokens are special tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Messages for the model's chat template."""

    messages: tuple[ChatMessage, ...]
    tools: ToolUse | None = None
    add_generation_prompt: bool | None = None  # None: unless the final message is continued
    continue_final_message: bool = False
    thinking: bool | None = None  # if the template can switch it; None: its default
    effort: Effort | None = None  # of thinking, if the template has grades
    truncate: bool = False  # drop the oldest turns if the prompt is too long
    template_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def thinks(self) -> bool | None:
        """`thinking`, or what the effort implies: `none` and `minimal` switch it off."""
        if self.thinking is None and self.effort in {"none", "minimal"}:
            return False
        return self.thinking


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One request for one answer of one or more choices."""

    model: str | None  # None: the first one
    prompt: Prompts | Chat
    sampling: SamplingParams  # `choice` and `top_logprobs` are set when it is planned
    names: FieldNames  # for error messages

    # --- limits and stop rules ------------------------------------------------------------
    max_tokens: int | None = None  # None: `default_max_tokens`; 0: the prompt is the answer
    default_max_tokens: int | None = None  # cut to the rest of the context; None: all of it
    min_tokens: int = 0
    prediction: str | None = None  # text that the output may contain: a hint
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # the stop string or token is part of the text
    bad_words: tuple[str, ...] = ()  # texts that the output must not contain
    ignore_eos: bool = False
    truncate_prompt: int | None = None  # its last tokens are kept; -1: those that fit
    thinking_budget: int | None = None  # tokens of reasoning, after which it is ended

    # --- choices and what is returned of them -----------------------------------------------
    n: int = 1  # choices returned per prompt
    best_of: int | None = None  # choices generated per prompt; None: n
    logprobs: int | None = None  # top log probabilities per token; None: no log probabilities
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    tokens_as_ids: bool = False  # log probabilities name tokens by their ids
    echo: bool = False  # the answer begins with the prompt
    return_token_ids: bool = False
    skip_special_tokens: bool = True  # false: the names of special tokens are part of the text
    output: OutputFormat | None = None  # of what follows the reasoning; None: any text
    include_reasoning: bool = True  # in the answer

    # --- the stream -------------------------------------------------------------------------
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    obfuscation: bool = False  # pad the chunks: their sizes do not show the lengths of the texts

    # --- scheduling -------------------------------------------------------------------------
    priority: int | None = None  # 0 before 1 before 2; None: the default of the client's key
    service_tier: str | None = None  # decides the priority if that is None
    on_disconnect: Literal["cancel", "continue"] | None = None  # None: as the stream resumes
    echoed: Mapping[str, Any] = field(default_factory=dict)
    """Request fields that the answer repeats. Not empty: the answer is an object with a status,
    which clients can retrieve unless `store` is false; `background` must be given, too.
    """
    warnings: tuple[str, ...] = ()  # known parts of the body that have no effect here, in ASCII

    sealed_reasoning: bool = False  # the answer also has it as text to be sent back
    stored_input: str | None = None
    """Kept with the answer for `ApiLimits.keep_responses`; None: nothing, for the resume window."""

    @property
    def tools(self) -> ToolUse | None:
        """The tools that the model may call; None: the output is text."""
        return self.prompt.tools if isinstance(self.prompt, Chat) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What is known of an HTTP call besides its body. `arrived` is on the monotonic clock."""

    id: str
    tenant: Tenant
    arrived: float
    timeout_ms: int | None = None
    idempotency_key: str | None = None
    fingerprint: str = ""  # of path and body; empty without an idempotency key
    event_ids: bool = False  # events have ids, after which the stream can be resumed
    trace: str | None = None  # its own `traceparent`; None: not traced
    is_line: bool = False  # of a batch: at the lowest priority, and with or without readers


def read_call(request: JsonRequest, tenant: Tenant, limits: ApiLimits) -> Call:
    """Raises BadRequest with the name of an invalid header as `param`."""
    key = _key(request.headers.get("idempotency-key"), limits)
    return Call(
        id=request.state.request_id,
        tenant=tenant,
        arrived=request.state.arrived,
        timeout_ms=_timeout(request.headers.get("x-request-timeout-ms"), limits),
        idempotency_key=key,
        fingerprint="" if key is None else _fingerprint(request, limits),
        event_ids=_flag(request.headers.get("x-quire-event-ids")),
        trace=request.state.trace,
        is_line=getattr(request.state, LINE, False),
    )


def _fingerprint(request: JsonRequest, limits: ApiLimits) -> str:
    """A hash of path and body. It does not depend on the order of keys and on white space, except
    in a long body: serialising it again would block the event loop.
    """
    content = request.raw
    if len(content) <= limits.inline_body_bytes:
        canonical = json.dumps(request.parsed, sort_keys=True, separators=(",", ":"))
        content = canonical.encode()
    return hashlib.sha256(request.scope["path"].encode() + b"\n" + content).hexdigest()


def _timeout(value: str | None, limits: ApiLimits) -> int | None:
    if value is None:
        return None
    if not _DIGITS.fullmatch(value) or not 1 <= int(value) <= limits.max_timeout_ms:
        raise BadRequest(
            f"x-request-timeout-ms must be an integer from 1 to {limits.max_timeout_ms}",
            param="x-request-timeout-ms",
        )
    return int(value)


def _key(value: str | None, limits: ApiLimits) -> str | None:
    if value is None:
        return None
    if len(value) > limits.max_key_chars or not _PRINTABLE.fullmatch(value):
        raise BadRequest(
            f"Idempotency-Key must be 1 to {limits.max_key_chars} visible ASCII characters",
            param="idempotency-key",
        )
    return value


def _flag(value: str | None) -> bool:
    if value not in {None, "0", "1"}:
        raise BadRequest("X-Quire-Event-Ids must be 0 or 1", param="x-quire-event-ids")
    return value == "1"


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


def banned_sequences(generation: Generation, context: ModelContext) -> tuple[tuple[int, ...], ...]:
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


def output_limit(generation: Generation, prompt_length: int, context: ModelContext) -> int:
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


def check_token_ids(ids: Sequence[int], context: ModelContext, *, param: str) -> None:
    """Raises BadRequest for ids outside of the model's vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < context.card.vocab_size):
        raise BadRequest(
            f"token ids must be from 0 to {context.card.vocab_size - 1}",
            code="invalid_token_id",
            param=param,
        )
