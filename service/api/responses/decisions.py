"""POST /v1/decisions: the probabilities of fixed answers to questions about one input.

An option of a question is a text that the model could answer. Each question is a request, which
scores the tokens of its options: the journal has their log probabilities in the model's own
distribution. All questions have the input in common, which is computed once, by the prefix cache.
Options that begin alike share the scores of these tokens.

    question    The answer is: a b / a c / d
    scored      prompt -> a, prompt -> d, prompt a -> b, prompt a -> c
    log p       (a b) = log p(a | prompt) + log p(b | prompt a)

The log probability of an option is the sum over its tokens; those of a question are scaled so that
the probabilities add up to 1. If an option is the beginning of another one, the end of the answer
is scored, too.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Path, Request, Response

from service.api.generation.deltas import Accumulator
from service.api.generation.logprobs import LOWEST
from service.api.generation.manifest import DecisionNote, Endpoint, PromptNote, QuestionNote
from service.api.generation.parts import reasoning_note, thinking
from service.api.generation.plan import named_prefixes, priority_of
from service.api.generation.prompts import prompt_tokens, run_in_pool
from service.api.generation.reader import AnswerReader
from service.api.generation.request import Call, Chat, Generation, check_token_ids, read_call
from service.api.generation.results import (
    answer_result,
    ensure_complete,
    find_result,
    max_requests,
    result_submission,
    show_result,
)
from service.api.generation.submit import ensure_accepting
from service.api.http.body import JsonRoute
from service.api.http.context import Caller, Context, JsonRequest, ModelContext, ModelKind
from service.api.http.errors import FieldNames
from service.api.http.models import described
from service.api.responses.decision_schema import (
    AnyQuestion,
    Choice,
    Decision,
    DecisionBody,
    Level,
    Option,
    Predicate,
    StoredDecision,
)
from service.api.responses.dialect import chat_messages
from service.api.responses.items import AnyCall, InputResult
from service.api.tools.chat import ChatMessage
from service.errors import BadRequest
from service.messages import GenerationRequest, SamplingParams, Submission, child_ids

MAX_SCORED = 2**14
"""Tokens of all options of a call."""
_NAMES = FieldNames(prompt="input")

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/decisions", responses=described(Decision, stored=StoredDecision))
async def create_decision(
    body: DecisionBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """Answers questions about an input by the probabilities that a model gives to fixed answers."""
    chosen = ensure_accepting(body.model, context, kinds=[ModelKind.GENERATE])
    _check_calls(body)
    call = read_call(request, tenant, context.limits)
    asked = await _asked(body, chosen, tenant=tenant.name)
    return await answer_result(_plan(body, asked, chosen, call), request, chosen, call, _result)


@router.get("/v1/decisions/{call_id}", responses=described(StoredDecision))
async def show_decision(
    call_id: Annotated[str, Path(description="The id of the call, its x-request-id.")],
    request: Request,
    context: Context,
    tenant: Caller,
) -> Response:
    """The state of a decision and, once it is completed, its result: of calls with `background`
    for --keep-responses, and of all others for a while after their end.
    """
    reader = await find_result(call_id, request, context, tenant, kind=DecisionNote)
    return await show_result(reader, _result, tenant=tenant.name)


def _check_calls(body: DecisionBody) -> None:
    called: set[str] = set()
    for index, item in enumerate(body.input):
        if isinstance(item, AnyCall):
            called.add(item.call_id)
        elif isinstance(item, InputResult) and item.call_id not in called:
            message = "the output of a tool needs an earlier call with its call_id"
            raise BadRequest(message, param=f"input[{index}].call_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A question as token ids."""

    prompt: tuple[int, ...]
    options: list[tuple[int, ...]]
    ends: tuple[int, ...]  # tokens that end an answer; empty: no option needs its end


async def _asked(body: DecisionBody, context: ModelContext, *, tenant: str) -> list[_Asked]:
    """The questions, in order. Raises BadRequest or Unavailable."""
    texts = [_option_texts(question) for question in body.questions]
    encode = context.tokenizer.encode

    def encode_all() -> list[list[tuple[int, ...]]]:
        return [[tuple(encode(each, add_bos=False)) for each in options] for options in texts]

    length = sum(len(each) for options in texts for each in options)
    limits = context.limits
    options = await run_in_pool(context.pools.tokens, tenant, encode_all, length, limits)
    messages = _joined(chat_messages(body.input))
    found = []
    for index, question in enumerate(body.questions):
        await asyncio.sleep(0)  # a short prompt is tokenised on the event loop
        for each in options[index]:
            check_token_ids(each, context, param=f"questions[{index}]")
        asked = _question_text(question, texts[index])
        chat = Chat(messages=tuple(_joined([*messages, _of_user(asked)])), thinking=False)
        prompt = await _prompt_ids(chat, context, tenant=tenant)
        ends = tuple(sorted(context.tokenizer.eos_ids)) if _nested(options[index]) else ()
        found.append(_Asked(prompt=prompt, options=options[index], ends=ends))
    return found


