"""Odd texts to tokenise, and llama.cpp's tokenizer to compare with."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

PIECES = [
    *("\x20", "  ", "     ", "\t", "\n", "\n\n", "\r\n", "\r", "\x00", "\x01", "\x1b[31m", "\x7f"),
    *("\u0085", "\u00a0", "\u2003", "\u3000", "\u200b", "\u200d", "\ufeff", "\u202e", "\ufffd"),
    *("0", "1", "12", "123456", "٣", "½", "²", "Ⅷ", "3.14", "1,000", "a", "the", "Hello", "WORLD"),
    *("'s", "'S", "'ll", "'LL", "'", '"', "don't", "é", "e\u0301", "\u0301", "\u0300\u0301", "ß"),
    *(
        "Ω",
        "привет",
        "你好",
        "漢字",
        "こんにちは",
        "한국어",
        "مرحبا",
        "שלום",
        "हिन्दी",
        "ไทย",
        "ǅ",
        "ﬁ",
    ),
    *(
        "😀",
        "👩‍👩‍👧",
        "🇫🇷",
        "👍🏽",
        "def f(x):\n    return x",
        "{}",
        "()",
        "<|im_end|>",
        "<|im_start|>",
    ),
    *("<|endoftext|>", "<repo_name>", "<|", "|>", "<s>", "\\", "//", "#", "--", "...", "!?", "_"),
    *(
        "$",
        "€",
        "\U0010ffff",
        "\ue000",
        "\U0001d518",
        "    if x:\n\t\treturn",
        "a\n \n  b",
        "\n   1",
    ),
]


def odd_texts(count: int, seed: int = 0) -> list[str]:
    """The pieces alone, joined at random, and random code points."""
    rng = random.Random(seed)
    joined = ["".join(rng.choices(PIECES, k=rng.randint(2, 14))) for _ in range(count)]
    planes = [(0x20, 0x7F), (0x80, 0xD800), (0xE000, 0x110000)]
    wild = [
        "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randint(1, 12)))
        for _ in range(count)
    ]
    return PIECES + joined + wild


def spelled(texts: Sequence[str], added: Sequence[str]) -> Iterator[str]:
    """The texts, and each around one of the added tokens."""
    for index, text in enumerate(texts):
        yield text
        yield text + added[index % len(added)] + text


class LlamaCpp:
    """llama.cpp's own tokenizer, over its server."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = 64
        parameters.warmup = parameters.fit_params = False
        parameters.cpuparams.n_threads = 1
        self._server = xllamacpp.Server(parameters)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": parse_special}
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            ids: list[int] = json.load(answer)["tokens"]
            return ids
