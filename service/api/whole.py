"""Whole: an answer without streaming is its stream, collected into one JSON body."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import orjson

from service.api.answer import Answer
from service.api.events import answer_id
from service.api.logprobs import chat_logprobs, completion_logprobs
from service.api.manifest import Endpoint
from service.api.pieces import Opening, Piece, Scored
from service.api.usage import usage
from service.messages import End


@dataclass(slots=True)
class Collected:
    """One choice, summed up."""

    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    prompt_ids: tuple[int, ...] = ()
    scored: list[Scored] = field(default_factory=list)
    score: float = 0.0  # sum of the answer's log probabilities
    end: End | None = None

    @property
    def mean_logprob(self) -> float:
        """What `best_of` chooses by."""
        return self.score / max(1, len(self.ids))


async def collect(answer: Answer) -> bytes:
    """The JSON body. Raises as `Answer.shown` does."""
    choices = [Collected() for _ in answer.readers]
    async with aclosing(answer.shown()) as shown_pieces:
        async for choice, shown in shown_pieces:
            _add(choices[choice], shown)
    manifest = answer.manifest
    kept = [
        best
        for first in range(0, len(choices), manifest.width)
        for best in _best(choices[first : first + manifest.width], manifest.keep)
    ]
    chat = manifest.endpoint is Endpoint.CHAT
    return orjson.dumps({
        "id": answer_id(answer),
        "object": "chat.completion" if chat else "text_completion",
        "created": manifest.created,
        "model": manifest.model,
        "system_fingerprint": manifest.fingerprint,
        "choices": [_choice(answer, index, choice) for index, choice in enumerate(kept)],
        "usage": usage(manifest, answer.readers),
    })  # fmt: skip


def _add(choice: Collected, shown: Opening | Piece | End) -> None:
    if isinstance(shown, End):
        choice.end = shown
        return
    choice.texts.append(shown.text)
    choice.scored.extend(shown.scored)
    if isinstance(shown, Opening):
        choice.prompt_ids = shown.prompt_ids
    else:
        choice.ids.extend(shown.ids)
        choice.score += sum(item.logprob.logprob for item in shown.scored if item.logprob)


def _best(choices: Sequence[Collected], keep: int) -> list[Collected]:
    """The `keep` likeliest in falling order; all of them stay in theirs."""
    if keep == len(choices):
        return list(choices)
    return sorted(choices, key=lambda choice: choice.mean_logprob, reverse=True)[:keep]


def _choice(answer: Answer, index: int, choice: Collected) -> dict[str, Any]:
    manifest, tokenizer = answer.manifest, answer.context.tokenizer
    chat = manifest.endpoint is Endpoint.CHAT
    text = "".join(choice.texts)
    logprobs = None
    if manifest.logprobs is not None:
        logprobs = (chat_logprobs if chat else completion_logprobs)(choice.scored, tokenizer)
    shown = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    fields: dict[str, Any] = {
        "index": index,
        **shown,
        "logprobs": logprobs,
        "finish_reason": choice.end and choice.end.reason.value,
        "stop_reason": choice.end and choice.end.stopped_by,
    }
    if manifest.return_token_ids:
        fields |= {"token_ids": choice.ids, "prompt_token_ids": choice.prompt_ids}
    return fields
