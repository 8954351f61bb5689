"""Tokenizers: equal to llama.cpp and to `tokenizers`, users' text is only ever text, bad files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import CheckpointError
from model.text.tokenizer import Tokenizer
from tests.model.tokenizer_oracles import LlamaCpp, odd_texts
from tests.support.builders import at_length

SPLITS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
PRES = [*SPLITS, "smollm", "smaug-bpe"]


@pytest.fixture(scope="session")
def tiny(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return Tokenizer.from_checkpoint(tiny_model.write_gguf(path))


@pytest.fixture(scope="session")
def tiny_json(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tiny") / "folder"
    return Tokenizer.from_checkpoint(tiny_model.write_folder(folder))


def test_both_formats_are_one_tokenizer(tiny: Tokenizer, tiny_json: Tokenizer) -> None:
    assert tiny.vocab_size == tiny_json.vocab_size
    assert tiny.token_bytes == tiny_json.token_bytes
    assert tiny.bos_id == tiny_json.bos_id == 1
    assert tiny.eos_ids == tiny_json.eos_ids == {0, 2}  # by name, whatever the metadata lists
    for text in odd_texts(200):
        assert tiny.encode(text) == tiny_json.encode(text), ascii(text)


@pytest.mark.parametrize("pre", SPLITS)
def test_splits_equal_the_published_patterns(
    tiny_model_split_by: Callable[[str], Any], tmp_path: Path, pre: str
) -> None:
    model = tiny_model_split_by(SPLITS[pre])
    ours = Tokenizer.from_checkpoint(model.write_gguf(tmp_path / "tiny.gguf", pre=pre))
    body = json.loads(model.tokenizer.to_str())
    body["model"]["ignore_merges"] = pre == "llama-bpe"
    folder = model.write_folder(tmp_path / "folder")
    (folder / "tokenizer.json").write_text(json.dumps(body))
    theirs = Tokenizer.from_checkpoint(folder)
    for text in odd_texts(150):
        assert ours.encode(text) == theirs.encode(text), ascii(text)


def test_round_trip_and_bytes(tiny: Tokenizer) -> None:
    for text in odd_texts(200, seed=1):
        ids = tiny.encode(text)
        assert tiny.decode(ids) == text
        assert b"".join(tiny.token_bytes[id_] for id_ in ids) == text.encode()


def test_no_text_has_fewer_tokens_than_the_bound(tiny: Tokenizer, tiny_json: Tokenizer) -> None:
    draw = random.Random(3)
    for _ in range(200):
        text = "".join(draw.choices(odd_texts(50), k=draw.randint(1, 8)))
        for tokenizer in (tiny, tiny_json):
            fewest = tokenizer.fewest_tokens([text])
            assert 0 < fewest <= len(tokenizer.encode(text, add_bos=False))


def test_special_tokens_in_text_are_text(tiny: Tokenizer, tiny_json: Tokenizer) -> None:
    for tokenizer in (tiny, tiny_json):
        for text in ("<|im_end|>", "a<|im_start|>b", "<|endoftext|><|im_end|>"):
            ids = tokenizer.encode(text)
            assert not any(map(tokenizer.is_special, ids))
            assert tokenizer.decode(ids) == text


def test_special_tokens_in_text_are_read_on_request(tiny: Tokenizer, tiny_json: Tokenizer) -> None:
    """As `tokenizers` does: the longest at a position, and what is between them as text."""
    for tokenizer in (tiny, tiny_json):
        for text in ("<|im_end|>", "a<|im_start|>b", "<|endoftext|><|im_end|>", "<|im_", "é"):
            ids = tokenizer.encode(text, parse_special=True)
            assert sum(map(tokenizer.is_special, ids)) == text.count("|>")
            assert tokenizer.decode(ids, skip_special=False) == text
            assert tokenizer.fewest_tokens([text], parse_special=True) <= len(ids)
        long = "<|endoftext|>" * 50
        assert tokenizer.fewest_tokens([long], parse_special=True) <= 50


def test_special_tokens_have_a_name_and_no_text(tiny: Tokenizer) -> None:
    assert [tiny.is_special(id_) for id_ in range(4)] == [True, True, True, False]
    assert tiny.token_text(2) == "<|im_end|>"
    assert tiny.decode([1, *tiny.encode("hi"), 2]) == "hi"


def test_incomplete_utf8_is_replaced(tiny: Tokenizer) -> None:
    first, *_ = tiny.encode("\U0001f9ff")  # not in the corpus: one token a byte
    assert tiny.decode([first]) == tiny.token_text(first) == "\ufffd"


def test_lone_surrogates_are_refused(tiny: Tokenizer) -> None:
    with pytest.raises(UnicodeEncodeError):
        tiny.encode("a\ud800b")


@pytest.mark.parametrize("form", ["gguf", "settings", "post_processor"])
def test_bos_only_where_the_model_asks(tiny_model: Any, tmp_path: Path, form: str) -> None:
    if form == "gguf":
        path = tiny_model.write_gguf(tmp_path / "tiny.gguf")
        flag = path.read_bytes().index(b"add_bos_token") + len(b"add_bos_token") + 4
        content = bytearray(path.read_bytes())
        content[flag] = 1
        path.write_bytes(content)
    else:
        path = tiny_model.write_folder(tmp_path / "folder")
        settings: dict[str, Any] = {"bos_token": "<|im_start|>"}
        if form == "settings":
            settings |= {"add_bos_token": True}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        body = json.loads((path / "tokenizer.json").read_text())
        if form == "post_processor":
            bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
            body["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {
                    "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
                },
            }
        (path / "tokenizer.json").write_text(json.dumps(body))
    tokenizer = Tokenizer.from_checkpoint(path)
    plain = tokenizer.encode("hi", add_bos=False)
    assert tokenizer.encode("hi") == [1, *plain]
    assert tokenizer.encode("") == [1]


def test_sentencepiece_like_vocabulary(tmp_path: Path) -> None:
    """Blanks as U+2581, put before a prompt's first word only; unknown characters as bytes."""
    words = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"helo", "[X]"]
    body = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": words.index(text),
                "content": text,
                "special": True,
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            }
            for text in ("<s>", "</s>", "[X]")
        ],
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "first",
            "split": False,
        },
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {word: id_ for id_, word in enumerate(words)},
            "merges": [],
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    settings = {"bos_token": "<s>", "chat_template": "{{ messages[0].content }}[X]hello"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300, "eos_token_id": [1, 999]}))
    tokenizer = Tokenizer.from_checkpoint(tmp_path)
    assert tokenizer.vocab_size == 300
    assert tokenizer.eos_ids == {1}
    assert tokenizer.is_special(299)
    hello = [words.index(letter) for letter in "hello"]
    blank, marker = words.index("\u2581"), words.index("[X]")
    assert tokenizer.encode("hello é") == [blank, *hello, blank, 2 + 0xC3, 2 + 0xA9]
    assert tokenizer.decode(tokenizer.encode("hello é")) == " hello é"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    assert ids == [blank, *hello, marker, *hello]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}'),
        ("tokenizer_config.json", "nope"),
        ("config.json", '{"vocab_size": 999999999999}'),
    ],
)
def test_malformed_folders_are_refused(
    tiny_model: Any, tmp_path: Path, name: str, text: str
) -> None:
    folder = tiny_model.write_folder(tmp_path / "folder")
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError) as refused:
        Tokenizer.from_checkpoint(folder)
    assert str(tmp_path) not in str(refused.value)


