"""SentencePiece vocabularies in files of their own: T5's `spiece.model`, Marian's `source.spm`.

Reads their protobuf (`ModelProto` of sentencepiece_model.proto) and writes what tokenizer.json
would have: a Unigram model, the normalizer with its table of characters, and the special tokens.
Torch-free.
"""

from __future__ import annotations

import json
import math
import struct
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from model.checkpoint import CheckpointError
from model.checkpoint.json_file import read_json
from model.checkpoint.token_bytes import BLANK
from model.checkpoint.vocabulary import MAX_VOCABULARY, Kind

SINGLE = "spiece.model"
SOURCE, TARGET, SHARED = "source.spm", "target.spm", "vocab.json"
MISSING = (
    "tokenizer.json is missing; T5 and Marian are also read from spiece.model or source.spm, and"
    " for other vocabularies transformers writes it:"
    " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)
_MAX_BYTES = 64 * 1024**2  # mT5's has 4 megabytes
_UNIGRAM = 1  # TrainerSpec.ModelType
_EXTRA_IDS = 100  # T5's sentinels, which its files do not list

_NO_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


@dataclass(frozen=True, slots=True)
class Splitting:
    """How text becomes tokens: what tokenizer.json has, and tokens that no text becomes."""

    body: dict[str, Any]
    unread: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A vocabulary as tokenizer.json and tokenizer_config.json have it."""

    text: Splitting
    target: Splitting | None = None  # of the decoder's texts, if they are split in another way
    names: Mapping[str, str] = field(default_factory=dict)  # eos_token, ...: text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """A file's pieces, and how it prepares text."""

    texts: list[str]
    scores: list[float]
    kinds: list[Kind]
    names: dict[str, str]
    unknown: int
    byte_fallback: bool
    characters: dict[str, str] | None  # which become which: a step of the normalizer
    prefix: bool  # a blank before the text
    squeezes: bool  # runs of blanks, and blanks at the ends

    def of_kind(self, *kinds: Kind) -> frozenset[str]:
        """The texts of the pieces of some kinds."""
        return frozenset(
            text for text, kind in zip(self.texts, self.kinds, strict=True) if kind in kinds
        )


def describe(folder: Path) -> Described:
    """The vocabulary of a folder without tokenizer.json. Raises CheckpointError."""
    if (folder / SINGLE).exists():
        return _describe_single(folder)
    if (folder / SOURCE).exists():
        return _describe_marian(folder)
    raise CheckpointError(MISSING)


def _describe_single(folder: Path) -> Described:
    model = _read(folder / SINGLE)
    config = _optional(folder / "config.json")
    size, rows = len(model.texts), config.get("vocab_size")
    room = max(0, rows - size) if type(rows) is int else 0
    has_sentinels = config.get("model_type") == "t5"  # mT5's file lists its own
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(_EXTRA_IDS))] if has_sentinels else []
    special = model.of_kind(Kind.CONTROL, Kind.UNKNOWN)
    literal = model.of_kind(Kind.USER_DEFINED)
    added = [
        _added(id_, text, special=text in special)
        for id_, text in enumerate(model.texts)
        if text in special or text in literal
    ]
    added += [_added(id_, text, special=True) for id_, text in enumerate(sentinels[:room], size)]
    tokens = list(zip(model.texts, model.scores, strict=True))
    body = _body(tokens, model, unknown=model.unknown) | {"added_tokens": added}
    return Described(text=Splitting(body, model.of_kind(Kind.UNUSED)), names=model.names)


def _describe_marian(folder: Path) -> Described:
    """A file per language splits its texts; the ids of the pieces of both are in a third file."""
    ids = read_json(folder / SHARED)
    texts = _by_id(ids)
    if "<unk>" not in ids:
        raise CheckpointError(f"{SHARED}: no token <unk>")
    special = {"<unk>", "</s>", "<pad>", "<s>"}
    added = [
        _added(id_, text, special=text in special)
        for id_, text in enumerate(texts)
        if text in special or (text.startswith(">>") and text.endswith("<<"))  # languages
    ]
    parts = []
    for name in (SOURCE, TARGET):
        model = _read(folder / name)
        scores = dict(zip(model.texts, model.scores, strict=True))
        tokens = [(text, scores.get(text, 0.0)) for text in texts]
        body = _body(tokens, model, unknown=ids["<unk>"]) | {"added_tokens": added}
        known = model.of_kind(Kind.NORMAL, Kind.USER_DEFINED, Kind.BYTE)
        parts.append(Splitting(body, frozenset(texts) - known))
    return Described(text=parts[0], target=parts[1], names={"eos_token": "</s>"})


