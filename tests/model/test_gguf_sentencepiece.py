"""SentencePiece vocabularies in GGUF: equal to SentencePiece, llama.cpp and transformers."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece

from model.text.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.model.tokenizer_oracles import LlamaCpp, odd_texts, spelled
from tests.model.vocabulary_files import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    add_vocabulary,
    vocabulary_file,
)
from tests.support.tiny_model import CORPUS, TinyModel


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A SentencePiece model, and its vocabulary as llama.cpp's converter takes it out."""

    reference: Any
    prefix: bool
    tokens: list[tuple[str, int]]
    scores: list[float]

    proto: bytes

    def settings(self) -> dict[str, Any]:
        """Metadata, as for `vocabulary_file`."""
        return {"kind": "llama", "scores": self.scores, "add_space_prefix": self.prefix}


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def trained(request: pytest.FixtureRequest) -> Trained:
    """Trained as Llama 2's is: bytes for rare characters, text taken as it is."""
    stored = io.BytesIO()
    lines = (ROOT / "tests/data/perplexity.txt").read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *"".join(CORPUS).splitlines()]),
        model_writer=stored,
        model_type="bpe",
        vocab_size=2000,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        control_symbols=["[INST]"],
        user_defined_symbols=["<think>", "</think>"],
        num_threads=1,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_proto=stored.getvalue())
    tokens = [(reference.IdToPiece(id_), NORMAL) for id_ in range(reference.vocab_size())]
    for id_, (text, _) in enumerate(tokens):
        if reference.IsUnknown(id_):
            tokens[id_] = (text, UNKNOWN)
        elif reference.IsControl(id_):
            tokens[id_] = (text, CONTROL)
        elif reference.IsByte(id_):
            tokens[id_] = (text, BYTE)
        elif text in ("<think>", "</think>"):
            tokens[id_] = (text, USER_DEFINED)
    scores = [reference.GetScore(id_) for id_ in range(len(tokens))]
    return Trained(
        proto=stored.getvalue(),
        reference=reference,
        prefix=request.param,
        tokens=tokens,
        scores=scores,
    )


def test_equals_sentencepiece(trained: Trained, tmp_path: Path) -> None:
    path = vocabulary_file(tmp_path / "x.gguf", trained.tokens, **trained.settings())
    tokenizer = Tokenizer.from_checkpoint(path)
    # llama.cpp puts a space behind an added token as well, which SentencePiece does not.
    added = ["[INST]", "<s>"] if trained.prefix else ["[INST]", "<think>", "</think>", "<s>"]
    texts = list(spelled(odd_texts(300), added))
    assert len(texts) >= 500
    for text in texts:
        assert tokenizer.encode(text, add_bos=False) == trained.reference.encode(text), ascii(text)
    for id_, (text, type_) in enumerate(trained.tokens):
        expected = "" if type_ in (UNKNOWN, CONTROL) else text.replace("\u2581", " ")
        if type_ != BYTE:
            assert tokenizer.decode([id_]) == expected
    assert tokenizer.encode("") == [tokenizer.bos_id] == [1]
    assert tokenizer.eos_ids == {2}


@pytest.mark.slow
def test_equals_llama_cpps_sentencepiece(
    trained: Trained, tiny_model: TinyModel, tmp_path: Path
) -> None:
    def write(writer: gguf.GGUFWriter) -> None:
        add_vocabulary(writer, trained.tokens, **trained.settings())
        writer.add_chat_template(
            "<s>[INST]{{ messages[0].content }}[/INST]</s>[INST] {{ messages[0].content }}<think>"
        )

    path = tiny_model.with_rows(len(trained.tokens)).write_gguf(
        tmp_path / "tiny.gguf", vocabulary=write
    )
    ours, theirs = Tokenizer.from_checkpoint(path), LlamaCpp(path)
    for text in spelled(odd_texts(300, seed=5), ["[INST]", "<think>", "</think>", "<s>"]):
        assert ours.encode(text, add_bos=False) == theirs.encode(text), ascii(text)
    for text in odd_texts(100, seed=6):  # a chat: special tokens, and text behind them
        prompt = ours.apply_chat_template([{"role": "user", "content": text}])
        shown = f"<s>[INST]{text}[/INST]</s>[INST] {text}<think>"
        if not {"<s>", "</s>"} & set(re.findall("</?s>", text)):
            assert prompt == theirs.encode(shown, parse_special=True), ascii(text)


@pytest.mark.slow
def test_equals_a_sentencepiece_folder(trained: Trained, tmp_path: Path) -> None:
    """tokenizer.json by transformers, normalised as in the published folders of Llama 2."""
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.model").write_bytes(trained.proto)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    body = json.loads(AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer.to_str())
    blanks: list[Any] = [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    prefix: list[Any] = [{"type": "Prepend", "prepend": "\u2581"}] if trained.prefix else []
    body |= {
        "pre_tokenizer": None,
        "normalizer": {"type": "Sequence", "normalizers": prefix + blanks},
        "added_tokens": [
            {
                **body["added_tokens"][0],
                "id": id_,
                "content": text,
                "special": type_ != USER_DEFINED,
            }
            for id_, (text, type_) in enumerate(trained.tokens)
            if type_ in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    folder = Tokenizer.from_checkpoint(tmp_path)
    path = vocabulary_file(tmp_path / "x.gguf", trained.tokens, **trained.settings())
    ours = Tokenizer.from_checkpoint(path)
    assert ours.token_bytes == folder.token_bytes
    assert ours.special_id("[INST]") == folder.special_id("[INST]") is not None
    for text in spelled(odd_texts(300, seed=6), ["[INST]", "<think>", "</think>", "<s>"]):
        ids = ours.encode(text, add_bos=False)
        assert ids == folder.encode(text, add_bos=False), ascii(text)


def test_unknown_characters_without_byte_tokens(tmp_path: Path) -> None:
    """They become the unknown token, as in SentencePiece; without one they are left out."""
    tokens = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("a", NORMAL), ("aa", NORMAL)]
    scores = [0.0, 0.0, -2.0, -1.0]
    path = vocabulary_file(
        tmp_path / "x.gguf", tokens, kind="llama", scores=scores, add_space_prefix=False
    )
    assert Tokenizer.from_checkpoint(path).encode("aaxya", add_bos=False) == [3, 0, 2]
