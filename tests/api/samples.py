"""Random outputs of a grammar, over a vocabulary of single bytes."""

from __future__ import annotations

import random
from typing import Any

from model.grammar import Grammars

BYTES = [bytes([byte]) for byte in range(256)] + [b""]
EOS = 256
GRAMMARS = Grammars(BYTES, eos_ids=frozenset({EOS}), vocab_size=len(BYTES))


def fulfils(grammar: str, text: str) -> bool:
    """Whether a text is all of what a grammar derives."""
    matcher = GRAMMARS.matcher(grammar)
    data = text.encode()
    return matcher.num_allowed(list(data)) == len(data) and _read(matcher, data).fulfilled


def _read(matcher: Any, data: bytes) -> Any:
    for byte in data:
        matcher.read(byte)
    return matcher


def sample(grammar: str, draw: random.Random, *, often: bytes = b'"') -> str | None:
    """A random output in which some bytes occur `often`; None if it did not end."""
    matcher = GRAMMARS.matcher(grammar)
    data = bytearray()
    while len(data) < 800 and not matcher.ended:
        bits = matcher.bits()
        allowed = [token for token in range(len(BYTES)) if bits >> token & 1]
        if EOS in allowed:
            return data.decode()
        fits = matcher.num_allowed(list(often)) == len(often)
        few = [token for token in allowed if token < 128] or allowed
        chosen = often if fits and draw.random() < 0.2 else bytes([draw.choice(few)])
        _read(matcher, chosen)
        data += chosen
    return data.decode() if matcher.ended else None