def _by_id(ids: Mapping[str, Any]) -> list[str]:
    """The texts in the order of their ids. Raises CheckpointError unless these are 0, 1, ..."""
    texts = sorted(ids, key=lambda text: ids[text] if type(ids[text]) is int else -1)
    if [ids[text] for text in texts] != list(range(len(texts))):
        raise CheckpointError(f"{SHARED}: the ids must be 0, 1, ...")
    return texts


def _body(tokens: Sequence[tuple[str, float]], model: _Model, *, unknown: int) -> dict[str, Any]:
    """tokenizer.json of a Unigram model, without added tokens."""
    tokenizer = Tokenizer(models.Unigram(list(tokens), unknown, model.byte_fallback))
    steps: list[normalizers.Normalizer] = []
    if model.squeezes:
        # Runs first: a pattern for the blanks at the end tries each blank of every run.
        steps += [
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex(r"\A | \z"), ""),
        ]
    if model.prefix:
        steps.append(normalizers.Prepend(BLANK))
    steps.append(normalizers.Replace(" ", BLANK))
    tokenizer.normalizer = normalizers.Sequence(steps)
    by_words = not any(BLANK in text[1:] for text, _ in tokens)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=by_words)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never", split=by_words)
    body: dict[str, Any] = json.loads(tokenizer.to_str())
    if model.characters is not None:
        body["normalizer"]["normalizers"].insert(0, model.characters)
    return body


def _added(id_: int, text: str, *, special: bool) -> dict[str, Any]:
    return {"id": id_, "content": text, **_NO_FLAGS, "special": special}


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


# --- the protobuf


def _read(path: Path) -> _Model:
    """Raises CheckpointError for a file that is no Unigram model of SentencePiece."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror or 'cannot be read'}") from None
    if len(data) > _MAX_BYTES:
        raise CheckpointError(f"{path.name}: larger than {_MAX_BYTES} bytes")
    try:
        return _parse(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from None
    except (ValueError, TypeError, LookupError, struct.error):
        raise CheckpointError(f"{path.name}: not a model of SentencePiece") from None


def _parse(data: bytes) -> _Model:
    texts: list[str] = []
    scores: list[float] = []
    kinds: list[Kind] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = {1: b"", 2: bytes(4), 3: Kind.NORMAL, **dict(_fields(value))}
            texts.append(piece[1].decode())
            scores.append(struct.unpack("<f", piece[2])[0])
            kinds.append(Kind(piece[3]))
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(_fields(value))
    _check(texts, scores, trainer, normalizer)
    unknown = [id_ for id_, kind in enumerate(kinds) if kind is Kind.UNKNOWN]
    if len(unknown) != 1:
        raise CheckpointError("one piece must be the unknown one")
    names = {"bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}
    stated = {name: _signed(trainer.get(number, id_)) for name, (number, id_) in names.items()}
    return _Model(
        texts=texts,
        scores=scores,
        kinds=kinds,
        names={name: texts[id_] for name, id_ in stated.items() if 0 <= id_ < len(texts)},
        unknown=unknown[0],
        byte_fallback=bool(trainer.get(35, 0)),
        characters=_characters(normalizer.get(2, b"")),
        prefix=bool(normalizer.get(3, 1)),
        squeezes=bool(normalizer.get(4, 1)),
    )


def _check(
    texts: list[str], scores: list[float], trainer: Mapping[int, Any], normalizer: Mapping[int, Any]
) -> None:
    """Raises CheckpointError for what is not read."""
    if trainer.get(3, _UNIGRAM) != _UNIGRAM:
        raise CheckpointError(
            "only Unigram models of SentencePiece are read; transformers writes tokenizer.json:"
            " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    if trainer.get(24, 0) or not normalizer.get(5, 1):
        raise CheckpointError("blanks behind words, or as they are, are not supported")
    if not 0 < len(texts) <= MAX_VOCABULARY:
        raise CheckpointError(f"a vocabulary has between 1 and {MAX_VOCABULARY} tokens")
    if len(set(texts)) != len(texts) or not all(texts):
        raise CheckpointError("each piece must have a text of its own")
    if not all(map(math.isfinite, scores)):
        raise CheckpointError("the scores of pieces must be finite")


def _characters(table: bytes) -> dict[str, str] | None:
    """A step of tokenizer.json's normalizer. Raises CheckpointError for what ends the library's
    process: the size of a trie, the trie, and UTF-8.
    """
    if not table:
        return None
    if len(table) < 4 or (size := struct.unpack("<I", table[:4])[0]) > len(table) - 4 or size % 4:
        raise CheckpointError("the normalizer's table is cut off")
    table[4 + size :].decode()
    return {"type": "Precompiled", "precompiled_charsmap": b64encode(table).decode()}


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message: a varint as a number, others as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[key & 7]
        if size > len(data) - at:
            raise ValueError("cut off")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits per byte, the lowest first; and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _signed(value: int) -> int:
    """A varint that may be negative, in two's complement of 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
