"""Log probabilities as JSON: OpenAI's parallel lists for completions and objects for chats and
responses, and vLLM's form for prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from model.text.tokenizer import Tokenizer
from service.api.generation.deltas import ScoredToken
from service.messages import TokenLogprob

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot write


def completion_logprobs(
    scored: Sequence[ScoredToken], tokenizer: Tokenizer, *, as_ids: bool = False
) -> dict[str, Any]:
    """`tokens`, `token_logprobs`, `top_logprobs`, `text_offset`: one item per token in each."""
    name = _names(tokenizer, as_ids=as_ids)
    return {
        "tokens": [name(item.token) for item in scored],
        "token_logprobs": [item.logprob and _finite(item.logprob.logprob) for item in scored],
        "top_logprobs": [_by_name(item.token, item.logprob, name) for item in scored],
        "text_offset": [item.offset for item in scored],
    }


def _names(tokenizer: Tokenizer, *, as_ids: bool) -> Callable[[int], str]:
    """How a token is shown: by its text, or as vLLM writes its id."""
    return "token_id:{}".format if as_ids else tokenizer.token_text


def _by_name(
    token: int, logprob: TokenLogprob | None, name: Callable[[int], str]
) -> dict[str, float] | None:
    """The top tokens by their names, and the sampled one if it is not among them."""
    if logprob is None:
        return None
    # Of several tokens with the same text the most probable one, which comes first, is kept.
    pairs = {name(other): _finite(value) for other, value in logprob.top[::-1]}
    return {name(token): _finite(logprob.logprob)} | pairs


def chat_logprobs(
    scored: Sequence[ScoredToken], tokenizer: Tokenizer, *, as_ids: bool = False
) -> dict[str, Any]:
    """`content`: one object per token."""
    name = _names(tokenizer, as_ids=as_ids)

    def entry_of(token: int, logprob: float) -> dict[str, Any]:
        token_bytes = list(tokenizer.token_bytes[token])
        return {"token": name(token), "logprob": _finite(logprob), "bytes": token_bytes}

    content = []
    for item in scored:
        if item.logprob is not None:  # answers have one for each token
            entry = entry_of(item.token, item.logprob.logprob)
            top = [entry_of(token, value) for token, value in item.logprob.top]
            content.append(entry | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def prompt_logprobs(
    ids: Sequence[int], logprobs: Sequence[TokenLogprob | None], tokenizer: Tokenizer
) -> list[dict[str, Any] | None] | None:
    """For each token of a prompt its own entry and those of the top tokens, by token id; null for
    the first token. None if the answer ended before they were known.
    """
    if not logprobs:
        return None
    return [
        None if logprob is None else _by_id(token, logprob, tokenizer)
        for token, logprob in zip(ids, logprobs, strict=True)
    ]


def _by_id(token: int, logprob: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    """The token itself first. Its rank is null if it is not among the top tokens."""
    scores = {token: logprob.logprob} | dict(logprob.top)
    ranks = {other: rank for rank, (other, _) in enumerate(logprob.top, start=1)}
    return {
        str(other): {
            "logprob": _finite(value),
            "rank": ranks.get(other),
            "decoded_token": tokenizer.token_text(other),
        }
        for other, value in scores.items()
    }


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
