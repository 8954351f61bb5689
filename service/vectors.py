"""Vectors: results of encoding as text in the journal, and what the API computes from them.

A result is a row of float32 values. As text it is base64 of its little-endian bytes, so all results
of one request have the same length, and a record can hold several. Sums are taken in float64 and in
a fixed order: the same results give the same bits in every process.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float32]
"""Shape [number of inputs, width]."""


def result_id(row: Rows) -> int:
    """CRC-32 of a result: the id of its token in the journal."""
    return zlib.crc32(_bytes(row))


def to_text(row: Rows) -> str:
    """A result as text."""
    return base64.b64encode(_bytes(row)).decode()


def from_text(text: str, *, count: int) -> Rows:
    """`count` results of one width. Raises ValueError if the text is not that of so many."""
    size = len(text) // max(1, count)
    if size * count != len(text) or (count and not size):
        raise ValueError(f"the text is not that of {count} results")
    parts = (text[start : start + size] for start in range(0, len(text), max(1, size)))
    rows = [np.frombuffer(base64.b64decode(part, validate=True), "<f4") for part in parts]
    return np.array(rows, np.float32).reshape(count, -1)


def shortened(rows: Rows, dimensions: int | None) -> Rows:
    """The first `dimensions` values of each row, scaled to length 1; None: the rows as they are."""
    if dimensions is None or dimensions >= rows.shape[1]:
        return rows
    kept = rows[:, :dimensions].astype(np.float64)
    return (kept / np.maximum(_lengths(kept), np.finfo(np.float32).tiny)).astype(np.float32)


def cosines(rows: Rows, others: Rows) -> list[float]:
    """Cosine of the angle between each row and the other one of the same index; 0 if one is 0."""
    a, b = rows.astype(np.float64), others.astype(np.float64)
    products = (a * b).sum(axis=1, keepdims=True)
    lengths = _lengths(a) * _lengths(b)
    cosine = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    return [float(value) for value in np.clip(cosine, -1.0, 1.0)[:, 0]]


def probabilities(row: Rows) -> list[float]:
    """Softmax of the logits of several labels; of a single logit, its sigmoid."""
    logits = row.astype(np.float64)
    if len(logits) == 1:
        return [sigmoid(float(logits[0]))]
    powers = np.exp(logits - logits.max())
    return [float(value) for value in powers / powers.sum()]


def sigmoid(logit: float) -> float:
    """1 / (1 + exp(-logit)), without overflow."""
    power = float(np.exp(-abs(logit)))
    return 1 / (1 + power) if logit >= 0 else power / (1 + power)


def stacked(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, in order."""
    return np.concatenate(parts)


def _bytes(row: Rows) -> bytes:
    return np.ascontiguousarray(row, "<f4").tobytes()


def _lengths(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    length: npt.NDArray[np.float64] = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    return length
