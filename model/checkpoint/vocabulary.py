"""Vocabularies: what tokenizer.json and GGUF files say of a model's tokens, in one form.

Byte-level BPE from either, SentencePiece-like BPE from tokenizer.json. Torch-free: a process that
only handles text reads nothing but these. How text becomes tokens is `model.tokenizer`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from model.checkpoint import CheckpointError, find_gguf
from model.checkpoint.gguf_header import GgufHeader, read_header
from model.checkpoint.json_file import read_json

MAX_VOCABULARY = 2**20

Decode = Callable[[str], bytes]


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
    size: int
    token_bytes: tuple[bytes, ...]  # b"" for special tokens and for ids without a token
    specials: Mapping[str, Special]
    add_bos: bool
    bos_id: int | None
    eos_ids: frozenset[int]
    chat_template: str | None
    names: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token, ...: text


def read_vocabulary(path: Path) -> Vocabulary:
    """Reads a GGUF file's vocabulary, or that of a folder with tokenizer.json."""
    gguf = find_gguf(path)
    if gguf is not None:
        return _from_gguf(read_header(gguf))
    return _from_folder(path if path.is_dir() else path.parent)


# --- tokenizer.json


_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def _from_folder(folder: Path) -> Vocabulary:
    body = read_json(folder / "tokenizer.json")
    settings = _optional_json(folder / "tokenizer_config.json")
    generation = _optional_json(folder / "generation_config.json")
    model = _optional_json(folder / "config.json")
    first = _built(body)
    known = first.get_vocab(with_added_tokens=True)
    size = max(_id_or_zero(model.get("vocab_size")), max(known.values(), default=-1) + 1)
    if not 0 < size <= MAX_VOCABULARY:
        raise CheckpointError(f"a vocabulary has between 1 and {MAX_VOCABULARY} tokens")
    added = first.get_added_tokens_decoder()
    specials = {
        token.content: Special(id=id_, lstrip=token.lstrip, rstrip=token.rstrip)
        for id_, token in added.items()
        if token.special and token.content
    }
    names = _names(settings)
    bos_id = known.get(names.get("bos_token", ""))
    eos_ids = {known[names["eos_token"]]} if names.get("eos_token") in known else set()
    for source in (generation, model):
        eos_ids |= _ids(source.get("eos_token_id"), size)
    plain = {token: id_ for token, id_ in known.items() if id_ not in added}
    literal = {id_: token.content for id_, token in added.items() if not token.special}
    return Vocabulary(
        first=first,
        rest=_built(_without_leading_blank(body)),
        size=size,
        token_bytes=_byte_table(plain, literal, size=size, decode=_decoding(body)),
        specials=specials,
        add_bos=_adds_bos(first, settings, bos_id),
        bos_id=bos_id,
        eos_ids=frozenset(eos_ids),
        chat_template=_template(folder, settings),
        names=names,
    )


