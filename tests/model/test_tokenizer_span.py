"""The bound on the text of one token: no text has fewer tokens than the bound says."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from model.text.span import Span, find_span

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
PIECES = (
    *(
        "a",
        " ",
        "    ",
        "\n",
        "hello",
        "한국",
        "\u1112\u1161\u11ab",
        "\u03b9\u0308\u0301",
        "\u1fef",
    ),
    *("\u2126\u0313\u0300\u0345", "\U0001d41a", "\U000107a5", "ﬁ", "é", "e\u0301", "😀", "\x00"),
)


def by_bytes(*normalizer: Any, missing: str = "") -> tuple[Tokenizer, list[bytes]]:
    """A byte-level tokenizer with one word of five bytes."""
    characters = [character for character in sorted(ALPHABET) if character != missing]
    parts = ["he", "ll", "hell", "hello"]
    vocab = {text: index for index, text in enumerate([*characters, *parts])}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    if normalizer:
        tokenizer.normalizer = normalizers.Sequence(list(normalizer))
    return tokenizer, _bytes_of(vocab)


def _bytes_of(vocab: dict[str, int]) -> list[bytes]:
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible}
    byte_of |= {chr(256 + index): byte for index, byte in enumerate(hidden)}
    return [bytes(byte_of[character] for character in text) for text in vocab]


STEPS: dict[str, tuple[Any, ...]] = {
    "none": (),
    "NFC": (normalizers.NFC(),),
    "NFD": (normalizers.NFD(),),
    "NFKC": (normalizers.NFKC(),),
    "NFKD": (normalizers.NFKD(),),
    "longer": (normalizers.Replace(" ", "\u2581"), normalizers.Prepend("\u2581")),
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_no_text_has_fewer_tokens(steps: tuple[Any, ...]) -> None:
    tokenizer, token_bytes = by_bytes(*steps)
    span = find_span(tokenizer, token_bytes)
    assert span is not None
    draw = random.Random(7)
    texts = [*(piece * 50 for piece in PIECES)]
    texts += ["".join(draw.choices(PIECES, k=40)) for _ in range(200)]
    for text in texts:
        tokens = len(tokenizer.encode(text).ids)
        assert span.fewest_tokens([text]) <= tokens
        assert span.fewest_tokens([text[:9], text[9:]]) == span.fewest_tokens([text])


def test_the_bound_is_the_longest_token() -> None:
    assert find_span(*by_bytes()) == Span(5)
    assert Span(5).fewest_tokens(["é" * 5, "x"]) == 3


def test_bytes_without_a_token_count_for_nothing() -> None:
    tokenizer, token_bytes = by_bytes(missing="a")
    span = find_span(tokenizer, token_bytes)
    assert span == Span(5, b"a")
    assert tokenizer.encode("a" * 50).ids == []
    assert span.fewest_tokens(["a" * 50]) == 0
    assert find_span(*by_bytes(normalizers.NFC(), missing="a")) is None


def test_what_can_lose_text_has_no_bound() -> None:
    """Each of these makes few tokens, or none, of some text of any length."""
    removing, token_bytes = by_bytes()
    removing.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()]
    )
    splitting, _ = by_bytes()
    splitting.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]
    )
    swallowing, _ = by_bytes()
    swallowing.add_tokens([AddedToken("<x>", rstrip=True)])
    for lossy in (removing, splitting, swallowing):
        assert find_span(lossy, token_bytes) is None
    for step in (normalizers.Strip(), normalizers.Replace("aa", "b"), normalizers.StripAccents()):
        assert find_span(*by_bytes(step)) is None
    unknown = Tokenizer(models.BPE(vocab={"a": 0, "?": 1}, merges=[], unk_token="?", fuse_unk=True))
    assert find_span(unknown, token_bytes) is None


def test_sentencepiece_needs_byte_fallback() -> None:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁the": 256}
    token_bytes = [bytes([byte]) for byte in range(256)] + [b" the"]
    for fallback in (True, False):
        model = models.BPE(vocab=vocab, merges=[], byte_fallback=fallback, fuse_unk=True)
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        assert find_span(tokenizer, token_bytes) == (Span(4) if fallback else None)
