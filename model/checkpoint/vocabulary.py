"""Vocabularies: a model's tokens in one form, whatever file they come from.

`folder_vocabulary` reads tokenizer.json, `sentencepiece_file` SentencePiece's files, and
`gguf_vocabulary` GGUF files. Torch-free: a process that only handles text reads nothing but these.
How text becomes tokens is `model.text.tokenizer`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from tokenizers import Tokenizer

MAX_VOCABULARY = 2**20

# Added tokens that end an answer in any model that has them, whatever its metadata contains. They
# are special even if the file declares them as text: a user's text must not spell them.
END_OF_TURN = frozenset(
    {
        *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
        *("<end_of_turn>", "<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    }
)


class Kind(IntEnum):
    """Types of tokens, as SentencePiece and llama.cpp number them."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4  # found in text before all else, and text itself
    UNUSED = 5  # padding: an id without a token
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Special:
    """A special token, and which blanks around it a template's text loses to it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A model's tokens. `first` splits text at a prompt's start, `rest` text after a special token.

    Both take special tokens' texts for ordinary text. Ids from `size` on are dropped: they stand
    for bytes that the vocabulary does not have.
    """

    first: Tokenizer
    rest: Tokenizer
    size: int  # at least the rows of the embedding
    token_bytes: tuple[bytes, ...]  # b"" for special tokens and for ids without a token
    specials: Mapping[str, Special]
    add_bos: bool
    bos_id: int | None
    eos_ids: frozenset[int]  # of those that the network can produce
    chat_template: str | None
    names: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token, ...: text
    target: Tokenizer | None = None  # of the decoder's texts, if it splits them in another way
