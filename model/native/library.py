"""The native library's C interface, typed. Structures mirror src/quire.h field by field.

Calls release the GIL. Arrays must be contiguous and of the stated type; the library checks every
index in a step, but not the lengths of arrays.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.batch import Floats, Ints, SamplingBatch
from model.native import NativeUnavailable
from model.native.build import find_or_build
from model.native.sampling import NativeSampling

Bytes = npt.NDArray[np.uint8]

Signatures = Mapping[str, tuple[Any, tuple[Any, ...]]]
"""Function -> type of its result, and of its arguments."""

ERROR_BYTES = 256
NO_WINDOW = 2**31 - 1


class LinearKind(IntEnum):
    """The products of a layer, and the head, which has no layer."""

    QKV = 0
    OUT = 1
    GATE_UP = 2
    DOWN = 3
    HEAD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a network and of how it is run; mirrors QuireShape."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    dim: int
    width: int
    block_size: int
    num_blocks: int
    max_rows: int
    hadamard: int
    qkv_bias: bool
    qk_norm: bool
    wide_cache: bool
    spreads: bool = False  # keys before they are rounded, by a Hadamard transform
    four_bit: bool = False  # matrices of the layers in blocks of 4 bits, not rotated
    threads: int
    compute_threads: int
    compute_rows: int
    norm_eps: float
    windows: Sequence[int]  # per layer
    has_rotary: Sequence[bool]  # per layer
    cosines: Floats  # [positions, D / 2]
    sines: Floats


_C_TYPES: dict[str, type[ctypes._SimpleCData[Any]]] = {
    "int": ctypes.c_int32,
    "bool": ctypes.c_int32,
    "float": ctypes.c_float,
}


class _Shape(ctypes.Structure):
    _fields_ = (
        *((field.name, _C_TYPES.get(str(field.type), ctypes.c_void_p)) for field in fields(Shape)),
        ("max_positions", ctypes.c_int32),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "sequences", "table_width", "outputs")),
        ("head_later", ctypes.c_int32),
        ("keeps_rows", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("tokens", "positions", "query_starts")),
        *((name, ctypes.c_void_p) for name in ("block_table", "output_rows", "logits", "argmax")),
        ("sampling", ctypes.c_void_p),
        ("adapters", ctypes.c_void_p),
    )


class NativeLibrary:
    """A loaded library. Raises NativeUnavailable if the file cannot be loaded."""

    def __init__(self, path: Path | None = None) -> None:
        path = path or find_or_build()
        self.name = path.name  # holds a hash of the sources
        try:
            self.calls = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeUnavailable(f"the native library cannot be loaded: {error}") from error
        _declare(self.calls)

    @property
    def variants(self) -> list[str]:
        """Instruction sets that this machine can run, best first."""
        text = ctypes.create_string_buffer(ERROR_BYTES)
        self.calls.quire_variants(text, ERROR_BYTES)
        return text.value.decode().split()

    def block_bytes(self, shape: Shape) -> int:
        """KV memory of one block, all layers."""
        return int(self.calls.quire_block_bytes(ctypes.byref(_mirror(shape)[0])))

    def product(
        self, weight_NK: Floats, x_MK: Floats, *, variant: str, bias_N: Floats | None = None
    ) -> Floats:
        """Computes x W^T + bias in 8 bits, as the layers do; for tests."""
        y_MN = np.empty((len(x_MK), len(weight_NK)), np.float32)
        bias = None if bias_N is None else bias_N.ctypes.data
        outputs, inputs = weight_NK.shape
        failed = self.calls.quire_product(
            variant.encode(), weight_NK.ctypes.data, bias, outputs, inputs, x_MK.ctypes.data,
            len(x_MK), y_MN.ctypes.data,
        )  # fmt: skip
        if failed:
            raise NativeUnavailable(f"this machine cannot run the variant {variant}")
        return y_MN

    def sample(
        self,
        logits_RV: Floats,
        sampling: SamplingBatch,
        *,
        variant: str,
        given_R: Ints | None = None,
    ) -> NativeSampling:
        """Samples from given logits as a step does; for tests. The logits are overwritten."""
        rows, vocab_size = logits_RV.shape
        found = NativeSampling.of(sampling, vocab_size=vocab_size, given_R=given_R)
        failed = self.calls.quire_sample(
            variant.encode(),
            logits_RV.ctypes.data,
            rows,
            vocab_size,
            ctypes.addressof(found.structure),
        )
        if failed:
            raise ValueError("this sampling is invalid" if failed == 2 else "no such variant")
        return found

    def weigh(self, x: Floats, *, variant: str) -> npt.NDArray[np.int64]:
        """floor(2**40 exp(x)) of numbers that are not positive; for tests."""
        weights = np.empty(len(x), np.int64)
        self.calls.quire_weigh(variant.encode(), x.ctypes.data, len(x), weights.ctypes.data)
        return weights

    def partition(
        self, x: Floats, *, temperature: float, bound: float, variant: str
    ) -> tuple[Ints, int, int]:
        """Places of numbers above a bound; what others weigh at least and at most; for tests."""
        places, bounds = np.empty(len(x) + 16, np.int32), np.empty(2, np.int64)
        found = self.calls.quire_partition(
            variant.encode(), x.ctypes.data, len(x), temperature, bound,
            places.ctypes.data, bounds.ctypes.data,
        )  # fmt: skip
        return places[:found], int(bounds[0]), int(bounds[1])

    def block_product(
        self, blocks_NB: Bytes, x_MK: Floats, *, variant: str, bias_N: Floats | None = None
    ) -> Floats:
        """Computes x W^T + bias with W in blocks of 4 bits, as the layers do; for tests."""
        y_MN = np.empty((len(x_MK), len(blocks_NB)), np.float32)
        bias = None if bias_N is None else bias_N.ctypes.data
        failed = self.calls.quire_block_product(
            variant.encode(), blocks_NB.ctypes.data, bias, len(blocks_NB), x_MK.shape[1],
            x_MK.ctypes.data, len(x_MK), y_MN.ctypes.data,
        )  # fmt: skip
        if failed:
            raise NativeUnavailable(f"this machine cannot run the variant {variant}")
        return y_MN


class NativeStep:
    """The structure of one step, and the arrays that it points to.

    Runs the layers over T rows, the head over R of them, which yield `tokens_R`: the argmax, or
    what `sampling` chooses. `logits`: for rows of R that take the argmax, where their V logits go:
    rows of a `logits_room`.
    T = 0 runs the head alone, over rows of the step before: those that went through the head, or
    will with `head_later`, or, if it `keeps_rows`, any.
    """

    def __init__(  # noqa: PLR0913  # the fields of a structure
        self, *, tokens_T: Ints, positions_T: Ints, query_starts_S1: Ints, block_table_SB: Ints,
        output_rows_R: Ints, logits: Mapping[int, Floats] | None = None,
        sampling: NativeSampling | None = None, head_later: bool = False,
        keeps_rows: bool = False, adapters_S: Ints | None = None,
    ) -> None:  # fmt: skip
        tokens_R = np.empty(len(output_rows_R), np.int32) if sampling is None else sampling.tokens_R
        arrays = (tokens_T, positions_T, query_starts_S1, block_table_SB, output_rows_R)
        places = np.zeros(len(output_rows_R), np.uintp)
        for row, logits_V in (logits or {}).items():
            places[row] = logits_V.ctypes.data
        pointed: list[npt.NDArray[Any]] = [np.ascontiguousarray(a, np.int32) for a in arrays]
        pointed += [places, tokens_R]
        adapters = None if adapters_S is None else np.ascontiguousarray(adapters_S, np.int32)
        self.tokens_R = tokens_R
        self._structure = _Step(
            len(tokens_T), len(query_starts_S1) - 1, block_table_SB.shape[1], len(output_rows_R),
            head_later, keeps_rows, *(array.ctypes.data for array in pointed),
            None if sampling is None else ctypes.addressof(sampling.structure),
            None if adapters is None else adapters.ctypes.data,
        )  # fmt: skip
        self.pointer = ctypes.byref(self._structure)
        self._pointed = pointed, sampling, adapters


class NativeModel:
    """One network inside the library: weights, KV pool, threads."""

    def __init__(self, library: NativeLibrary, shape: Shape, *, variant: str = "") -> None:
        self.shape = shape
        self.library_name = library.name
        self._calls = library.calls
        mirrored, _kept = _mirror(shape)
        self._error = ctypes.create_string_buffer(ERROR_BYTES)
        self._seconds = ctypes.c_double()
        self._handle: int | None = self._calls.quire_create(
            ctypes.byref(mirrored), variant.encode(), self._error, ERROR_BYTES
        )
        if not self._handle:
            raise NativeUnavailable(f"{variant or 'native'}: {self._error.value.decode()}")

    @property
    def variant(self) -> str:
        """The instruction set in use."""
        name: bytes = self._calls.quire_variant(self._handle)
        return name.decode()

    def rotate(
        self, matrix: Floats, *, axis: int, power: int, odd: int = 1,
        signs: Floats | None = None, mix: Floats | None = None,
    ) -> None:  # fmt: skip
        """Rotates blocks of power * odd along an axis, in place; see quantize.Rotation."""
        rows, columns = matrix.shape
        self._calls.quire_rotate(
            self._handle, matrix.ctypes.data, rows, columns, axis, power, odd,
            None if signs is None else signs.ctypes.data,
            None if mix is None else mix.ctypes.data,
        )  # fmt: skip

    def load_linear(
        self, kind: LinearKind, weight_NK: Floats, *, layer: int = 0, bias_N: Floats | None = None
    ) -> None:
        """Quantises and packs a matrix [out, in]."""
        bias = None if bias_N is None else bias_N.ctypes.data
        self._calls.quire_load_linear(self._handle, layer, kind, weight_NK.ctypes.data, bias)

    def load_blocks(
        self, kind: LinearKind, blocks_NB: Bytes, *, layer: int, bias_N: Floats | None = None
    ) -> None:
        """Packs a matrix in blocks of 4 bits, [out, in / 32 * 20]; not for the head."""
        bias = None if bias_N is None else bias_N.ctypes.data
        self._calls.quire_load_blocks(self._handle, layer, kind, blocks_NB.ctypes.data, bias)

    def load_norms(self, layer: int, attention_C: Floats, mlp_C: Floats) -> None:
        """Stores the weights of a layer's norms, which are part of no 4-bit matrix."""
        self._calls.quire_load_norms(
            self._handle, layer, attention_C.ctypes.data, mlp_C.ctypes.data
        )

    def load_rotation(self, *, signs: Floats, mix: Floats) -> None:
        """Stores the rotation of the head's inputs; see quantize.Rotation."""
        self._calls.quire_load_rotation(self._handle, signs.ctypes.data, mix.ctypes.data)

    def load_embedding(self, first: int, rows_NC: Floats) -> None:
        """Stores some rows of the embedding, from `first` on."""
        self._calls.quire_load_embedding(self._handle, first, len(rows_NC), rows_NC.ctypes.data)

    def load_head_norms(self, layer: int, query_D: Floats, key_D: Floats) -> None:
        """Stores the weights of the norms of queries and keys."""
        self._calls.quire_load_head_norms(
            self._handle, layer, query_D.ctypes.data, key_D.ctypes.data
        )

    def load_adapter(
        self, number: int, kind: LinearKind, a_KR: Floats, b_NK: Floats, *, layer: int
    ) -> None:
        """Stores what an adapter, from 1, adds to a matrix [out, in]: b [out, rank] a [rank, in].

        Raises ValueError if the rank is too large.
        """
        a, b = (np.ascontiguousarray(array, np.float32) for array in (a_KR, b_NK))
        if self._calls.quire_load_adapter(
            self._handle, number - 1, layer, kind, len(a), a.ctypes.data, b.ctypes.data,
            self._error, ERROR_BYTES,
        ):  # fmt: skip
            raise ValueError(self._error.value.decode())

    def weights(self) -> list[Bytes]:
        """The memory of all loaded weights, to be stored or written back. Not valid after `close`.

        Equal shapes of one library and variant have ranges of equal sizes and meaning.
        """
        start, size = ctypes.c_void_p(), ctypes.c_size_t()
        found: list[Bytes] = []
        while self._calls.quire_weights(
            self._handle, len(found), ctypes.byref(start), ctypes.byref(size)
        ):
            memory = (ctypes.c_uint8 * size.value).from_address(start.value or 0)
            found.append(np.ctypeslib.as_array(memory))
        return found

    def step(self, step: NativeStep) -> Ints:
        """Computes a step; returns its `tokens_R`. Raises ValueError for one that does not fit the
        model, or while launched steps are not collected.
        """
        self._check(self._calls.quire_step, step.pointer)
        return step.tokens_R

    def launch(self, step: NativeStep, *, unread_T: Ints | None = None) -> None:
        """Starts a step, which is computed after those launched before, and returns at once.

        `unread_T`: of tokens that are not known yet, their places in the `tokens_R` of the last
        step launched before that chose any; of others -1. The caller keeps the step and `unread_T`
        until `collect` returns its tokens. Raises ValueError for one that does not fit the model.
        """
        unread = None if unread_T is None else unread_T.ctypes.data
        self._check(self._calls.quire_launch, step.pointer, unread)

    def collect(self) -> float:
        """Waits for the oldest step that was launched; returns the seconds that it took. Raises
        ValueError if it failed.
        """
        self._check(self._calls.quire_collect, ctypes.byref(self._seconds))
        return self._seconds.value

    def _check(self, function: Callable[..., int], *arguments: object) -> None:
        if function(self._handle, *arguments, self._error, ERROR_BYTES):
            raise ValueError(self._error.value.decode())

    def close(self) -> None:
        """Ends the threads and frees the memory. May be called again."""
        if self._handle:
            self._calls.quire_destroy(self._handle)
        self._handle = None


