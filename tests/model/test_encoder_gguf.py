"""Encoders in GGUF files: equal to the same model in a folder, tokens and bits; refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.batch import Floats
from model.checkpoint import CheckpointError
from model.checkpoint.fetch import ALL_MINILM_L6_V2, default_cache, resolve
from model.config import Pooling
from model.runners.encoding import Encoding, is_encoder, load_encoder
from model.text.encoder_tokenizer import EncoderTokenizer
from tests.model.test_encoders import (
    VOCABULARY,
    inputs,
    reference,
    write_modules,
    write_tokenizer,
    write_wordpiece,
)
from tests.support.gguf_encoders import write_encoder

pytestmark = pytest.mark.slow

KINDS = ("bert", "nomic")
LANGUAGES = Path(__file__).parents[1] / "data" / "languages.json"
ODD = (
    "", " ", "[SEP]", "[CLS] [PAD] [unused7]", "a\u0301b\u0308", "\u2581", "\u2581a ##a", "##",
    "x" * 100, "x" * 101, "\U0001f600 ok", "tab\there\nline", "\u4f60\u597d, \u4e16\u754c!",
    "\u0000\ufffd\u00ad", "don't-stop...", "\u1e9e\u0130", "Ab CAB aBc", "caf\u00e9 CAF\u00c9",
)  # fmt: skip


def write_folder(kind: str, path: Path) -> Path:
    """A random model whose embeddings are mean-pooled and normalised; its rows are of 64."""
    path.mkdir(exist_ok=True)
    reference(kind, hidden_size=64, num_attention_heads=4).save_pretrained(path)
    write_tokenizer(path)
    write_modules(path, {"pooling_mode_mean_tokens": True}, kinds=("Normalize",))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_folder(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def vectors(path: Path, batch: list[Encoding], runner: str = "native") -> list[Floats]:
    encoder, _ = load_encoder(path, runner=runner, dtype="float32", threads=1)
    found = encoder.encode(batch)
    encoder.close()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("runner", ["native", "torch"])
def test_bits_are_those_of_the_folder(
    folders: dict[str, Path], tmp_path: Path, kind: str, runner: str
) -> None:
    path = write_encoder(folders[kind], tmp_path / "model.gguf")
    assert is_encoder(path)
    assert is_encoder(tmp_path), "a folder with one GGUF file is that file"
    batch = inputs(types=True)
    expected = vectors(folders[kind], batch, runner)
    found = vectors(path, batch, runner)
    assert [each.tobytes() for each in found] == [each.tobytes() for each in expected]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", ["F16", "Q8_0"])
def test_vectors_of_shorter_types_are_near(
    folders: dict[str, Path], tmp_path: Path, kind: str, storage: str
) -> None:
    path = write_encoder(folders[kind], tmp_path / "model.gguf", storage=storage)
    batch = inputs()
    for ours, exact in zip(vectors(path, batch), vectors(folders[kind], batch), strict=True):
        assert float(ours @ exact) > (0.9999 if storage == "F16" else 0.99)
        assert ours.tobytes() != exact.tobytes()


@pytest.mark.parametrize(
    ("number", "pooling"),
    [(None, Pooling.MEAN), (0, Pooling.MEAN), (1, Pooling.MEAN), (2, Pooling.CLS),
     (3, Pooling.LAST)],
)  # fmt: skip
def test_the_file_states_its_pooling(
    folders: dict[str, Path], tmp_path: Path, number: int | None, pooling: Pooling
) -> None:
    """Whatever the files of sentence-transformers beside it contain."""
    write_modules(tmp_path, {"pooling_mode_max_tokens": True})
    path = write_encoder(folders["bert"], tmp_path / "model.gguf", pooling=number)
    runner, _ = load_encoder(path, dtype="float32", threads=1)
    assert (runner.info.pooling, runner.info.normalised) == (pooling, True)
    assert runner.info.max_tokens == 96


def test_tokens_are_those_of_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    path = write_encoder(folders["bert"], tmp_path / "model.gguf")
    ours = EncoderTokenizer.from_path(path, max_tokens=96)
    theirs = EncoderTokenizer.from_path(folders["bert"], max_tokens=96)
    assert same_tokens(ours, theirs, random_texts(2000, "abcdefghAB [].,\u00e1\u4e00#\n")) > 5
    assert [ours.token_text(id_) for id_ in (2, 4, 13)] == ["[CLS]", "a", "##b"]


@pytest.mark.parametrize("lowercase", [True, False])
def test_capitals_in_the_vocabulary_are_read(
    folders: dict[str, Path], tmp_path: Path, *, lowercase: bool
) -> None:
    """A vocabulary with capitals is that of a model which reads them, with accents."""
    cased = [] if lowercase else ["A", "##B", "\u00e1", "##\u00e9"]
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folders["bert"] / name)
    write_wordpiece(tmp_path, [*VOCABULARY, *cased], lowercase=lowercase)
    path = write_encoder(tmp_path, tmp_path / "model.gguf")
    theirs = EncoderTokenizer.from_path(tmp_path, max_tokens=96)
    (tmp_path / "model.safetensors").unlink()
    ours = EncoderTokenizer.from_path(path, max_tokens=96)
    same_tokens(ours, theirs, random_texts(500, "abAB\u00e1\u00e9 "))


def random_texts(count: int, alphabet: str) -> list[str]:
    draw = random.Random(f"texts of {alphabet}")
    return ["".join(draw.choices(alphabet, k=draw.randint(0, 40))) for _ in range(count)]


def same_tokens(ours: EncoderTokenizer, theirs: EncoderTokenizer, texts: list[str]) -> int:
    """Fails if tokens or types differ, of a text or a pair; returns how many ids were met."""
    met = set()
    for text in (*texts, *ODD):
        expected = theirs.encode(text)
        assert ours.encode(text) == expected, text
        assert ours.encode_pair(text, texts[0]) == theirs.encode_pair(text, texts[0]), text
        met |= {*expected.ids}
    return len(met)


T5 = {"tokenizer.ggml.model": "t5"}
WRONG: list[tuple[dict[str, Any], str]] = [
    (T5, r"the vocabulary type 't5' is not supported for encoders; bert \(WordPiece\) is"),
    ({"bert.pooling_type": 4}, "pooling_type 4 is not supported; 0 to 3 are. Classifiers"),
    ({"bert.attention.causal": True}, "attention.causal is not supported"),
    ({"bert.embedding_length": None}, "hidden_size must be a whole number"),
    ({"bert.rope.dimension_count": 8}, "partial rotary positions"),
    ({"tokenizer.ggml.cls_token_id": 9999}, "cls_token_id is outside the vocabulary"),
    ({"tokenizer.ggml.token_type": [1, 3]}, "as many token types as tokens"),
    ({"tokenizer.ggml.tokens": ["a"] * 20}, "two tokens have the text 'a'"),
    ({"tokenizer.ggml.tokens": [f"{n}" for n in range(20)]}, "no token of the vocabulary begins"),
]


@pytest.mark.parametrize(("entries", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_files_are_refused(
    folders: dict[str, Path], tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    path = write_encoder(folders["bert"], tmp_path / "model.gguf", extra=entries)
    with pytest.raises(CheckpointError, match=message):
        load_encoder(path)


def test_special_tokens_are_found_by_their_text(folders: dict[str, Path], tmp_path: Path) -> None:
    """Files may not state their ids; without the text, too, they are missing."""
    silent: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": None for name in ("cls", "seperator", "unknown")
    }
    path = write_encoder(folders["bert"], tmp_path / "model.gguf", extra=silent)
    assert EncoderTokenizer.from_path(path, max_tokens=9).encode("a x").ids == (2, 4, 1, 3)
    plain = {**silent, "tokenizer.ggml.token_type": [1] * len(VOCABULARY)}
    path = write_encoder(folders["bert"], tmp_path / "plain.gguf", extra=plain)
    with pytest.raises(CheckpointError, match="cls_token_id is missing"):
        EncoderTokenizer.from_path(path, max_tokens=9)


def test_minilm_in_a_gguf_file(tmp_path: Path) -> None:
    """The real weights and vocabulary: the same tokens in 20 languages, the same bits."""
    folder = resolve(ALL_MINILM_L6_V2.alias, cache=default_cache())
    path = write_encoder(folder, tmp_path / "model.gguf")
    texts = list(json.loads(LANGUAGES.read_text(encoding="utf-8")).values())
    expected, theirs = load_encoder(folder, dtype="float32", threads=2)
    found, ours = load_encoder(path, dtype="float32", threads=2)
    assert same_tokens(ours, theirs, texts) > 300
    batch = theirs.encode_batch(texts)
    assert np.array_equal(found.encode(batch), expected.encode(batch))
