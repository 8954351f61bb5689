"""Folders with SentencePiece's own files: equal to SentencePiece, and to transformers with T5, mT5
and Marian; what is no such file is refused.
"""

from __future__ import annotations

import io
import json
import random
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from model.checkpoint import CheckpointError, load_model
from model.encoder_decoder import EncoderDecoder
from model.text.encoder_tokenizer import EncoderTokenizer
from model.text.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.model.tokenizer_oracles import odd_texts

pytestmark = pytest.mark.slow

LINES = (ROOT / "tests/data/perplexity.txt").read_text().splitlines()[:300]
PLAIN = [line for line in LINES if line.strip()][:60]
ENDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}  # as T5 has them
SPELLED = [
    "</s>",
    "a</s>b",
    "<unk> <pad>",
    "<extra_id_0>",
    "",
    "  ",
    " a  b ",
    "\u2581a",
    "a\u2581b",
]


@cache
def trained(**options: Any) -> bytes:
    """A SentencePiece model of a few hundred pieces."""
    stored = io.BytesIO()
    defaults: dict[str, Any] = {"model_type": "unigram", "vocab_size": 400, **ENDS}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=stored,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **(defaults | options),
    )
    return stored.getvalue()


def folder_of(folder: Path, proto: bytes, *, rows: int = 600, kind: str = "t5") -> Path:
    (folder / "spiece.model").write_bytes(proto)
    config = {"model_type": kind, "vocab_size": rows, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def processor(proto: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def loses_marks(text: str) -> bool:
    """Whether the library's normalizer drops a mark that SentencePiece keeps: behind a character
    that is replaced.
    """
    return any(
        unicodedata.combining(mark) and unicodedata.normalize("NFKC", before) != before
        for before, mark in pairwise(text)
    )


@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"split_by_whitespace": False, "add_dummy_prefix": False},
    ],
    ids=["t5", "as it is", "phrases"],
)
def test_equals_sentencepiece(options: dict[str, Any], byte_fallback: bool, tmp_path: Path) -> None:
    proto = trained(byte_fallback=byte_fallback, **options)
    ours, theirs = Tokenizer.from_checkpoint(folder_of(tmp_path, proto)), processor(proto)
    texts = [text for text in (*PLAIN, *SPELLED, *odd_texts(200)) if not loses_marks(text)]
    assert len(texts) > 500
    ties = 0
    for text in texts:
        given, expected = ours.encode(text), theirs.encode(text)
        if given != expected:  # of equal score: each library takes another one
            ties += 1
            scores = [sum(map(theirs.get_score, ids)) for ids in (given, expected)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-4), ascii(text)
    assert ties < 10
    for text in PLAIN:
        known = [id_ for id_ in ours.encode(text) if id_ != ENDS["unk_id"]]
        assert ours.decode(known).strip() == theirs.decode(known).strip()
    assert ours.eos_ids == {1}
    assert ours.vocab_size == 600


def test_a_run_of_blanks_takes_linear_time(tmp_path: Path) -> None:
    """A pattern that looked for the text's end from each blank would take hours."""
    ours = Tokenizer.from_checkpoint(folder_of(tmp_path, trained()))
    assert ours.encode("a" + " " * 1_000_000 + "b ") == ours.encode("a b")


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_sentinels_have_the_ids_behind_the_pieces(kind: str, tmp_path: Path) -> None:
    """T5's file does not list them; ids that the network does not have are left out."""
    size = processor(trained()).vocab_size()
    ours = Tokenizer.from_checkpoint(folder_of(tmp_path, trained(), rows=size + 60, kind=kind))
    if kind == "mt5":
        assert ours.special_id("<extra_id_99>") is None
        return
    assert ours.special_id("<extra_id_99>") == size
    assert ours.special_id("<extra_id_40>") == size + 59
    assert ours.special_id("<extra_id_39>") is None
    assert ours.encode("<extra_id_99>", parse_special=True) == [size]
    assert size not in ours.encode("<extra_id_99>")


