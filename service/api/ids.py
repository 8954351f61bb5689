"""Call ids: `s<shard>-<32 hex digits of a version 7 UUID>` (RFC 9562). They sort by time."""

from __future__ import annotations

import re
import secrets
import time

_CALL_ID = re.compile(r"s[0-9]{1,4}-([0-9a-f]{12})7[0-9a-f]{3}[89ab][0-9a-f]{15}")


def new_call_id(*, shard: int = 0) -> str:
    """A new id: 48 bits of Unix milliseconds, then 74 random bits that nobody can guess."""
    milliseconds = time.time_ns() // 1_000_000
    random_a = 0x7000 | secrets.randbits(12)
    random_b = 0b10 << 62 | secrets.randbits(62)
    return f"s{shard}-{milliseconds:012x}{random_a:04x}{random_b:016x}"


def call_age(call_id: str) -> float | None:
    """Seconds since an id was made, by this host's clock; None for what is no id."""
    match = _CALL_ID.fullmatch(call_id)
    return None if match is None else time.time() - int(match[1], 16) / 1000
