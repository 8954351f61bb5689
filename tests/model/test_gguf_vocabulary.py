"""GGUF vocabularies: ids are the file's; equal to folders, llama.cpp and SentencePiece."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, pre_tokenizers

from model.checkpoint import CheckpointError
from model.text.tokenizer import Tokenizer
from tests.model.tokenizer_oracles import LlamaCpp, odd_texts, spelled
from tests.model.vocabulary_files import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    vocabulary_file,
)
from tests.support.tiny_model import TinyModel, build_tiny_model

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen's order. What its tokenizer.json does not call special is user-defined in GGUF.
CONTROLS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
LITERALS = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
]
# llama.cpp takes these as the file declares them; the <|fim...|> are control tokens to it.
SAME_TYPE = [*CONTROLS, *(text for text in LITERALS if "|" not in text)]
PADDING = 5  # rows of the embedding without a token


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The tokenizer of one model, read from each kind of file."""

    gguf: Tokenizer
    folder: Tokenizer
    path: Path


def with_added_tokens(
    pattern: str, *, controls: Sequence[str], literals: Sequence[str]
) -> TinyModel:
    """A tiny model whose added tokens stand behind the ordinary ones."""
    model = build_tiny_model(pre_tokenizers.Split(Regex(pattern), "isolated"), specials=())
    model.tokenizer.add_tokens(
        [
            *(AddedToken(text, special=True, normalized=False) for text in controls),
            *(AddedToken(text, special=False, normalized=False) for text in literals),
        ]
    )
    return model.with_rows(model.vocab_size + PADDING)


def byte_level(model: TinyModel, pre: str) -> Callable[[gguf.GGUFWriter], None]:
    """Writes the model's vocabulary as llama.cpp's converter does."""
    body = json.loads(model.tokenizer.to_str())
    ids = model.tokenizer.get_vocab(with_added_tokens=True)
    types = dict.fromkeys(ids, NORMAL)
    for token in body["added_tokens"]:
        types[token["content"]] = CONTROL if token["special"] else USER_DEFINED
    tokens = sorted(ids, key=ids.__getitem__)
    padding = [f"[PAD{len(tokens) + index}]" for index in range(PADDING)]

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens + padding)
        writer.add_token_types([*(types[token] for token in tokens), *[UNUSED] * PADDING])
        writer.add_token_merges([" ".join(merge) for merge in body["model"]["merges"]])
        writer.add_eos_token_id(ids["<|im_end|>"])
        writer.add_add_bos_token(value=False)

    return write