def _mirror(shape: Shape) -> tuple[_Shape, list[npt.NDArray[Any]]]:
    """The C structure, and the arrays it points to, which must outlive its use."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "windows": np.array(shape.windows, np.int32),
        "has_rotary": np.array(shape.has_rotary, np.uint8),
        "cosines": np.ascontiguousarray(shape.cosines, np.float32),
        "sines": np.ascontiguousarray(shape.sines, np.float32),
    }
    values = {field.name: getattr(shape, field.name) for field in fields(shape)}
    values |= {name: array.ctypes.data for name, array in arrays.items()}
    return _Shape(**values, max_positions=len(shape.cosines)), list(arrays.values())


def declare(calls: ctypes.CDLL, signatures: Signatures) -> None:
    """Declares types of results and arguments; ctypes would truncate pointers to ints."""
    for name, (result, arguments) in signatures.items():
        function = getattr(calls, name)
        function.restype, function.argtypes = result, arguments


def _declare(calls: ctypes.CDLL) -> None:
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    i32, i64, f32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_float
    signatures: Signatures = {
        "quire_variants": (None, (text, size)),
        "quire_block_bytes": (size, (pointer,)),
        "quire_create": (pointer, (pointer, text, text, size)),
        "quire_destroy": (None, (pointer,)),
        "quire_variant": (text, (pointer,)),
        "quire_rotate": (None, (pointer, pointer, i64, i64, i32, i32, i32, pointer, pointer)),
        "quire_load_linear": (None, (pointer, i32, i32, pointer, pointer)),
        "quire_load_blocks": (None, (pointer, i32, i32, pointer, pointer)),
        "quire_load_norms": (None, (pointer, i32, pointer, pointer)),
        "quire_load_rotation": (None, (pointer, pointer, pointer)),
        "quire_load_embedding": (None, (pointer, i32, i32, pointer)),
        "quire_load_head_norms": (None, (pointer, i32, pointer, pointer)),
        "quire_load_adapter": (
            i32,
            (pointer, i32, i32, i32, i32, pointer, pointer, text, size),
        ),
        "quire_weights": (i32, (pointer, i32, pointer, pointer)),
        "quire_step": (i32, (pointer, pointer, text, size)),
        "quire_launch": (i32, (pointer, pointer, pointer, text, size)),
        "quire_collect": (i32, (pointer, pointer, text, size)),
        "quire_product": (i32, (text, pointer, pointer, i32, i32, pointer, i32, pointer)),
        "quire_sample": (i32, (text, pointer, i32, i32, pointer)),
        "quire_weigh": (i32, (text, pointer, i32, pointer)),
        "quire_partition": (i32, (text, pointer, i32, f32, f32, pointer, pointer)),
        "quire_block_product": (i32, (text, pointer, pointer, i32, i32, pointer, i32, pointer)),
        "quire_probe_memory": (ctypes.c_double, (i32, i64, i32)),
        "quire_probe_products": (ctypes.c_double, (text, i32, i32)),
    }
    declare(calls, signatures)
