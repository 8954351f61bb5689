"""The vocabulary of a GGUF file: byte-level BPE, or SentencePiece. Torch-free.

llama.cpp's converter wrote these files, so a token's text, type, score and id are taken as
llama.cpp takes them. One difference: a user's text never spells a special token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from model.checkpoint import CheckpointError
from model.checkpoint.gguf_header import GgufHeader
from model.checkpoint.token_bytes import (
    BLANK,
    Decode,
    byte_level,
    byte_of,
    byte_table,
    sentencepiece,
)
from model.checkpoint.vocabulary import END_OF_TURN, MAX_VOCABULARY, Kind, Special, Vocabulary

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Mistral's own pattern. llama.cpp separates upper from lower case in ASCII only.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "tekken": (_TEKKEN,),
}
_WHOLE_WORDS = frozenset(
    {"llama-bpe", "llama3", "llama-v3", "tekken"}
)  # known words need no merges
_MAX_PIECE = 256  # characters of a SentencePiece token; its trainer's default limit is 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The tokens of a file by type: text -> id, the file's own."""

    texts: list[str]
    plain: dict[str, int]
    literal: dict[str, int]
    byte: dict[str, int]
    special: dict[str, int]


def from_gguf(header: GgufHeader) -> Vocabulary:
    """Reads the vocabulary of a GGUF file. Raises CheckpointError."""
    kind = header.text("tokenizer.ggml.model")
    tokens = read_tokens(header)
    if kind == "llama":
        return _sentencepiece_vocabulary(header, tokens)
    if kind == "gpt2":
        return _byte_level_vocabulary(header, tokens)
    raise CheckpointError(
        f"{header.file_name}: the vocabulary type {kind!r:.80} is not supported;"
        " llama (SentencePiece) and gpt2 (byte-level BPE) are"
    )


def _byte_level_vocabulary(header: GgufHeader, tokens: Tokens) -> Vocabulary:
    pre = header.text("tokenizer.ggml.pre") or ""
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{header.file_name}: the pre-tokenizer {pre!r:.80} is not supported;"
            f" known are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    size = _size(header, tokens)
    splitter = _byte_level_splitter(header, pre, tokens, size=size)
    bytes_ = _token_bytes(tokens, size=size, decode=byte_level)
    return _vocabulary(header, tokens, splitter, bytes_, add_bos=pre in _WHOLE_WORDS)


def _sentencepiece_vocabulary(header: GgufHeader, tokens: Tokens) -> Vocabulary:
    size = _size(header, tokens)
    splitter = _sentencepiece_splitter(header, tokens, size=size)
    bytes_ = _token_bytes(tokens, size=size, decode=sentencepiece)
    return _vocabulary(header, tokens, splitter, bytes_, add_bos=True, bos_id=1, eos_id=2)


