"""Tokens as bytes: how the text of a vocabulary's entry stands for bytes of the model's output."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

BLANK = "\u2581"  # SentencePiece's visible space
Decode = Callable[[str], bytes]


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


def byte_level(token: str) -> bytes:
    """The bytes of a token in GPT-2's alphabet."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode("utf-8", "replace")


def sentencepiece(token: str) -> bytes:
    """The bytes of a SentencePiece token: a byte token's byte, or text with U+2581 for spaces."""
    byte = byte_of(token)
    return token.replace(BLANK, " ").encode("utf-8", "replace") if byte is None else bytes([byte])


def byte_of(token: str) -> int | None:
    """The byte of a byte token such as <0x0A>; None for any other token."""
    match = _BYTE_TOKEN.fullmatch(token)
    return int(match[1], 16) if match else None


def byte_table(
    plain: Mapping[str, int], literal: Mapping[str, int], *, size: int, decode: Decode
) -> tuple[bytes, ...]:
    """The bytes of each id; b"" for ids that are in neither mapping. `literal` is not decoded."""
    table = [b""] * size
    for token, id_ in plain.items():
        table[id_] = decode(token)
    for text, id_ in literal.items():
        table[id_] = text.encode()
    return tuple(table)
