"""From texts to the submission of an encoding call.

All inputs of a call become a few requests of consecutive inputs: so engines share a long call, and
a key with a small limit of requests in flight can make one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from model.text.encoder_tokenizer import Encoding
from service.api.generation.manifest import EncodingNote, Endpoint, PromptNote
from service.api.generation.plan import priority_of
from service.api.generation.prompts import run_in_pool
from service.api.generation.request import Call, check_token_ids
from service.api.generation.results import max_requests, result_submission
from service.api.http.context import ModelContext
from service.errors import BadRequest
from service.messages import (
    EncodingInputs,
    GenerationRequest,
    SamplingParams,
    Submission,
    child_ids,
)

REQUEST_TOKENS = 8192
"""Of one request, about: a step has fewer, and the bytes of a body stay small."""
MAX_REQUESTS = 64
"""Of one call."""
_NO_SAMPLING = SamplingParams(seed=0)

Input = str | tuple[str, str] | Sequence[int]
"""A text, a pair of texts, or token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a body asks for."""

    endpoint: Endpoint
    inputs: Sequence[Input]
    name: Callable[[int], str]  # of the field that input i is from
    note: EncodingNote
    truncate: int | None = None
    truncate_name: str = "truncate_prompt_tokens"  # of the field that it is from
    priority: int | None = None


async def tokenised(wanted: Wanted, context: ModelContext, *, tenant: str) -> list[Encoding]:
    """The inputs as the model reads them. Raises BadRequest for one that is empty or too long."""
    encoder, limits = context.encoder, context.limits
    longest = min(encoder.info.max_tokens, context.card.max_model_len)
    cut = wanted.truncate
    if cut == 0:
        message = f"{wanted.truncate_name} must be at least 1, or -1: what the model reads"
        raise BadRequest(message, code="integer_below_min_value", param=wanted.truncate_name)
    if cut is not None:
        cut = longest if cut == -1 else min(cut, longest)
    total = sum(map(_num_chars, wanted.inputs))
    work = partial(_encode, wanted, context, cut=cut)
    found = await run_in_pool(context.pools.tokens, tenant, work, total, limits)
    for index, encoding in enumerate(found):
        if not encoding.ids:  # a model without special tokens reads nothing of an empty text
            name = wanted.name(index)
            raise BadRequest(f"{name} must not be empty", code="empty_prompt", param=name)
        if len(encoding.ids) > longest:
            raise BadRequest(
                f"{wanted.name(index)} has {len(encoding.ids)} tokens, and this model reads at "
                f"most {longest}: shorten it, or set {wanted.truncate_name}",
                code="context_length_exceeded",
                param=wanted.name(index),
            )
    return found


def _num_chars(given: Input) -> int:
    """To tokenise; about as much work as checking so many ids."""
    if isinstance(given, str):
        return len(given)
    return sum(len(part) if isinstance(part, str) else 1 for part in given)


def _encode(wanted: Wanted, context: ModelContext, *, cut: int | None) -> list[Encoding]:
    """In a thread, if the texts are long."""
    tokenizer = context.encoder.tokenizer
    texts = [each for each in wanted.inputs if isinstance(each, str)]
    try:
        of_texts = iter(tokenizer.encode_batch(texts, truncate_to=cut) if texts else ())
        found = []
        for index, given in enumerate(wanted.inputs):
            if isinstance(given, str):
                found.append(next(of_texts))
            elif isinstance(given[0], str):
                found.append(tokenizer.encode_pair(*map(str, given), truncate_to=cut))
            else:
                ids = tuple(int(id_) for id_ in given)
                check_token_ids(ids, context, param=wanted.name(index))
                found.append(Encoding(ids[:cut]))
    except ValueError as error:  # leaves no room for a text between the special tokens
        name = wanted.truncate_name
        raise BadRequest(f"{name} {error}", param=name) from None
    return found


def plan(
    wanted: Wanted, encodings: Sequence[Encoding], context: ModelContext, call: Call
) -> Submission:
    """Raises BadRequest or Forbidden."""
    most = min(MAX_REQUESTS, max(1, max_requests(context, call)))
    groups = _groups(encodings, most=_num_requests(encodings, most=most))
    requests = tuple(
        GenerationRequest(
            id=request_id,
            prompt_ids=tuple(id_ for each in group for id_ in each.ids),
            encoding=_inputs(group, width=context.encoder.info.width),
            sampling=_NO_SAMPLING,
            max_tokens=len(group),
            tenant=call.tenant.name,
            priority=priority_of(call, wanted.priority),
            timeout_ms=call.timeout_ms,
            trace=call.trace,
            model=context.card.key,
        )
        for request_id, group in zip(child_ids(call.id, len(groups)), groups, strict=True)
    )
    return result_submission(
        requests,
        [PromptNote(num_tokens=sum(len(each.ids) for each in group)) for group in groups],
        wanted.note,
        context,
        call,
        endpoint=wanted.endpoint,
        param=wanted.name(0),
    )


def _num_requests(encodings: Sequence[Encoding], *, most: int) -> int:
    total = sum(len(each.ids) for each in encodings)
    return min(most, len(encodings), -(-total // REQUEST_TOKENS))


def _groups(encodings: Sequence[Encoding], *, most: int) -> list[list[Encoding]]:
    """Consecutive inputs in at most so many groups, of about as many tokens each."""
    share = -(-sum(len(each.ids) for each in encodings) // most)
    groups: list[list[Encoding]] = [[]]
    end, num = share, 0  # tokens after which the next group begins; tokens so far
    for encoding in encodings:
        if groups[-1] and num >= end and len(groups) < most:
            groups.append([])
            end += share
        groups[-1].append(encoding)
        num += len(encoding.ids)
    return groups


def _inputs(group: Sequence[Encoding], *, width: int) -> EncodingInputs:
    firsts = tuple(len(each.ids) - sum(each.types or ()) for each in group)
    lengths = tuple(len(each.ids) for each in group)
    return EncodingInputs(lengths=lengths, firsts=() if firsts == lengths else firsts, width=width)
