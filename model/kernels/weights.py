"""Integer weights of tokens, and the point that a row draws among them.

A token weighs floor(2**40 · exp((logit - largest) / temperature)), so that sums are exact in any
order, as in `model.sampler`. `entry`: a batch slot's row of the state (`model.kernels.inputs`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.inputs import CHOICE, INDEX, MIN_P, SEED_HIGH, SEED_LOW

_ONE = tl.constexpr(2.0**40)  # weight of the largest logit, as in `model.sampler`


@triton.jit
def weigh(logits, largest, temperature, least):
    """Integer weights; those under `least` (min-p's share of the largest) are 0."""
    scaled = tl.exp((logits - largest) / temperature) * _ONE
    weights = scaled.to(tl.int64)
    return tl.where(weights >= least, weights, 0)


@triton.jit
def least_weight(entry):
    """The weight below which min-p drops a token."""
    min_p = tl.load(entry + MIN_P).to(tl.float32, bitcast=True).to(tl.float64)
    return tl.math.ceil(min_p * _ONE).to(tl.int64)


@triton.jit
def uniform(entry):
    """A number in [0, 1) of 53 bits: Philox4x32-10, as in `model.philox`."""
    mask32 = tl.full((), 0xFFFFFFFF, tl.uint64)
    index = tl.load(entry + INDEX).to(tl.uint64) & mask32
    key0 = tl.load(entry + SEED_LOW).to(tl.uint64) & mask32
    key1 = tl.load(entry + SEED_HIGH).to(tl.uint64) & mask32
    c2 = tl.load(entry + CHOICE).to(tl.uint64) & mask32
    c0 = index
    c1 = tl.full((), 0, tl.uint64)
    c3 = tl.full((), 0, tl.uint64)
    for _ in range(10):
        product0 = c0 * tl.full((), 0xD2511F53, tl.uint64)
        product1 = c2 * tl.full((), 0xCD9E8D57, tl.uint64)
        c0 = (product1 >> 32) ^ c1 ^ key0
        c2 = (product0 >> 32) ^ c3 ^ key1
        c1 = product1 & mask32
        c3 = product0 & mask32
        key0 = (key0 + 0x9E3779B9) & mask32
        key1 = (key1 + 0xBB67AE85) & mask32
    high = (c0 >> 5).to(tl.float64)
    low = (c1 >> 6).to(tl.float64)
    return (high * 67108864.0 + low) * 1.1102230246251565e-16


@triton.jit
def point(mass, entry):
    """The drawn point of the mass: from 0 to mass - 1."""
    drawn = (mass.to(tl.float64) * uniform(entry)).to(tl.int64)
    return tl.minimum(drawn, mass - 1)