def test_other_splits_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    path = tiny_model.write_gguf(tmp_path / "tiny.gguf", pre="unheard-of")
    with pytest.raises(CheckpointError, match="not supported"):
        Tokenizer.from_checkpoint(path)


@pytest.mark.parametrize("seed", range(5))
def test_mutated_vocabularies_load_or_are_refused(
    tiny_model: Any, tmp_path: Path, seed: int
) -> None:
    path = tiny_model.write_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    head = whole.index(b"token_embd.weight")
    rng = random.Random(seed)
    for _ in range(30):
        mutated = bytearray(whole)
        at = rng.randrange(head)
        mutated[at] = rng.choice([mutated[at] ^ 1 << rng.randrange(8), 0, 0xFF])
        path.write_bytes(mutated)
        try:
            tokenizer = Tokenizer.from_checkpoint(path)
        except CheckpointError:
            continue
        assert all(0 <= id_ < tokenizer.vocab_size for id_ in tokenizer.encode("hello 123 é"))


def test_needs_no_torch(tiny_model: Any, tmp_path: Path) -> None:
    path = tiny_model.write_gguf(tmp_path / "tiny.gguf")
    script = (
        "import sys; from pathlib import Path; from model.text.tokenizer import Tokenizer;"
        f"Tokenizer.from_checkpoint(Path({str(path)!r})).encode('hi');"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_default_model_equals_llama_cpp(default_model: Path) -> None:
    """Its vocabulary lacks 21 bytes, so this covers what becomes of those as well."""
    ours, theirs = Tokenizer.from_checkpoint(default_model), LlamaCpp(default_model)
    texts = odd_texts(400)
    assert len(texts) >= 800
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), ascii(text)


@pytest.mark.slow
@pytest.mark.parametrize("pre", PRES)
def test_every_split_equals_llama_cpp(tiny_model: Any, tmp_path: Path, pre: str) -> None:
    path = tiny_model.write_gguf(tmp_path / "tiny.gguf", pre=pre)
    ours, theirs = Tokenizer.from_checkpoint(path), LlamaCpp(path)
    for text in odd_texts(200, seed=2):
        assert ours.encode(text, add_bos=False) == theirs.encode(text), ascii(text)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["a", "the ", *at_length("😀", "\u0301", " ", "ab", "1", "\n")])
def test_long_words_take_linear_time(default_model: Path, unit: str) -> None:
    """Eight times the text in at most thirty times the time; quadratic work would take 64 times."""
    tokenizer = Tokenizer.from_checkpoint(default_model)

    def seconds(size: int) -> float:
        text = unit * (size // len(unit.encode()))
        return min(_timed(tokenizer, text) for _ in range(3))

    assert seconds(1_000_000) < 30 * seconds(125_000)


def _timed(tokenizer: Tokenizer, text: str) -> float:
    import time

    start = time.thread_time()
    tokenizer.encode(text)
    return time.thread_time() - start