def test_no_text_spells_a_special_token_of_a_unigram_model(tmp_path: Path) -> None:
    """Also of a tokenizer.json, in which special tokens have the best scores of all."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -5.0) for c in "\u2581ab/s<>")]
    library = Library(models.Unigram(pieces, 2, False))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.add_special_tokens(["<pad>", "</s>", "<unk>"])
    library.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", 1)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    encoder = EncoderTokenizer.from_path(tmp_path, max_tokens=20)
    encoded = encoder.encode("a</s>b<pad>").ids
    assert not {0, 1} & set(encoded[:-1])
    assert [encoder.token_text(id_) for id_ in (0, encoded[-1])] == ["<pad>", "</s>"]
    tokenizer = Tokenizer.from_checkpoint(tmp_path)
    ids = tokenizer.encode("a</s>b<pad>")
    assert not {0, 1} & set(ids)
    assert tokenizer.decode(ids[: len("\u2581a</s>b")]) == " a</s>b"
    assert tokenizer.encode("a</s>", parse_special=True)[-1] == 1


def t5_folder(folder: Path, kind: str, rows: int) -> Path:
    """A random model of transformers, as it saves it, and `spiece.model`."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    fields = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    fields |= {"decoder_start_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=rows, dtype="float32", **fields)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        model.shared.weight.copy_(torch.randn_like(model.shared.weight))
    model.save_pretrained(folder)
    (folder / "spiece.model").write_bytes(trained())
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_equals_transformers(kind: str, tmp_path: Path) -> None:
    """From text to log probabilities, in a folder without tokenizer.json."""
    from transformers import AutoModelForSeq2SeqLM, T5Tokenizer

    size = processor(trained()).vocab_size()
    folder = t5_folder(tmp_path, kind, size + 100)
    theirs = T5Tokenizer.from_pretrained(folder, extra_ids=100 if kind == "t5" else 0)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    ours, loaded = Tokenizer.from_checkpoint(folder), load_model(folder)
    network = EncoderDecoder(loaded.config)
    network.load_state_dict(loaded.weights)
    for text in PLAIN:
        source = [*ours.encode(text), loaded.config.end_id]
        assert source == theirs(text).input_ids, ascii(text)
        assert ours.decode(source).strip() == theirs.decode(source, skip_special_tokens=True)
    for text, answer in pairwise(PLAIN[:6]):
        source = [*ours.encode(text), loaded.config.end_id]
        begun = [*loaded.config.start_ids, *ours.encode(answer, target=True)]
        with torch.no_grad():
            expected = model(
                input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([begun])
            ).logits[0]
            given = network.logits(network.translate(torch.tensor(begun), torch.tensor(source)))
        assert expected.std() > 0.1
        assert (given.log_softmax(-1) - expected.log_softmax(-1)).abs().max() < 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_marian_equals_transformers(tmp_path: Path) -> None:
    """Sources and texts of the decoder are split by two files, and share the ids of a third."""
    from transformers import MarianTokenizer

    ends = {"pad_id": -1, "bos_id": -1, "eos_id": 0, "unk_id": 1}
    source, target = trained(**ends), trained(**ends, vocab_size=200, seed_sentencepiece_size=500)
    pieces = [
        each.id_to_piece(id_)
        for each in map(processor, (source, target))
        for id_ in range(each.vocab_size())
    ]
    texts = ["</s>", "<unk>", *sorted({*pieces} - {"</s>", "<unk>"}), ">>fr<<", "<pad>"]
    (tmp_path / "source.spm").write_bytes(source)
    (tmp_path / "target.spm").write_bytes(target)
    (tmp_path / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(texts)}))
    config = {"model_type": "marian", "vocab_size": len(texts), "eos_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, ours = MarianTokenizer.from_pretrained(tmp_path), Tokenizer.from_checkpoint(tmp_path)
    differs = 0
    for text in PLAIN:
        assert [*ours.encode(text), 0] == theirs(text).input_ids, ascii(text)
        answer = ours.encode(text, target=True)
        assert [*answer, 0] == theirs(text_target=text).input_ids, ascii(text)
        assert ours.decode(answer).strip() == theirs.decode(answer, skip_special_tokens=True)
        differs += answer != ours.encode(text)
    assert differs > len(PLAIN) / 2
    assert ours.encode(">>fr<< the") == theirs(">>fr<< the").input_ids[:-1]
    assert ours.eos_ids == {0}
    assert not {0, len(texts) - 1} & set(ours.encode("</s> <pad>"))


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, trained(model_type="bpe"))
    with pytest.raises(CheckpointError, match=r"^spiece\.model: only Unigram .*\.save_pretrained"):
        Tokenizer.from_checkpoint(folder)
    for data in (b"", b"\x00", b"\x08\x01", trained()[:-1], trained()[:5000], b"{}"):
        (folder / "spiece.model").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"^spiece\.model: "):
            Tokenizer.from_checkpoint(folder)
    (folder / "spiece.model").rename(folder / "sentencepiece.bpe.model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing.*\.save_pretrained"):
        Tokenizer.from_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing.*\.save_pretrained"):
        EncoderTokenizer.from_path(folder, max_tokens=9)
    (folder / "source.spm").write_bytes(trained())
    (folder / "target.spm").write_bytes(trained())
    for ids in ({}, {"<unk>": 0, "a": 2}, {"<unk>": "0"}, {"a": 0}):
        (folder / "vocab.json").write_text(json.dumps(ids))
        with pytest.raises(CheckpointError, match=r"^vocab\.json: "):
            Tokenizer.from_checkpoint(folder)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_load_or_are_refused(seed: int, tmp_path: Path) -> None:
    whole = trained(vocab_size=120)
    rng = random.Random(seed)
    for _ in range(25):
        mutated = bytearray(whole)
        first = rng.choice([0, rng.randrange(len(whole))])  # the pieces, or the normalizer's table
        for _ in range(rng.choice([1, 3, 100])):
            mutated[(first + rng.randrange(2500)) % len(whole)] = rng.choice(
                [0, 255, rng.randrange(256)]
            )
        try:
            tokenizer = Tokenizer.from_checkpoint(folder_of(tmp_path, bytes(mutated)))
        except CheckpointError:
            continue
        assert all(0 <= id_ < tokenizer.vocab_size for id_ in tokenizer.encode("hello 123 é"))