def _vocabulary(
    header: GgufHeader,
    tokens: Tokens,
    splitter: Tokenizer,
    bytes_: tuple[bytes, ...],
    *,
    add_bos: bool,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> Vocabulary:
    """What both kinds share. The defaults hold for files that do not name these tokens."""
    named = {
        "bos_token": token_id(header, "bos", tokens, default=bos_id),
        "eos_token": token_id(header, "eos", tokens, default=eos_id),
    }
    ends = {named["eos_token"], *(token_id(header, name, tokens) for name in ("eot", "eom"))}
    ends |= {tokens.special[text] for text in END_OF_TURN & tokens.special.keys()}
    rows = _embedding_rows(header) or len(bytes_)
    stated = header.flag("tokenizer.ggml.add_bos_token")
    return Vocabulary(
        first=splitter,
        rest=splitter,
        size=len(bytes_),
        token_bytes=bytes_,
        specials={text: Special(id=id_) for text, id_ in tokens.special.items()},
        add_bos=add_bos if stated is None else stated,
        bos_id=named["bos_token"],
        eos_ids=frozenset(id_ for id_ in ends if id_ is not None and id_ < rows),
        chat_template=header.text("tokenizer.chat_template"),
        names={name: tokens.texts[id_] for name, id_ in named.items() if id_ is not None},
    )


def read_tokens(header: GgufHeader) -> Tokens:
    """The tokens of a vocabulary of any kind. Raises CheckpointError."""
    texts = header.strings("tokenizer.ggml.tokens")
    if not texts:
        raise CheckpointError(f"{header.file_name}: it has no vocabulary")
    kinds = header.integers("tokenizer.ggml.token_type") or [int(Kind.NORMAL)] * len(texts)
    if len(kinds) != len(texts):
        raise CheckpointError(f"{header.file_name}: as many token types as tokens are needed")
    if not all(0 <= kind <= max(Kind) for kind in set(kinds)):
        raise CheckpointError(f"{header.file_name}: token types must be from 0 to {max(Kind)}")
    tokens = Tokens(texts=texts, plain={}, literal={}, byte={}, special={})
    of_kind = {
        Kind.NORMAL: tokens.plain,
        Kind.USER_DEFINED: tokens.literal,
        Kind.BYTE: tokens.byte,
    }
    seen: set[str] = set()
    for id_, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        if not text or kind == Kind.UNUSED:
            continue
        if kind == Kind.BYTE and byte_of(text) is None:
            raise CheckpointError(f"{header.file_name}: byte tokens must be <0x00> to <0xFF>")
        if text in seen:
            raise CheckpointError(f"{header.file_name}: two tokens have the text {text!r:.80}")
        seen.add(text)
        ends_turn = kind == Kind.USER_DEFINED and text in END_OF_TURN
        of_kind.get(Kind.CONTROL if ends_turn else Kind(kind), tokens.special)[text] = id_
    return tokens


def _token_bytes(tokens: Tokens, *, size: int, decode: Decode) -> tuple[bytes, ...]:
    table = list(byte_table(tokens.plain, tokens.literal, size=size, decode=decode))
    for text, id_ in tokens.byte.items():
        table[id_] = sentencepiece(text)
    return tuple(table)


def _embedding_rows(header: GgufHeader) -> int:
    """Ids that the network has; 0 if the file has a vocabulary only."""
    embedding = header.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding else 0


def _size(header: GgufHeader, tokens: Tokens) -> int:
    """Ids in all: the network may have more than the vocabulary."""
    size = max(len(tokens.texts), _embedding_rows(header))
    if size > MAX_VOCABULARY:
        raise CheckpointError(
            f"{header.file_name}: a vocabulary has at most {MAX_VOCABULARY} tokens"
        )
    return size


def token_id(
    header: GgufHeader, name: str, tokens: Tokens, default: int | None = None
) -> int | None:
    """The id of a named token, for example bos; None if the file has none."""
    value = header.integer(f"tokenizer.ggml.{name}_token_id")
    if value is None:
        return default if default is not None and default < len(tokens.texts) else None
    if not 0 <= value < len(tokens.texts):
        raise CheckpointError(f"{header.file_name}: {name}_token_id is outside the vocabulary")
    return value


# --- byte-level BPE


def _byte_level_splitter(header: GgufHeader, pre: str, tokens: Tokens, *, size: int) -> Tokenizer:
    """Byte-level BPE over the ordinary tokens alone, so that no text can spell a special one."""
    mergeable = tokens.plain.keys() | tokens.literal.keys()
    merges = []
    for line in header.strings("tokenizer.ggml.merges"):
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 1 or not {left, right, left + right} <= mergeable:
            raise CheckpointError(f"{header.file_name}: a merge is not of two tokens into a third")
        merges.append((left, right))
    # Bytes that the vocabulary lacks become this one, which keeps their neighbours from merging.
    # Byte-level text contains no blank, so nothing else becomes it.
    absent = " absent byte"
    model = models.BPE(
        vocab={**tokens.plain, **tokens.literal, absent: size},
        merges=merges,
        unk_token=absent,
        ignore_merges=pre in _WHOLE_WORDS,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in PRE_TOKENIZERS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _with_literals(tokenizer, tokens)


def _with_literals(tokenizer: Tokenizer, tokens: Tokens) -> Tokenizer:
    """Finds user-defined tokens in the text first. They are in the model, and so keep their ids."""
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in tokens.literal])
    return tokenizer


# --- SentencePiece


def _sentencepiece_splitter(header: GgufHeader, tokens: Tokens, *, size: int) -> Tokenizer:
    """SentencePiece as BPE with byte fallback: the best score is merged first, then the leftmost.

    Without byte tokens, an unknown character becomes the unknown token, or nothing.
    """
    merges = _merges(_scores(header, tokens), file_name=header.file_name)
    by_byte = {f"<0x{byte_of(text) or 0:02X}>": id_ for text, id_ in tokens.byte.items()}
    unknown = token_id(header, "unknown", tokens, default=0)
    absent = " absent character"  # contains a blank, as no text does after the normalizer
    model = models.BPE(
        vocab={
            **tokens.plain,
            **tokens.literal,
            **by_byte,
            absent: size if unknown is None else unknown,
        },
        merges=merges,
        unk_token=absent,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = header.flag("tokenizer.ggml.add_space_prefix")
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", BLANK)]
    if prefix is not False:
        steps.insert(0, normalizers.Prepend(BLANK))
    tokenizer.normalizer = normalizers.Sequence(steps)
    return _with_literals(tokenizer, tokens)


def _scores(header: GgufHeader, tokens: Tokens) -> dict[str, float]:
    """The score of each ordinary token. Raises CheckpointError for what cannot be ordered."""
    scores = header.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens.texts):
        raise CheckpointError(f"{header.file_name}: as many scores as tokens are needed")
    found = {text: scores[id_] for text, id_ in tokens.plain.items()}
    if not all(map(math.isfinite, found.values())):
        raise CheckpointError(f"{header.file_name}: the scores of tokens must be finite")
    return found


def _merges(scores: Mapping[str, float], *, file_name: str) -> list[tuple[str, str]]:
    """Every pair of tokens whose joined text is a token: those with the best score first."""
    if max(map(len, scores), default=0) > _MAX_PIECE:
        raise CheckpointError(
            f"{file_name}: a SentencePiece token has at most {_MAX_PIECE} characters"
        )
    return [
        (text[:cut], text[cut:])
        for text in sorted(scores, key=lambda text: -scores[text])
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
