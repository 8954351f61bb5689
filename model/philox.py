"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers", SC 2011).

A number is a function of its key and its counter and of nothing before it, so a second engine that
takes over in the middle of an answer draws what the first one would have drawn. Works on the host,
one lane per row, in NumPy. It is no cryptography, and it keeps no state.

    key      low and high half of the 64-bit seed
    counter  (index of the token, 0, choice, 0)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from model.batch import Ints, Seeds

_Words = npt.NDArray[np.uint64]  # 32-bit words, in 64 bits so that a product does not overflow

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))  # golden ratio, sqrt(3) - 1
_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter_4R: _Words, key_2R: _Words) -> _Words:
    """Four random 32-bit words a lane, from four counter words and two key words; [4, R]."""
    c0, c1, c2, c3 = counter_4R
    k0, k1 = key_2R
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (product1 >> _HALF) ^ c1 ^ k0, (product0 >> _HALF) ^ c3 ^ k1
        c1, c3 = product1 & _MASK, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return np.stack((c0, c1, c2, c3))


def uniforms(seeds_R: Seeds, choices_R: Ints, indices_R: Ints) -> npt.NDArray[np.float64]:
    """One number a row in [0, 1), with 53 random bits. Choices and indices are not negative."""
    zeros = np.zeros_like(seeds_R)
    counter = np.stack((indices_R.astype(np.uint64), zeros, choices_R.astype(np.uint64), zeros))
    words = philox4x32(counter, np.stack((seeds_R & _MASK, seeds_R >> _HALF)))
    high, low = words[0] >> np.uint64(5), words[1] >> np.uint64(6)  # 27 and 26 bits
    draws: npt.NDArray[np.float64] = (high * 2.0**26 + low) * 2.0**-53
    return draws
