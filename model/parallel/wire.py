"""A batch as bytes, from the leader to its followers, and back.

Arrays end to end: dtype, rank and shape of each, then its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np

from model.batch import Batch, Bools, SamplingBatch

_LOCAL = {"segments", "sources"}  # None: such caches are on one rank
_DTYPES = (np.int32, np.uint64, np.float32, np.bool_, np.int64, np.uint32)


def encode(batch: Batch, unread_T: Bools | None) -> bytes:
    unread = np.zeros(0, np.bool_) if unread_T is None else unread_T
    pieces = []
    for array in (*_arrays(batch), unread):
        kind = _DTYPES.index(array.dtype.type)
        pieces += [np.array([kind, array.ndim, *array.shape], np.int64).tobytes(), array.tobytes()]
    return b"".join(pieces)


def decode(body: bytes) -> tuple[Batch, Bools | None]:
    arrays = _read_arrays(body)
    fields_of_batch = _fill(Batch, arrays)
    unread = next(arrays)
    return Batch(**fields_of_batch), unread if unread.size else None


def _arrays(record: Batch | SamplingBatch) -> Iterator[np.ndarray[Any, Any]]:
    for field in fields(record):
        value = getattr(record, field.name)
        if field.name in _LOCAL:
            continue
        if isinstance(value, SamplingBatch):
            yield from _arrays(value)
        elif isinstance(value, np.ndarray):
            yield np.ascontiguousarray(value)
        else:
            yield np.array(value, np.int64)


def _fill(
    kind: type[Batch | SamplingBatch], arrays: Iterator[np.ndarray[Any, Any]]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in fields(kind):
        if field.name in _LOCAL:
            continue
        if field.name == "sampling":
            values[field.name] = SamplingBatch(**_fill(SamplingBatch, arrays))
        else:
            array = next(arrays)
            values[field.name] = array if array.ndim else int(array)
    return values


def _read_arrays(body: bytes) -> Iterator[np.ndarray[Any, Any]]:
    at = 0
    while at < len(body):
        kind, rank = np.frombuffer(body, np.int64, 2, at).tolist()
        shape = np.frombuffer(body, np.int64, rank, at + 16).tolist()
        at += 8 * (2 + rank)
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(body, _DTYPES[kind], count, at).reshape(shape)
        at += array.nbytes
        yield array
