"""Text -> what an encoder reads: token ids with the special tokens around them, and their types.

WordPiece, byte-level BPE and Unigram by the `tokenizers` library; which special tokens stand where
is the post-processor's in tokenizer.json. Of GGUF files, WordPiece is read, and what decoders have.
A text that spells a special token stays text. Torch-free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import tokenizers

from model.checkpoint import CheckpointError, find_gguf
from model.checkpoint.folder_vocabulary import build, readable
from model.checkpoint.gguf_encoder import tokenizer_of
from model.checkpoint.gguf_parts import read_headers
from model.checkpoint.json_file import read_json
from model.checkpoint.sentencepiece_file import MISSING


@dataclass(frozen=True, slots=True)
class Encoding:
    """One input of an encoder: a text or a pair of texts, whole."""

    ids: tuple[int, ...]
    types: tuple[int, ...] | None = None  # of each token: 0 or, in a pair's second text, 1; None: 0


class EncoderTokenizer:
    """An encoder's tokenizer. May be used by several threads at once.

    `max_tokens` is the longest input of the model, special tokens included: nothing is cut to it
    unless a call asks for that.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        max_tokens: int,
        splitter: tokenizers.Tokenizer | None = None,
        specials: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """`splitter` splits texts, in which it finds no special tokens; None: `tokenizer` does.
        `specials`: the texts of special tokens that `tokenizer` does not know.
        """
        self._tokenizer = tokenizer
        self._splitter = splitter or tokenizer
        self._specials = specials
        self.max_tokens = max_tokens
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.num_special = tokenizer.num_special_tokens_to_add(is_pair=False)
        self.num_special_of_pair = tokenizer.num_special_tokens_to_add(is_pair=True)

    @classmethod
    def from_path(cls, path: Path, *, max_tokens: int) -> EncoderTokenizer:
        """Reads a GGUF file, or tokenizer.json in a model's folder. Raises CheckpointError."""
        gguf = find_gguf(path)
        if gguf is not None:
            tokenizer, specials = tokenizer_of(read_headers(gguf))
            return cls(tokenizer, max_tokens=max_tokens, specials=specials)
        folder = path if path.is_dir() else path.parent
        file = folder / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(MISSING)
        body = read_json(file)
        tokenizer = build(body)
        added = body.get("added_tokens") or ()
        read = readable(body, {token["content"] for token in added if token["special"]})
        splitter = tokenizer if read is body else build(read)
        return cls(tokenizer, max_tokens=max_tokens, splitter=splitter)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer as the library writes it."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str, *, truncate_to: int | None = None) -> Encoding:
        """A text between its special tokens; the end of the text is cut off to fit `truncate_to`.

        Raises UnicodeEncodeError for lone surrogates, ValueError if `truncate_to` leaves no room.
        """
        return self.encode_batch([text], truncate_to=truncate_to)[0]

    def encode_batch(
        self, texts: Sequence[str], *, truncate_to: int | None = None
    ) -> list[Encoding]:
        """The same for many texts, in one call without the interpreter lock."""
        room = _room(truncate_to, self.num_special)
        found = []
        for encoding in self._split(texts):
            if room is not None:
                encoding.truncate(room)
            found.append(_encoding(self._tokenizer.post_process(encoding)))
        return found

    def encode_pair(self, first: str, second: str, *, truncate_to: int | None = None) -> Encoding:
        """Two texts as one input. Of the longer one the end is cut off first to fit `truncate_to`.

        Raises as `encode`.
        """
        room = _room(truncate_to, self.num_special_of_pair)
        a, b = self._split([first, second])
        if room is not None and len(a) + len(b) > room:
            kept = min(len(a), max(room - len(b), room - room // 2))
            a.truncate(kept)
            b.truncate(room - kept)
        return _encoding(self._tokenizer.post_process(a, b))

    def token_text(self, token_id: int) -> str:
        """What to show for one token: as the vocabulary spells it."""
        return self._tokenizer.id_to_token(token_id) or self._specials.get(token_id, "")

    def _split(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        for text in texts:
            text.encode()  # raises for lone surrogates; the library's own error is about types
        return self._splitter.encode_batch_fast(list(texts), add_special_tokens=False)


def _room(truncate_to: int | None, specials: int) -> int | None:
    """Tokens of text that fit between the special ones."""
    if truncate_to is not None and truncate_to <= specials:
        raise ValueError(f"must be above {specials}, the number of special tokens")
    return None if truncate_to is None else truncate_to - specials


def _encoding(found: tokenizers.Encoding) -> Encoding:
    types = tuple(found.type_ids)
    return Encoding(tuple(found.ids), types if any(types) else None)