def _built(body: Mapping[str, Any]) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(json.dumps(body))
    except Exception as error:  # noqa: BLE001  (the library raises plain Exception for bad input)
        raise CheckpointError(f"tokenizer.json: {str(error)[:200]}") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _without_leading_blank(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer for text that is not a prompt's first: no blank is put before it."""
    copy: dict[str, Any] = json.loads(json.dumps(body))
    splitter = copy.get("pre_tokenizer") or {}
    for step in (splitter, *splitter.get("pretokenizers", ())):
        if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
    return copy


def _adds_bos(tokenizer: Tokenizer, settings: Mapping[str, Any], bos_id: int | None) -> bool:
    stated = settings.get("add_bos_token")
    if isinstance(stated, bool):
        return stated
    return bos_id is not None and tokenizer.encode("").ids[:1] == [bos_id]


def _names(settings: Mapping[str, Any]) -> dict[str, str]:
    names = {}
    for name in _NAMED:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            names[name] = text
    return names


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        template = settings.get("chat_template")
    except (OSError, UnicodeDecodeError):
        raise CheckpointError("chat_template.jinja: cannot be read") from None
    if isinstance(template, list):  # several, by name
        named = [item for item in template if isinstance(item, dict)]
        template = next((i.get("template") for i in named if i.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _decoding(body: Mapping[str, Any]) -> Decode:
    """How a token's text becomes bytes: by GPT-2's alphabet, or SentencePiece's conventions."""
    steps = json.dumps([body.get("decoder"), body.get("pre_tokenizer")])
    if '"ByteLevel"' in steps:
        return _byte_level
    if '"Metaspace"' in steps or '"ByteFallback"' in steps:
        return _sentencepiece
    raise CheckpointError("tokenizer.json: neither byte-level nor SentencePiece-like")


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _ids(value: object, size: int) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {id_ for id_ in values if type(id_) is int and 0 <= id_ < size}


def _id_or_zero(value: object) -> int:
    return value if type(value) is int else 0


# --- GGUF


_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_SPLITS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
}
_WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3"})  # a known word needs no merges
_NORMAL, _USER_DEFINED = 1, 4

# Tokens that end an answer in any model that has them, whatever its metadata says.
_ENDS = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"}
)


def _from_gguf(header: GgufHeader) -> Vocabulary:
    tokens, kinds = _gguf_tokens(header)
    pre = header.text("tokenizer.ggml.pre") or ""
    if header.text("tokenizer.ggml.model") != "gpt2" or pre not in _SPLITS:
        raise CheckpointError(
            f"{header.file_name}: its kind of vocabulary is not supported in GGUF;"
            f" known are byte-level ones split as {', '.join(sorted(_SPLITS))}"
        )
    size = len(tokens)
    plain = {text: id_ for id_, text in enumerate(tokens) if kinds[id_] == _NORMAL}
    literal = {id_: text for id_, text in enumerate(tokens) if kinds[id_] == _USER_DEFINED}
    specials = {
        text: Special(id=id_)
        for id_, text in enumerate(tokens)
        if kinds[id_] not in (_NORMAL, _USER_DEFINED) and text
    }
    splitter = _gguf_splitter(header, pre, plain=plain, literal=literal, size=size)
    bos_id, eos_id = (_gguf_id(header, name, size) for name in ("bos", "eos"))
    ends = {_gguf_id(header, name, size) for name in ("eos", "eot", "eom")}
    ends |= {specials[text].id for text in _ENDS & specials.keys()}
    named = {"bos_token": bos_id, "eos_token": eos_id}
    add_bos = header.flag("tokenizer.ggml.add_bos_token")
    return Vocabulary(
        first=splitter,
        rest=splitter,
        size=size,
        token_bytes=_byte_table(plain, literal, size=size, decode=_byte_level),
        specials=specials,
        add_bos=pre in _WHOLE_WORDS if add_bos is None else add_bos,
        bos_id=bos_id,
        eos_ids=frozenset(id_ for id_ in ends if id_ is not None),
        chat_template=header.text("tokenizer.chat_template"),
        names={name: tokens[id_] for name, id_ in named.items() if id_ is not None},
    )


def _gguf_tokens(header: GgufHeader) -> tuple[list[str], list[int]]:
    tokens = header.strings("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(f"{header.file_name}: it has no vocabulary")
    kinds = header.integers("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise CheckpointError(f"{header.file_name}: as many token types as tokens are needed")
    return tokens, kinds


def _gguf_id(header: GgufHeader, name: str, size: int) -> int | None:
    value = header.integer(f"tokenizer.ggml.{name}_token_id")
    if value is not None and not 0 <= value < size:
        raise CheckpointError(f"{header.file_name}: {name}_token_id is outside the vocabulary")
    return value


def _gguf_splitter(
    header: GgufHeader,
    pre: str,
    *,
    plain: Mapping[str, int],
    literal: Mapping[int, str],
    size: int,
) -> Tokenizer:
    """Byte-level BPE over the ordinary tokens alone, so that no text can spell a special one."""
    merges = []
    for line in header.strings("tokenizer.ggml.merges"):
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 1 or left not in plain or right not in plain or left + right not in plain:
            raise CheckpointError(f"{header.file_name}: a merge is not of two tokens into a third")
        merges.append((left, right))
    # Bytes that the vocabulary lacks become this one, which keeps their neighbours from merging.
    # Byte-level text contains no blank, so nothing else becomes it.
    absent = " absent byte"
    model = models.BPE(
        vocab={**plain, absent: size},
        merges=merges,
        unk_token=absent,
        ignore_merges=pre in _WHOLE_WORDS,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in _SPLITS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(text, normalized=False) for text in literal.values() if text]
    tokenizer.add_tokens(added)
    return tokenizer


# --- tokens as bytes


def _alphabet() -> dict[str, int]:
    """GPT-2's alphabet: a visible character for each byte.

    Visible Latin-1 characters stand for themselves, the others for those from U+0100 on, in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + index): byte for index, byte in enumerate(hidden)
    }


_BYTE_OF = _alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode("utf-8", "replace")


def _sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    if byte:
        return bytes([int(byte[1], 16)])
    return token.replace("\u2581", " ").encode("utf-8", "replace")


def _byte_table(
    plain: Mapping[str, int], literal: Mapping[int, str], *, size: int, decode: Decode
) -> tuple[bytes, ...]:
    table = [b""] * size
    for token, id_ in plain.items():
        table[id_] = decode(token)
    for id_, text in literal.items():
        table[id_] = text.encode()
    return tuple(table)
