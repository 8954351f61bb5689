"""How journal records are stored in Redis: a few bytes per token, as one record has few tokens.

A stream entry's id is the number of tokens up to and including it (`<n>-0`, the end `<n>-1`); its
one field is `k` for tokens and `e` for the end.

    k:  flags (1 byte) · number of ids · ids · digest (4 bytes) · length of text · text · JSON
        numbers as LEB128 varints, text in UTF-8; JSON (l, p: log probabilities, n: numeric class)
        only in a first record, and if log probabilities were requested
    e:  JSON object: r reason, c cached tokens, s stopped by, x error, t time; defaults are left out

Another version may have written an entry. The decoder ignores unknown fields, unknown keys in the
JSON, unknown flags, and bytes after the JSON, which such a flag may announce. An entry with `e`
always decodes as an end: as an error if the reason is unknown or the entry malformed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.decoding import decode
from service.messages import End, FinishReason, Record, TokenLogprob, Tokens

TOKENS_FIELD = b"k"
END_FIELD = b"e"
UNKNOWN_REASON = "unknown_finish_reason"
"""Error code of an end that this version cannot read."""

_HAS_JSON = 1
_JSON = json.JSONDecoder()


class Malformed(ValueError):
    """An entry that is not in this format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _StoredEnd:
    r: str
    c: int = 0
    s: str | int | None = None
    x: str | None = None
    t: int | None = None


def encode_tokens(record: Tokens) -> bytes:
    """The value of field `k`. `record.start` is not in it: it follows from the entry's id."""
    text = record.text.encode("utf-8", "replace")
    columns: dict[str, Any] = {}
    if record.logprobs or record.prompt_logprobs:
        columns["l"] = [_pack(logprob) for logprob in record.logprobs]
        columns["p"] = [_pack(logprob) for logprob in record.prompt_logprobs]
    if record.numeric_class:
        columns["n"] = record.numeric_class
    out = bytearray([_HAS_JSON if columns else 0])
    _put(out, len(record.ids))
    for token in record.ids:
        _put(out, token)
    out += struct.pack("<I", record.digest)
    _put(out, len(text))
    out += text
    if columns:
        out += json.dumps(columns, separators=(",", ":")).encode()
    return bytes(out)


def encode_end(record: End) -> bytes:
    """The value of field `e`. `record.count` is not in it."""
    fields: dict[str, Any] = {"r": record.reason.value}
    if record.cached_tokens:
        fields["c"] = record.cached_tokens
    if record.stopped_by is not None:
        fields["s"] = record.stopped_by
    if record.error is not None:
        fields["x"] = record.error
    if record.ended_at is not None:
        fields["t"] = record.ended_at
    return json.dumps(fields, separators=(",", ":")).encode()


def decode_entry(entry_id: bytes, fields: Mapping[bytes, bytes]) -> Record:
    """A stream entry as a record. Raises Malformed."""
    try:
        count = int(entry_id.split(b"-")[0])
        if TOKENS_FIELD in fields:
            return _decode_tokens(fields[TOKENS_FIELD], count=count)
        return _decode_end(fields[END_FIELD], count=count)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise Malformed(f"journal entry of {len(fields)} fields: {type(error).__name__}") from error


def decode_ids(value: bytes) -> tuple[int, ...]:
    """Only the token ids of a field `k`. Raises Malformed."""
    try:
        return _take_ids(value)[0]
    except IndexError as error:
        raise Malformed("journal entry is cut off") from error


def _decode_end(value: bytes, *, count: int) -> End:
    """Never raises: nothing follows an end, and its readers must not wait forever."""
    try:
        end = decode(_StoredEnd, value)
    except (ValueError, TypeError):
        return End(count=count, reason=FinishReason.ERROR, error=UNKNOWN_REASON)
    known = end.r in set(FinishReason)
    return End(
        count=count,
        reason=FinishReason(end.r) if known else FinishReason.ERROR,
        cached_tokens=end.c,
        stopped_by=end.s,
        error=end.x if known else end.x or UNKNOWN_REASON,
        ended_at=end.t,
    )


def _decode_tokens(value: bytes, *, count: int) -> Tokens:
    ids, at = _take_ids(value)
    (digest,) = struct.unpack_from("<I", value, at)
    length, at = _take(value, at + 4)
    if at + length > len(value) or len(ids) > count or not ids:
        raise Malformed("journal entry with wrong lengths")
    text = value[at : at + length].decode()
    columns: dict[str, Any] = {}
    if value[0] & _HAS_JSON:
        columns, _ = _JSON.raw_decode(value[at + length :].decode(errors="replace"))
    return Tokens(
        start=count - len(ids),
        ids=ids,
        text=text,
        digest=digest,
        logprobs=tuple(_unpack(packed) for packed in columns.get("l", ())),
        prompt_logprobs=tuple(
            None if packed is None else _unpack(packed) for packed in columns.get("p", ())
        ),
        numeric_class=str(columns.get("n", "")),
    )


def _pack(logprob: TokenLogprob | None) -> list[Any] | None:
    """[log probability, id, log probability, id, log probability, ...]"""
    if logprob is None:
        return None
    return [logprob.logprob, *(value for pair in logprob.top for value in pair)]


def _unpack(packed: list[Any]) -> TokenLogprob:
    if not {type(number) for number in packed} <= {int, float}:
        raise TypeError("numbers expected")
    return TokenLogprob(packed[0], tuple(zip(packed[1::2], packed[2::2], strict=True)))


def _put(out: bytearray, number: int) -> None:
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)


def _take(value: bytes, at: int) -> tuple[int, int]:
    """A varint and the offset after it."""
    number = shift = 0
    while True:
        byte = value[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7


def _take_ids(value: bytes) -> tuple[tuple[int, ...], int]:
    length, at = _take(value, 1)
    ids: list[int] = []
    for _ in range(length):
        token, at = _take(value, at)
        ids.append(token)
    return tuple(ids), at
