"""Reasoning: how the model of a request delimits it, found by the chat template and the prompt.

template's source     the format: which tags separate reasoning and content
end of the prompt     whether the answer begins within the reasoning, or can have none
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from model.text.tokenizer import Tokenizer
from service.api.generation.manifest import ReasoningNote
from service.api.generation.request import Chat, Effort, Generation
from service.messages import Thinking
from service.thinking import BLANKS, THINKING_FORMATS, Phase, ThinkingFormat, symbol, token_text

_GRADES: Mapping[Effort, str] = MappingProxyType({
    "none": "none", "minimal": "low", "low": "low", "medium": "medium", "high": "high",
    "xhigh": "high", "max": "high",
})  # fmt: skip


def thinking_options(template: str, chat: Chat) -> Mapping[str, Any]:
    """Variables with which chat templates switch thinking. One that has no such variable ignores
    them.
    """
    options: dict[str, Any] = {}
    if chat.thinks is not None:
        options = {"enable_thinking": chat.thinks, "thinking": chat.thinks}
    if chat.thinks is False or chat.effort is not None:
        grade = "none" if chat.thinks is False else _GRADES[chat.effort or "medium"]
        if not _quotes(template, "none"):  # gpt-oss: low, medium, high
            grade = "low" if grade == "none" else grade
        elif grade != "none":  # Mistral: none, high
            grade = "high"
        options["reasoning_effort"] = grade
    return options


def _quotes(template: str, word: str) -> bool:
    """Whether the template compares its effort with a word."""
    return f'"{word}"' in template or f"'{word}'" in template


def thinking_format_name(tokenizer: Tokenizer) -> str | None:
    """The name, in `THINKING_FORMATS`, of the format of the model's chat template."""
    template = tokenizer.chat_template or ""
    for name, tags in THINKING_FORMATS.items():
        if all(sign in template for sign in tags.signs):
            return name
    return None


def special_parts(tags: ThinkingFormat, tokenizer: Tokenizer) -> dict[str, int]:
    """Part of a tag -> token id, for the parts that are special tokens of the model."""
    found = {part: tokenizer.special_id(part) for part in tags.parts}
    return {part: id_ for part, id_ in found.items() if id_ is not None}


def reasoning_note(
    generation: Generation, prompt_ids: Sequence[int], tokenizer: Tokenizer
) -> ReasoningNote | None:
    """None if the model does not think, or not after this prompt."""
    chat = generation.prompt
    name = thinking_format_name(tokenizer)
    if not isinstance(chat, Chat) or name is None:
        return None
    continued = chat.continue_final_message
    phase = _phase(THINKING_FORMATS[name], prompt_ids, tokenizer, continued=continued)
    if phase is Phase.CONTENT:
        return None
    return ReasoningNote(
        format=name,
        opened=phase is Phase.THINKING,
        verbatim=generation.output is not None and generation.tools is None,
        included=generation.include_reasoning,
    )


def _phase(
    tags: ThinkingFormat, ids: Sequence[int], tokenizer: Tokenizer, *, continued: bool
) -> Phase:
    """The phase at the end of a prompt, by its text since the last special token that is no tag.

    A client's text counts only if it is the beginning of the answer.
    """
    parts = special_parts(tags, tokenizer)
    symbols = {text: symbol(index) for index, text in enumerate(parts)}
    by_id = {parts[text]: symbol for text, symbol in symbols.items()}
    tags = tags.spelled(symbols)
    pieces: list[str] = []
    for id_ in reversed(ids):
        if tokenizer.is_special(id_) and id_ not in by_id:
            break
        pieces.append(token_text(id_, token_bytes=tokenizer.token_bytes, symbols=by_id))
    text = "".join(reversed(pieces)).rstrip(BLANKS)
    if not continued:
        if text.endswith(tags.opening):
            return Phase.THINKING
        return Phase.CONTENT if text.endswith((tags.closing, *tags.heads)) else Phase.START
    opened, closed = text.rfind(tags.opening), text.rfind(tags.closing)
    return Phase.THINKING if opened > closed else Phase.CONTENT


def _ids_of(tag: str, tags: ThinkingFormat, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a tag."""
    parts = special_parts(tags, tokenizer)
    pattern = "|".join(map(re.escape, parts))
    texts = re.split(f"({pattern})", tag) if parts else [tag]
    return [
        id_
        for text in texts
        for id_ in ([parts[text]] if text in parts else tokenizer.encode(text, add_bos=False))
    ]


def thinking(
    note: ReasoningNote | None, tokenizer: Tokenizer, *, grammar: bool, budget: int | None
) -> Thinking | None:
    """What an engine must know of the reasoning; None: nothing, it has no limit and no grammar
    follows.
    """
    if note is None or not (grammar or budget is not None):
        return None
    tags = THINKING_FORMATS[note.format]

    def ids(*texts: str) -> tuple[int, ...]:
        return tuple(id_ for text in texts for id_ in _ids_of(text, tags, tokenizer))

    return Thinking(
        format=note.format,
        opened=note.opened,
        verbatim=note.verbatim,
        openings=tuple(ids(tag) for tag in (tags.opening, *tags.heads)),
        joint=ids(tags.joint),
        closing=ids(tags.closing, tags.joint, *tags.heads[:1]),
        symbols=tuple(sorted(special_parts(tags, tokenizer).items())),
        budget=budget,
    )
