"""Models that embed in GGUF files: the tokenizer, and how states become an embedding. Torch-free.

A decoder embeds if the file states its pooling. llama.cpp stores WordPiece turned around: a token
that begins a word has a phantom blank before it, one that continues a word has nothing in place of
`##`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from model.checkpoint import CheckpointError
from model.checkpoint.gguf_config import ENCODERS
from model.checkpoint.gguf_header import GgufHeader
from model.checkpoint.gguf_vocabulary import Tokens, from_gguf, read_tokens, token_id
from model.checkpoint.sentence_transformers import SentenceSettings
from model.checkpoint.token_bytes import BLANK
from model.config import Pooling

CASED_SHARE = 0.01  # of tokens with a capital A to Z; vocabularies of lower case have hardly any
LONGEST_WORD = 100  # characters; longer ones are unknown, as in BERT
_QWEN3_EMBEDDING = "qwen3-embedding"
# Of the model's own folder; its files in GGUF have neither the prompts nor, if they are early ones,
# the end of a text.
_QWEN3_PROMPTS = {
    "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query"
    "\nQuery:",
    "document": "",
}
_QWEN3_END = "<|endoftext|>"


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
    kind = pooling_of(header)
    if kind not in (None, *_Pooling):
        raise CheckpointError(
            f"{header.file_name}: pooling_type {kind} is not supported; 0 to 3 are. Classifiers and"
            " rerankers are read from safetensors"
        )
    pooling = None if kind is None else _POOLINGS.get(_Pooling(kind))
    prompts = _QWEN3_PROMPTS if _is_qwen3_embedding(header) else {}
    return SentenceSettings(pooling=pooling, normalised=True, prompts=prompts)


def pooling_of(header: GgufHeader) -> int | None:
    """The pooling that a file states, as llama.cpp numbers it. Raises CheckpointError."""
    return header.integer(f"{header.text('general.architecture')}.pooling_type")


def embeds(header: GgufHeader) -> bool:
    """Whether the file states that its model pools states, encoder or not. Raises
    CheckpointError.
    """
    return pooling_of(header) not in (None, _Pooling.NONE)


def _is_qwen3_embedding(header: GgufHeader) -> bool:
    names = (header.text(f"general.{key}") or "" for key in ("basename", "name"))
    return any(name.lower().replace(" ", "-").startswith(_QWEN3_EMBEDDING) for name in names)


def tokenizer_of(header: GgufHeader) -> tuple[Tokenizer, Mapping[int, str]]:
    """The tokenizer of a GGUF file for whole inputs, and the texts of special tokens that it lacks.

    Raises CheckpointError.
    """
    if header.text("general.architecture") in ENCODERS:
        return _wordpiece(header), {}
    return _decoders_own(header)


def _decoders_own(header: GgufHeader) -> tuple[Tokenizer, Mapping[int, str]]:
    """A decoder's, with the tokens that the file puts before and behind each input."""
    vocabulary, tokens = from_gguf(header), read_tokens(header)
    first = vocabulary.bos_id if vocabulary.add_bos else None
    last, ends = token_id(header, "eos", tokens), header.flag("tokenizer.ggml.add_eos_token")
    if ends is None and _is_qwen3_embedding(header):
        last, ends = tokens.special.get(_QWEN3_END), True
    around = [[] if id_ is None else [(tokens.texts[id_], id_)] for id_ in (first, last)]
    if not ends:
        around[1] = []
    before, behind = ([text for text, _ in each] for each in around)
    tokenizer = vocabulary.first
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, "$B", *behind],
        special_tokens=[*around[0], *around[1]],
    )
    return tokenizer, {id_: text for text, id_ in tokens.special.items()}


def _wordpiece(header: GgufHeader) -> Tokenizer:
    """BERT's. Raises CheckpointError for another kind of vocabulary."""
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
