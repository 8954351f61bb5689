"""Sampling columns for the native library, and the tokens and log probabilities that come back.

Mirrors QuireSampling of src/quire.h. Shapes: `model.batch`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.batch import Floats, Ints, SamplingBatch
from model.runners.logprobs import NO_LOGPROBS, Logprobs

_COLUMNS = (
    ("seeds_R", np.uint64), ("choices_R", np.int32), ("indices_R", np.int32),
    ("temperatures_R", np.float32), ("top_ks_R", np.int32), ("top_ps_R", np.float32),
    ("min_ps_R", np.float32), ("presence_R", np.float32), ("frequency_R", np.float32),
    ("repetition_R", np.float32), ("wants_logprobs_R", np.bool_), ("penalty_rows_P", np.int32),
    ("penalty_ids_P", np.int32), ("penalty_counts_P", np.int32), ("bias_rows_E", np.int32),
    ("bias_ids_E", np.int32), ("bias_values_E", np.float32), ("mask_rows_M", np.int32),
    ("masks_MW", np.uint32),
)  # fmt: skip
_RESULTS = ("given", "tokens", "logprobs", "top_ids", "top_logprobs")
_LINE = 16  # floats of a cache line


def logits_room(rows: int, vocab_size: int) -> Floats:
    """Memory for the logits [R, V] of some rows, each from the beginning of a cache line.

    Their distance is an odd number of lines, so that they do not share few sets of the caches.
    """
    stride = (vocab_size // _LINE | 1) * _LINE + 2 * _LINE
    memory = np.empty(rows * stride + _LINE, np.float32)
    first = -(memory.ctypes.data // memory.itemsize) % _LINE
    return memory[first : first + rows * stride].reshape(rows, stride)[:, :vocab_size]


class _Sampling(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("penalties", "biases", "masks", "num_top")),
        *((name, ctypes.c_void_p) for name, _ in _COLUMNS),
        *((name, ctypes.c_void_p) for name in _RESULTS),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeSampling:
    """One call's structure, the arrays that it points to, and its results."""

    structure: ctypes.Structure
    tokens_R: Ints
    logprobs: Logprobs  # without rows if no row requests any
    pointed: list[npt.NDArray[Any]]

    @classmethod
    def of(
        cls, sampling: SamplingBatch, *, vocab_size: int, given_R: Ints | None = None
    ) -> NativeSampling:
        """`given_R`: tokens that are scored instead of chosen."""
        rows, num_top = len(sampling.seeds_R), min(sampling.num_top, vocab_size)
        tokens_R, logprobs = np.empty(rows, np.int32), NO_LOGPROBS
        if sampling.wants_logprobs_R.any():
            logprobs = Logprobs(
                np.zeros(rows, np.float32),
                np.zeros((rows, num_top), np.int32),
                np.zeros((rows, num_top), np.float32),
            )
        pointed = [np.ascontiguousarray(getattr(sampling, name), t) for name, t in _COLUMNS]
        given = None if given_R is None else np.ascontiguousarray(given_R, np.int32)
        structure = _Sampling(
            len(sampling.penalty_rows_P), len(sampling.bias_rows_E), len(sampling.mask_rows_M),
            num_top,
            *map(_address, pointed),
            None if given is None else _address(given),
            *map(_address, (tokens_R, *logprobs)),
        )  # fmt: skip
        return cls(
            structure=structure,
            tokens_R=tokens_R,
            logprobs=logprobs,
            pointed=pointed if given is None else [*pointed, given],
        )


def _address(array: npt.NDArray[Any]) -> int | None:
    """Which takes NumPy a microsecond; of an empty array none is needed."""
    return array.ctypes.data if array.size else None


def is_greedy(sampling: SamplingBatch) -> bool:
    """Whether each row takes the argmax of its unmodified logits, and nothing else is read."""
    adjusted = (sampling.penalty_rows_P, sampling.bias_rows_E, sampling.mask_rows_M)
    return not (
        sampling.temperatures_R.any()
        or sampling.wants_logprobs_R.any()
        or any(rows.size for rows in adjusted)
    )