def pair_of(model: TinyModel, folder: Path, *, pre: str, whole_words: bool = False) -> Pair:
    path = model.write_gguf(folder / "tiny.gguf", vocabulary=byte_level(model, pre))
    kept = model.write_folder(folder / "folder")
    config = json.loads((kept / "config.json").read_text())
    (kept / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    body = json.loads((kept / "tokenizer.json").read_text())
    body["model"]["ignore_merges"] = whole_words
    (kept / "tokenizer.json").write_text(json.dumps(body))
    return Pair(
        gguf=Tokenizer.from_checkpoint(path), folder=Tokenizer.from_checkpoint(kept), path=path
    )


@pytest.fixture(scope="module", params=["qwen2", "deepseek-r1-qwen", "tekken"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    is_tekken = request.param == "tekken"
    model = with_added_tokens(TEKKEN if is_tekken else QWEN2, controls=CONTROLS, literals=LITERALS)
    folder = tmp_path_factory.mktemp("pair")
    return pair_of(model, folder, pre=request.param, whole_words=is_tekken)


def test_every_added_token_has_one_id(pair: Pair) -> None:
    """User-defined tokens once got the next free ids: <tool_call> was <|im_start|>."""
    first = pair.folder.special_id(CONTROLS[0])
    assert first is not None
    for offset, text in enumerate(CONTROLS):
        assert pair.gguf.special_id(text) == pair.folder.special_id(text) == first + offset
        assert pair.gguf.is_special(first + offset)
    for offset, text in enumerate(LITERALS, len(CONTROLS)):
        assert pair.gguf.encode(text) == pair.folder.encode(text) == [first + offset]
        assert pair.gguf.decode([first + offset]) == text
        assert pair.gguf.special_id(text) is None


def test_odd_texts_have_the_same_ids(pair: Pair) -> None:
    texts = list(spelled(odd_texts(200), CONTROLS + LITERALS))
    assert len(texts) >= 500
    for text in texts:
        ids = pair.gguf.encode(text)
        assert ids == pair.folder.encode(text), ascii(text)
        assert not any(map(pair.gguf.is_special, ids)), ascii(text)
        assert pair.gguf.decode(ids) == text


def test_the_rest_of_the_vocabulary_is_the_same(pair: Pair) -> None:
    assert pair.gguf.vocab_size == pair.folder.vocab_size
    assert pair.gguf.token_bytes == pair.folder.token_bytes
    assert pair.gguf.eos_ids == pair.folder.eos_ids
    assert len(pair.gguf.eos_ids) == 2  # <|im_end|> by the metadata, <|endoftext|> by its name
    assert pair.gguf.special_id("[PAD999]") is None


@pytest.mark.slow
def test_added_tokens_equal_llama_cpps(tmp_path: Path) -> None:
    model = with_added_tokens(QWEN2, controls=CONTROLS, literals=LITERALS)
    pair = pair_of(model, tmp_path, pre="deepseek-r1-qwen")
    theirs = LlamaCpp(pair.path)
    for text in spelled(odd_texts(200, seed=3), SAME_TYPE):
        assert pair.gguf.encode(text) == theirs.encode(text), ascii(text)


@pytest.mark.slow
def test_tekken_equals_llama_cpps_within_ascii(tmp_path: Path) -> None:
    """Beyond ASCII, llama.cpp does not split between lower and upper case, as Mistral does."""
    model = with_added_tokens(TEKKEN, controls=CONTROLS, literals=LITERALS)
    pair = pair_of(model, tmp_path, pre="tekken", whole_words=True)
    theirs = LlamaCpp(pair.path)
    for text in filter(str.isascii, spelled(odd_texts(900, seed=4), SAME_TYPE)):
        assert pair.gguf.encode(text, add_bos=False) == theirs.encode(text), ascii(text)


# --- vocabularies alone


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def test_types_may_stand_in_any_order(tmp_path: Path) -> None:
    tokens = [
        ("<think>", USER_DEFINED),
        *((letter, NORMAL) for letter in ALPHABET[:128]),
        ("<s>", CONTROL),
        ("[PAD1]", UNUSED),
        ("<0x0A>", BYTE),
        *((letter, NORMAL) for letter in ALPHABET[128:]),
        ("", UNUSED),
        ("<unk>", UNKNOWN),
        ("", UNUSED),
        ("</think>", USER_DEFINED),
        ("<|im_end|>", USER_DEFINED),
        ("hi", NORMAL),
    ]
    ids = {text: id_ for id_, (text, _) in enumerate(tokens)}
    path = vocabulary_file(tmp_path / "x.gguf", tokens, merges=["h i"])
    tokenizer = Tokenizer.from_checkpoint(path)
    assert tokenizer.vocab_size == len(tokens)
    assert tokenizer.encode("<think>hi</think>") == [ids["<think>"], ids["hi"], ids["</think>"]]
    assert tokenizer.decode([ids["<0x0A>"]]) == "\n"
    for text in ("<s>", "<unk>", "<|im_end|>"):
        assert tokenizer.special_id(text) == ids[text]
        assert ids[text] not in tokenizer.encode(text)
    assert tokenizer.is_special(ids["[PAD1]"])
    assert tokenizer.special_id("[PAD1]") is None
    assert tokenizer.eos_ids == {ids["<|im_end|>"]}  # special by its name alone


def test_folders_keep_stated_ids(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The library would number them in order, without the gap."""
    size = tiny_model.vocab_size
    folder = tiny_model.with_rows(size + 14).write_folder(tmp_path / "folder")
    body = json.loads((folder / "tokenizer.json").read_text())
    for offset, (text, special) in enumerate(
        [("<a>", True), ("<b>", False), ("<|eot_id|>", False)]
    ):
        token = {**body["added_tokens"][0], "content": text, "special": special}
        body["added_tokens"].append({**token, "id": size + 7 + 3 * offset})
    (folder / "tokenizer.json").write_text(json.dumps(body))
    tokenizer = Tokenizer.from_checkpoint(folder)
    assert tokenizer.special_id("<a>") == size + 7
    assert tokenizer.encode("<b>") == [size + 10]
    assert tokenizer.special_id("<|eot_id|>") == size + 13
    assert size + 13 in tokenizer.eos_ids  # by its name alone, as in a GGUF file
    assert tokenizer.vocab_size == size + 14
    body["added_tokens"][-1]["content"] = "<b>"
    (folder / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="'<b>' has no free id"):
        Tokenizer.from_checkpoint(folder)


def test_merges_of_a_folder_spell_no_special_token(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Converters of SentencePiece models write merges into every piece, control tokens too."""
    folder = tiny_model.write_folder(tmp_path / "folder")
    body = json.loads((folder / "tokenizer.json").read_text())
    body["added_tokens"].append({**body["added_tokens"][0], "id": 511, "content": "the"})
    body["model"]["vocab"] = {
        token: id_ for token, id_ in body["model"]["vocab"].items() if id_ != 511
    } | {"the": 511}
    body["model"]["merges"].insert(0, ["t", "h"])
    body["model"]["merges"].insert(1, ["th", "e"])
    (folder / "tokenizer.json").write_text(json.dumps(body))
    tokenizer = Tokenizer.from_checkpoint(folder)
    assert tokenizer.special_id("the") == 511
    assert 511 not in tokenizer.encode("the")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "bert"}, "x.gguf: the vocabulary type 'bert' is not supported"),
        ({"pre": "unheard-of"}, "x.gguf: the pre-tokenizer 'unheard-of' is not supported"),
        ({"merges": ["a c"]}, "a merge is not of two tokens into a third"),
        ({"merges": ["a <s>"]}, "a merge is not of two tokens into a third"),
        ({"kind": "llama"}, "as many scores as tokens"),
        ({"kind": "llama", "scores": [0.0, 1.0]}, "as many scores as tokens"),
        ({"kind": "llama", "scores": [0.0, float("nan"), 0.0, 0.0]}, "must be finite"),
        ({"kind": "llama", "scores": [0.0, float("inf"), 0.0, 0.0]}, "must be finite"),
        ({"bos_token_id": 4}, "bos_token_id is outside"),
        ({"eot_token_id": 2**32 - 1}, "eot_token_id is outside"),
        ({"tokens": [("a", NORMAL), ("a", CONTROL)]}, "two tokens have the text 'a'"),
        ({"tokens": [("a", 7)]}, "token types must be from 0 to 6"),
        ({"tokens": [("a", -1)]}, "token types must be from 0 to 6"),
        ({"tokens": [("<0xGG>", BYTE)]}, "byte tokens must be"),
        ({"tokens": [("a" * 300, NORMAL)], "kind": "llama", "scores": [0.0]}, "at most 256"),
    ],
)
def test_refusals_are_one_clear_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    given = {"tokens": [("<s>", CONTROL), ("a", NORMAL), ("b", NORMAL), ("ab", NORMAL)], **changes}
    path = vocabulary_file(tmp_path / "x.gguf", **given)
    with pytest.raises(CheckpointError, match=message) as refused:
        Tokenizer.from_checkpoint(path)
    assert "\n" not in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


def test_more_rows_than_tokens(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The network can choose an id that has no token: it has no text, and breaks nothing."""
    rows = tiny_model.vocab_size + 9
    model = tiny_model.with_rows(rows)
    for path in (model.write_gguf(tmp_path / "x.gguf"), model.write_folder(tmp_path / "folder")):
        tokenizer = Tokenizer.from_checkpoint(path)
        assert tokenizer.vocab_size == len(tokenizer.token_bytes) == rows
        assert tokenizer.decode([rows - 1]) == tokenizer.token_text(rows - 1) == ""
        assert max(tokenizer.encode("".join(odd_texts(20)))) < tiny_model.vocab_size


def test_ends_beyond_the_embedding_are_left_out(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The engine forbids the ends of an answer by their row, and <|im_end|> has none."""
    model = tiny_model.with_rows(2)
    for path in (model.write_gguf(tmp_path / "x.gguf"), model.write_folder(tmp_path / "folder")):
        tokenizer = Tokenizer.from_checkpoint(path)
        assert tokenizer.eos_ids == {0}
        assert tokenizer.vocab_size == model.vocab_size
