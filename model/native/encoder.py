"""The C interface of native encoders, typed. Structures mirror src/quire_encoder.h field by field.

Calls release the GIL. Arrays must be contiguous and of the stated type.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np

from model.batch import Floats, Ints
from model.native import NativeUnavailable
from model.native.library import ERROR_BYTES, NativeLibrary, Signatures, declare


class Matrix(IntEnum):
    """The products of a layer, and of the classifier, which has no layer."""

    QKV = 0
    OUT = 1
    UP = 2
    DOWN = 3
    HEAD_DENSE = 4
    HEAD_OUT = 5


class Vector(IntEnum):
    """Norms; the last four are a layer's."""

    EMBED = 0
    FINAL = 1
    HEAD = 2
    ATTENTION = 3
    MLP = 4
    QUERY = 5
    KEY = 6


class Table(IntEnum):
    """What is read by rows: by a token's id, its position or its type."""

    EMBED = 0
    POSITION = 1
    TYPE = 2
    COS = 3
    SIN = 4
    LOCAL_COS = 5
    LOCAL_SIN = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderShape:
    """Sizes of an encoder and of how it is run; mirrors QuireEncoderShape."""

    hidden: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    dim: int
    activation: int
    gated: bool
    causal: bool
    post_norm: bool
    rms: bool
    rotary: bool
    has_types: bool
    position_offset: int
    pooling: int  # 0: mean, 1: first, 2: last
    normalised: bool
    labels: int
    head_dense: bool
    head_activation: int
    eight_bit: bool
    threads: int
    norm_eps: float
    windows: Sequence[int]  # per layer


_C_TYPES: dict[str, type[ctypes._SimpleCData[Any]]] = {
    "float": ctypes.c_float,
    "Sequence[int]": ctypes.c_void_p,
}


class _Shape(ctypes.Structure):
    _fields_ = tuple(
        (field.name, _C_TYPES.get(str(field.type), ctypes.c_int32))
        for field in fields(EncoderShape)
    )


class _Encoding(ctypes.Structure):
    _fields_ = (
        ("sequences", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("starts", "tokens", "types", "out")),
    )


class NativeEncoderModel:
    """One encoder inside the library: weights and threads."""

    def __init__(self, library: NativeLibrary, shape: EncoderShape, *, variant: str = "") -> None:
        self.width = shape.labels or shape.hidden
        self._calls = library.calls
        _declare(self._calls)
        windows = np.array(shape.windows, np.int32)
        values = {field.name: getattr(shape, field.name) for field in fields(shape)}
        mirrored = _Shape(**{**values, "windows": windows.ctypes.data})
        error = ctypes.create_string_buffer(ERROR_BYTES)
        self._tables: dict[Table, Floats] = {}  # borrowed by the library
        self._handle: int | None = self._calls.quire_encoder_create(
            ctypes.byref(mirrored), variant.encode(), error, ERROR_BYTES
        )
        if not self._handle:
            raise NativeUnavailable(f"{variant or 'native'}: {error.value.decode()}")

    @property
    def variant(self) -> str:
        """The instruction set in use."""
        name: bytes = self._calls.quire_encoder_variant(self._handle)
        return name.decode()

    def load_matrix(
        self, kind: Matrix, weight_NK: Floats, bias_N: Floats | None, *, layer: int = 0
    ) -> None:
        """Packs a matrix [out, in]."""
        self._calls.quire_encoder_matrix(
            self._handle, layer, kind, weight_NK.ctypes.data, _pointer(bias_N)
        )

    def load_vector(
        self, kind: Vector, weight: Floats, bias: Floats | None = None, *, layer: int = 0
    ) -> None:
        """Copies the weight and the bias of a norm."""
        self._calls.quire_encoder_vector(
            self._handle, layer, kind, weight.ctypes.data, _pointer(bias)
        )

    def load_table(self, kind: Table, rows: Floats) -> None:
        """Keeps a table, which is not copied."""
        self._tables[kind] = rows
        self._calls.quire_encoder_table(self._handle, kind, rows.ctypes.data)

    def encode(self, *, tokens_T: Ints, types_T: Ints, starts_S1: Ints) -> Floats:
        """The vectors of S sequences, [S, width]. Every id, type and length must be valid."""
        out = np.empty((len(starts_S1) - 1, self.width), np.float32)
        arrays = (starts_S1, tokens_T, types_T, out)
        step = _Encoding(len(starts_S1) - 1, *(array.ctypes.data for array in arrays))
        if self._calls.quire_encode(self._handle, ctypes.byref(step)):
            raise MemoryError("no memory for the buffers of a step")
        return out

    def close(self) -> None:
        """Ends the threads and frees the memory. May be called again."""
        if self._handle:
            self._calls.quire_encoder_destroy(self._handle)
        self._handle = None
        self._tables = {}


def _pointer(array: Floats | None) -> int | None:
    return None if array is None else array.ctypes.data


def _declare(calls: ctypes.CDLL) -> None:
    pointer, text, i32 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32
    signatures: Signatures = {
        "quire_encoder_create": (pointer, (pointer, text, text, ctypes.c_size_t)),
        "quire_encoder_destroy": (None, (pointer,)),
        "quire_encoder_variant": (text, (pointer,)),
        "quire_encoder_matrix": (None, (pointer, i32, i32, pointer, pointer)),
        "quire_encoder_vector": (None, (pointer, i32, i32, pointer, pointer)),
        "quire_encoder_table": (None, (pointer, i32, pointer)),
        "quire_encode": (i32, (pointer, pointer)),
    }
    declare(calls, signatures)