async def _prompt_ids(chat: Chat, context: ModelContext, *, tenant: str) -> tuple[int, ...]:
    """Up to where the answer begins: without reasoning."""
    generation = Generation(
        model=None, prompt=chat, sampling=SamplingParams(seed=0), names=_NAMES, max_tokens=1
    )
    (prompt,) = await prompt_tokens(generation, context, tenant=tenant)
    note = reasoning_note(generation, prompt.ids, context.tokenizer)
    if note is None or not note.opened:
        return prompt.ids
    forced = thinking(note, context.tokenizer, grammar=True, budget=None)
    return prompt.ids if forced is None else prompt.ids + forced.closing


def _of_user(text: str) -> ChatMessage:
    return ChatMessage(role="user", content=text)


def _joined(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Consecutive messages of the user as one: many templates take no others."""
    found: list[ChatMessage] = []
    for message in messages:
        if message.role == "user" and found and found[-1].role == "user":
            found[-1] = _of_user(f"{found[-1].content}\n\n{message.content}")
        else:
            found.append(message)
    return found


def _option_texts(question: AnyQuestion) -> list[str]:
    """What the model would answer. Options are distinct, so a text and a boolean are quoted."""
    if isinstance(question, Predicate):
        return ["yes", "no"]
    if not isinstance(question, Choice):
        return [level.label for level in question.levels]
    values = [option.value for option in question.choices]
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    return texts if len(set(texts)) == len(texts) else [json.dumps(value) for value in values]


# The wording is part of the prompt: a change of it changes decisions.
def _question_text(question: AnyQuestion, texts: Sequence[str]) -> str:
    if isinstance(question, Predicate):
        return f"{question.instructions}\n\nIs this true? Answer yes or no."
    options: Sequence[Option | Level] = (
        question.choices if isinstance(question, Choice) else question.levels
    )
    order = "" if isinstance(question, Choice) else ", from the lowest to the highest"
    lines = [
        f"- {text}" + (f": {option.description}" if option.description else "")
        for text, option in zip(texts, options, strict=True)
    ]
    rule = f"Answer with one of these{order}, and nothing else:"
    return "\n".join([question.instructions, "", rule, *lines])


def _nested(options: Sequence[tuple[int, ...]]) -> bool:
    """Whether one is the beginning of another one."""
    wholes = set(options)
    return any(ids[:length] in wholes for ids in options for length in range(len(ids)))


def _plan(
    body: DecisionBody, asked: Sequence[_Asked], context: ModelContext, call: Call
) -> Submission:
    """Raises BadRequest or Forbidden."""
    scored = [_steps(question) for question in asked]
    _check(asked, scored, context, call)
    num_scored, notes = 0, []
    for question, given, steps in zip(body.questions, asked, scored, strict=True):
        at = {step: num_scored + number for number, step in enumerate(steps)}
        notes.append(_note(question, given, at))
        num_scored += len(steps)
    requests = [
        GenerationRequest(
            id=request_id,
            prompt_ids=question.prompt,
            sampling=SamplingParams(seed=0, temperature=0.0, top_logprobs=0),
            max_tokens=len(steps),
            scored=tuple(steps),
            ignore_eos=True,
            tenant=call.tenant.name,
            priority=priority_of(call, body.priority),
            timeout_ms=call.timeout_ms,
            trace=call.trace,
            model=context.card.key,
        )
        for request_id, question, steps in zip(
            child_ids(call.id, len(asked)), asked, scored, strict=True
        )
    ]
    return result_submission(
        requests,
        [PromptNote(num_tokens=len(question.prompt)) for question in asked],
        DecisionNote(
            questions=tuple(notes), num_inputs=num_scored, background=body.background or False
        ),
        context,
        call,
        endpoint=Endpoint.DECISIONS,
        param="input",
        counted="all questions, each with the input and the beginnings of its options,",
        prefixes=named_prefixes(requests, 1, context.card),
    )


def _steps(question: _Asked) -> list[tuple[int, ...]]:
    """What is scored: each beginning of an option, the shortest ones first, and its ends."""
    ended = [(*ids, end) for ids in question.options for end in question.ends]
    found = {ids[:length] for ids in question.options for length in range(1, len(ids) + 1)}
    return sorted(found.union(ended), key=lambda ids: (len(ids), ids))


def _note(question: AnyQuestion, asked: _Asked, at: dict[tuple[int, ...], int]) -> QuestionNote:
    """`at`: of each step, its number among those of all questions."""
    values: list[str | bool] = [True, False]
    if not isinstance(question, Predicate):
        values = (
            [option.value for option in question.choices]
            if isinstance(question, Choice)
            else [level.label for level in question.levels]
        )
    return QuestionNote(
        type=question.type,
        name=question.name,
        options=tuple(values),
        paths=tuple(
            tuple(at[ids[:length]] for length in range(1, len(ids) + 1)) for ids in asked.options
        ),
        ends=tuple(tuple(at[(*ids, end)] for end in asked.ends) for ids in asked.options),
    )


def _check(
    asked: Sequence[_Asked],
    scored: Sequence[Sequence[tuple[int, ...]]],
    context: ModelContext,
    call: Call,
) -> None:
    """Raises BadRequest."""
    num = sum(map(len, scored))
    if num > MAX_SCORED:
        raise BadRequest(
            f"the options of all questions together may be at most {MAX_SCORED} tokens, and these "
            f"are {num}: ask fewer questions, or give shorter options",
            code="array_above_max_length",
            param="questions",
        )
    most = max_requests(context, call)
    if len(asked) > most:
        raise BadRequest(
            f"each question is a request, and only {most} may be in flight here: ask at most "
            f"{most} questions in a call",
            code="array_above_max_length",
            param="questions",
        )
    longest = context.card.max_model_len
    if any(
        len(each.prompt) + len(steps[-1]) > longest  # the longest one is the last
        for each, steps in zip(asked, scored, strict=True)
    ):
        raise BadRequest(
            "input, a question and its answer together may be at most "
            f"{longest} tokens, the context length",
            code="context_length_exceeded",
            param="input",
        )


async def _result(reader: AnswerReader, choices: Sequence[Accumulator], _tenant: str) -> bytes:
    """The decision. Raises DeadlineExceeded or Conflict if a token has no log probability."""
    ensure_complete(choices)
    note, usage = reader.manifest.decision, reader.usage
    scored = [item.logprob for choice in choices for item in choice.scored]
    logprobs = [max(LOWEST, item.logprob) for item in scored if item is not None]
    answers = [] if note is None else [_answer(each, logprobs) for each in note.questions]
    return orjson.dumps({
        "id": reader.id,
        "model": reader.context.card.id,
        "answers": answers,
        "usage": {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens, "cache_write_tokens": 0,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        },
        "system_fingerprint": reader.fingerprint(),
    })  # fmt: skip


def _answer(question: QuestionNote, logprobs: Sequence[float]) -> dict[str, Any]:
    probs = _normalised(
        [
            math.fsum(logprobs[number] for number in path)
            + (_log_sum([logprobs[number] for number in ends]) if ends else 0.0)
            for path, ends in zip(question.paths, question.ends, strict=True)
        ]
    )
    head: dict[str, Any] = {"type": question.type, "name": question.name}
    if question.type == "predicate":
        return head | {"probability": probs[0]}
    best = max(range(len(probs)), key=lambda index: (probs[index], -index))
    listed: list[dict[str, Any]]
    answer: dict[str, Any]
    if question.type == "choice":
        listed = [
            {"value": value, "probability": prob}
            for value, prob in zip(question.options, probs, strict=True)
        ]
        answer = {"choice": question.options[best]}
    else:
        listed = [
            {"value": value, "label": label, "probability": prob}
            for value, (label, prob) in enumerate(zip(question.options, probs, strict=True))
        ]
        answer = {"score": math.fsum(value * prob for value, prob in enumerate(probs))}
    return head | answer | {"confidence": probs[best], "probabilities": listed}


def _normalised(logprobs: Sequence[float]) -> list[float]:
    """Probabilities of outcomes of which one is certain."""
    highest = max(logprobs)
    shares = [math.exp(value - highest) for value in logprobs]
    total = math.fsum(shares)
    return [share / total for share in shares]


def _log_sum(values: Sequence[float]) -> float:
    """The logarithm of the sum of these exponentials."""
    highest = max(values)
    return highest + math.log(math.fsum(math.exp(value - highest) for value in values))
