"""Encoders in GGUF files: the WordPiece tokenizer, and how states become an embedding. Torch-free.

llama.cpp stores WordPiece turned around: a token that begins a word has a phantom blank before it,
one that continues a word has nothing in place of `##`.
"""

from __future__ import annotations

from enum import IntEnum

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from model.checkpoint import CheckpointError
from model.checkpoint.gguf_header import GgufHeader
from model.checkpoint.gguf_vocabulary import Tokens, read_tokens, token_id
from model.checkpoint.sentence_transformers import SentenceSettings
from model.checkpoint.token_bytes import BLANK
from model.config import Pooling

CASED_SHARE = 0.01  # of tokens with a capital A to Z; vocabularies of lower case have hardly any
LONGEST_WORD = 100  # characters; longer ones are unknown, as in BERT


class _Pooling(IntEnum):
    """As llama.cpp numbers them."""

    NONE = 0
    MEAN = 1
    CLS = 2
    LAST = 3


_POOLINGS = {_Pooling.MEAN: Pooling.MEAN, _Pooling.CLS: Pooling.CLS, _Pooling.LAST: Pooling.LAST}


def settings_of(header: GgufHeader) -> SentenceSettings:
    """The pooling that the file states; embeddings have length 1, as those of llama.cpp's server.

    Raises CheckpointError.
    """
    kind = header.integer(f"{header.text('general.architecture')}.pooling_type")
    if kind not in (None, *_Pooling):
        raise CheckpointError(
            f"{header.file_name}: pooling_type {kind} is not supported; 0 to 3 are. Classifiers and"
            " rerankers are read from safetensors"
        )
    pooling = None if kind is None else _POOLINGS.get(_Pooling(kind))
    return SentenceSettings(pooling=pooling, normalised=True)


def tokenizer_of(header: GgufHeader) -> Tokenizer:
    """BERT's tokenizer of a GGUF file. Raises CheckpointError for another kind of vocabulary."""
    kind = header.text("tokenizer.ggml.model")
    if kind != "bert":
        raise CheckpointError(
            f"{header.file_name}: the vocabulary type {kind!r:.80} is not supported for encoders;"
            " bert (WordPiece) is"
        )
    tokens = read_tokens(header)
    if not any(text.startswith(BLANK) for text in tokens.plain):
        raise CheckpointError(f"{header.file_name}: no token of the vocabulary begins a word")
    vocabulary = {_spelled(text): id_ for text, id_ in tokens.plain.items()}
    vocabulary |= tokens.literal | tokens.special
    first = _named(header, tokens, "[CLS]", "cls", "bos")
    last = _named(header, tokens, "[SEP]", "seperator", "eos")  # llama.cpp's spelling
    unknown, _ = _named(header, tokens, "[UNK]", "unknown")
    tokenizer = Tokenizer(
        models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=LONGEST_WORD)
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not _is_cased(tokens))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[first[0], "$A", last[0]],
        pair=[first[0], "$A", last[0], "$B:1", f"{last[0]}:1"],
        special_tokens=[first, last],
    )
    return tokenizer


def _spelled(text: str) -> str:
    """A token as BERT spells it. Old files have tokens in brackets without a phantom blank."""
    if text.startswith("[") and text.endswith("]") and len(text) > 1:
        return text
    return text.removeprefix(BLANK) if text.startswith(BLANK) and text != BLANK else f"##{text}"


def _named(header: GgufHeader, tokens: Tokens, text: str, *names: str) -> tuple[str, int]:
    """Text and id of a special token: by the metadata or, if it is silent, by its usual text."""
    ids = (token_id(header, name, tokens) for name in names)
    id_ = next((found for found in ids if found is not None), tokens.special.get(text))
    if id_ is None:
        raise CheckpointError(f"{header.file_name}: {names[0]}_token_id is missing")
    return tokens.texts[id_], id_


def _is_cased(tokens: Tokens) -> bool:
    """Whether the model reads capitals, which no metadata states (llama.cpp lowers all text)."""
    cased = sum(any("A" <= each <= "Z" for each in text) for text in tokens.plain)
    return cased > CASED_SHARE * len(tokens.plain)
