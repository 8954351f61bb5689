"""Vocabularies: a model's tokens in one form, whatever file they come from.

`folder_vocabulary` reads tokenizer.json, `gguf_vocabulary` GGUF files. Torch-free: a process that
only handles text reads nothing but these. How text becomes tokens is `model.text.tokenizer`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from model.checkpoint import find_gguf

MAX_VOCABULARY = 2**20

# Added tokens that end an answer in any model that has them, whatever its metadata contains. They
# are special even if the file declares them as text: a user's text must not spell them.
END_OF_TURN = frozenset(
    {
        *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
        *("<end_of_turn>", "<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    }
)


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


def read_vocabulary(path: Path) -> Vocabulary:
    """Reads a GGUF file's vocabulary, or that of a folder with tokenizer.json."""
    from model.checkpoint.folder_vocabulary import from_folder
    from model.checkpoint.gguf_parts import read_headers
    from model.checkpoint.gguf_vocabulary import from_gguf

    gguf = find_gguf(path)
    if gguf is not None:
        return from_gguf(read_headers(gguf))
    return from_folder(path if path.is_dir() else path.parent)
