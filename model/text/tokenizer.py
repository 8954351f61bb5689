"""Text -> token ids and back, and chat messages -> token ids. Torch-free.

A user's text stays text: if it spells a special token, it is encoded as ordinary tokens, unless
`parse_special` is set. Otherwise special tokens come from the model's own chat template, and from
`add_bos` if the model asks for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from model.checkpoint import find_gguf
from model.checkpoint.folder_vocabulary import from_folder
from model.checkpoint.gguf_parts import read_headers
from model.checkpoint.gguf_vocabulary import from_gguf
from model.checkpoint.vocabulary import Vocabulary
from model.text.chat_template import (
    ChatTemplate,
    ChatTemplateError,
    Messages,
    with_plain_content,
)
from model.text.disguise import Disguise, SpecialTexts, strings_of
from model.text.span import Span, find_span
from model.text.template_calls import CallRendering, probe_calls
from model.text.template_fit import TemplateFit
from model.text.template_renderer import Template, open_template


class Tokenizer:
    """A model's tokenizer. May be used by several threads at once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._special_ids = {special.id: text for text, special in vocabulary.specials.items()}
        self.vocab_size = vocabulary.size  # at least the rows of the model's embedding
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.chat_template = vocabulary.chat_template
        self.token_bytes: Sequence[bytes] = vocabulary.token_bytes

    @classmethod
    def from_checkpoint(cls, path: Path) -> Tokenizer:
        """Reads a GGUF file's vocabulary or a folder's tokenizer.json. Raises CheckpointError."""
        gguf = find_gguf(path)
        if gguf is not None:
            return cls(from_gguf(read_headers(gguf)))
        return cls(from_folder(path if path.is_dir() else path.parent))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what token ids stand for: the bytes of each, and the special tokens."""
        digest = hashlib.sha256()
        for text in self.token_bytes:
            digest.update(len(text).to_bytes(4, "little") + text)
        digest.update(repr(sorted(self._special_ids.items())).encode())
        return digest.hexdigest()

    def encode(
        self, text: str, *, add_bos: bool = True, parse_special: bool = False, target: bool = False
    ) -> list[int]:
        """The ids of a text, in time linear in its length and without the interpreter lock.

        `add_bos` puts the beginning-of-text token first if the model was trained with it,
        `parse_special` makes special tokens of their texts, and `target` splits the text as one of
        a translator's decoder. Raises UnicodeEncodeError for lone surrogates.
        """
        if target and self._vocabulary.target is not None:
            return self._split(self._vocabulary.target, text)
        if parse_special:
            ids = self._ids_with_specials(text)
        else:
            ids = self._text_ids(text, is_first=True)
        if add_bos and self._vocabulary.add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        return ids

    def spellings(self, text: str) -> set[tuple[int, ...]]:
        """The ids of a text at the beginning of an output, within a word, and after a blank."""
        begun = {tuple(self._text_ids(text, is_first=first)) for first in (True, False)}
        return {*begun, tuple(self._text_ids(f" {text}", is_first=False))} - {()}

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids; incomplete UTF-8 becomes U+FFFD. Special tokens have no text, or their
        names.
        """
        table = self.token_bytes if skip_special else self.visible_bytes
        return b"".join([table[id_] for id_ in ids]).decode("utf-8", "replace")

    @cached_property
    def visible_bytes(self) -> Sequence[bytes]:
        """`token_bytes` with the names of special tokens as their texts."""
        table = list(self.token_bytes)
        for id_, text in self._special_ids.items():
            table[id_] = text.encode()
        return table

    def fewest_tokens(self, texts: Iterable[str], *, parse_special: bool = False) -> int:
        """A lower bound of the tokens that texts have together, without tokenising; 0 if this kind
        of tokenizer has no such bound.
        """
        span = self._special_span if parse_special else self._span
        return 0 if span is None else span.fewest_tokens(texts)

    def is_special(self, token_id: int) -> bool:
        """Whether an id stands for no text of its own."""
        return not self.token_bytes[token_id]

    def special_id(self, text: str) -> int | None:
        """The id of the special token of this name, if the model has one."""
        special = self._vocabulary.specials.get(text)
        return None if special is None else special.id

    def token_text(self, token_id: int) -> str:
        """What to show for one token: its text or, for a special token, its name."""
        return self._special_ids.get(token_id) or self.decode([token_id])

    @property
    def renders_in_process(self) -> bool:
        """Whether the chat template is rendered without waiting for another process."""
        return isinstance(self._template, ChatTemplate)

    @cached_property
    def call_rendering(self) -> CallRendering:
        """What the chat template writes for tools and calls. The first access renders probes.

        Raises ChatTemplateLimitError or TemplateUnavailableError.
        """
        return CallRendering() if self._template is None else probe_calls(self._rendered)

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: object,
    ) -> list[int]:
        """The prompt of a conversation. Raises ChatTemplateError or TemplateUnavailableError.

        Content is a string or a list of text parts. Instructions (system and developer messages)
        go to the positions that the template renders, see `template_fit`.
        `continue_final_message` leaves the last message open for the model to continue; then no
        generation prompt is added.
        """
        if self._template is None:
            raise ChatTemplateError("the model has no chat template")
        plain = with_plain_content(messages)
        strings = strings_of([plain, variables, self.chat_template])
        disguise = Disguise(self._special_texts, strings)
        plain = disguise.put_on(plain)
        if continue_final_message:
            _leave_open(plain, disguise)
        rendered = self._rendered(
            self._fit.fit(plain),
            **disguise.put_on(variables),
            add_generation_prompt=add_generation_prompt and not continue_final_message,
        )
        if continue_final_message:
            rendered = _up_to_the_end(rendered, disguise)
        return self._ids_with_specials(rendered, disguise)

    def _rendered(self, messages: Messages, **variables: object) -> str:
        if self._template is None:
            raise ChatTemplateError("the model has no chat template")
        fields = {"messages": messages, "add_generation_prompt": True}
        return self._template.render({**self._vocabulary.names, **fields, **variables})

    def _text_ids(self, text: str, *, is_first: bool) -> list[int]:
        splitter = self._vocabulary.first if is_first else self._vocabulary.rest
        return self._split(splitter, text)

    def _split(self, splitter: tokenizers.Tokenizer, text: str) -> list[int]:
        if not text:
            return []
        text.encode()  # raises for lone surrogates; the library's own error would be about types
        # The batch call is the one that lets go of the interpreter lock.
        (encoding,) = splitter.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        if ids and max(ids) >= self.vocab_size:  # bytes that the vocabulary lacks
            return [id_ for id_ in ids if id_ < self.vocab_size]
        return ids

    def _ids_with_specials(self, text: str, disguise: Disguise | None = None) -> list[int]:
        """The ids of a text: special tokens as such but those in disguise, all else as text."""
        pattern = self._special_texts.pattern
        pieces = pattern.split(text) if pattern else [text]
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if index % 2:
                ids.append(self._vocabulary.specials[piece].id)
                continue
            plain = piece
            if index and self._vocabulary.specials[pieces[index - 1]].rstrip:
                plain = plain.lstrip()
            if index + 1 < len(pieces) and self._vocabulary.specials[pieces[index + 1]].lstrip:
                plain = plain.rstrip()
            if disguise is not None:
                plain = disguise.remove(plain)
            ids += self._text_ids(plain, is_first=index == 0)
        return ids

    @cached_property
    def _span(self) -> Span | None:
        return find_span(self._vocabulary.first, self.token_bytes)

    @cached_property
    def _special_span(self) -> Span | None:
        """The bound if special tokens are parsed, which may absorb blanks, however many."""
        specials = self._vocabulary.specials
        if self._span is None or any(each.lstrip or each.rstrip for each in specials.values()):
            return None
        lengths = [len(text.encode()) for text in specials]
        return replace(self._span, longest=max([self._span.longest, *lengths]))

    @cached_property
    def _template(self) -> Template | None:
        return None if self.chat_template is None else open_template(self.chat_template)

    @cached_property
    def _fit(self) -> TemplateFit:
        return TemplateFit(self._rendered)

    @cached_property
    def _special_texts(self) -> SpecialTexts:
        return SpecialTexts(self._vocabulary.specials)


def _leave_open(messages: list[dict[str, Any]], disguise: Disguise) -> None:
    """Marks the end of the last message. The blank behind the mark shows whether it was trimmed."""
    if not messages or not isinstance(messages[-1]["content"], str):
        raise ChatTemplateError("there is no final message to continue")
    messages[-1]["content"] += f"{disguise.end} "


def _up_to_the_end(rendered: str, disguise: Disguise) -> str:
    text, mark, behind = rendered.rpartition(disguise.end)
    if not mark:
        raise ChatTemplateError("the chat template leaves the final message out")
    return text if behind.startswith(" ") else text.rstrip()
