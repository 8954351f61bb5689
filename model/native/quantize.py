"""Canonical weights -> the 8-bit or 4-bit weights of the native step.

Plain 8-bit activations cost this kind of model several percent of perplexity, because a few
channels are much larger than the rest. As in QuaRot (Ashkboos et al., arXiv 2404.00456), orthogonal
matrices that spread these outliers are folded into the weights; in exact arithmetic they change
nothing:

    R  rotates the residual stream: embedding and head inputs, inputs of qkv and gate_up, outputs of
       out and down. The weights of the norms are folded into the next product first, because a
       rotated vector can be normalised, but not scaled channel by channel.
    H  rotates each V head, in the V rows of qkv and the inputs of out.
    H' rotates blocks of the input of down; the step itself applies it before the product.

    R = (mix (x) Hadamard) diag(signs): see Rotation. The head is then another matrix than the
    embedding, even if the checkpoint ties them.

Layers in 4 bits keep the file's own blocks, which cannot be rotated: quantising them again costs
far more than it saves. A scale per 32 activations keeps outliers apart instead. The head still has
8 bits and is rotated; the step rotates its inputs.

The library computes all of this, in a fixed order, so that every machine makes equal weights.
Random numbers come from Python's generator with a fixed seed: a rotation is part of the kernel
version, which the numeric class names.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from model.adapters import Adapter, Factors
from model.batch import Floats
from model.config import ModelConfig
from model.native.library import LinearKind, NativeModel
from model.rope import scaled
from model.weights import Arrays, Weights, float_copy

_SEED = 20240400456
_LARGEST_BLOCK = 512  # of the transform at run time
_PRODUCTS = {
    "attention.qkv": (LinearKind.QKV, "attention_norm"),
    "attention.out": (LinearKind.OUT, None),
    "mlp.gate_up": (LinearKind.GATE_UP, "mlp_norm"),
    "mlp.down": (LinearKind.DOWN, None),
}
"""Name of a matrix in its layer -> its kind, and the norm of its input, which is folded into it."""
_EMBEDDING_ROWS = 4096  # rotated at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """y = (mix (x) H) diag(signs) x for vectors of power * odd; element o * power + p is (o, p)."""

    power: int  # H: the normalised Hadamard matrix of this size
    odd: int
    signs: Floats  # [power * odd], of 1 and -1
    mix: Floats  # [odd, odd], orthogonal


def power_of_two_in(size: int) -> int:
    """The largest power of two that divides `size`."""
    return size & -size


def residual_rotation(size: int) -> Rotation:
    """R for a residual stream of this width; the same on every machine."""
    power = power_of_two_in(size)
    odd = size // power
    draw = random.Random(_SEED)
    signs = np.array([draw.choice((-1.0, 1.0)) for _ in range(size)], np.float32)
    mix = np.array(_orthogonal(odd, draw), np.float32)
    return Rotation(power=power, odd=odd, signs=signs, mix=mix)


def hadamard_block(width: int) -> int:
    """The block of H' for an MLP of this width."""
    return min(power_of_two_in(width), _LARGEST_BLOCK)


def load(model: NativeModel, config: ModelConfig, weights: Weights | Arrays) -> None:
    """Folds, rotates, quantises and packs all weights, in memory for a few tensors at a time.

    `weights` itself is not modified. Raises ValueError for weights that do not fit the dtype.
    """
    kind = _FourBitLoader if model.shape.four_bit else _Loader
    kind(model, config, weights).run()


def load_adapters(
    model: NativeModel,
    config: ModelConfig,
    weights: Weights | Arrays,
    adapters: Sequence[Adapter],
) -> None:
    """Folds and rotates the products of adapters as the weights beside which they stand.

    Raises ValueError for a rank that is too large.
    """
    kind = _FourBitLoader if model.shape.four_bit else _Loader
    loader = kind(model, config, weights)
    for number, adapter in enumerate(adapters, start=1):
        for name, factors in adapter.factors.items():
            loader.adapt(number, name, factors)


def rotary_tables(config: ModelConfig, positions: int) -> tuple[Floats, Floats]:
    """Cosines and sines, [positions, D / 2]; in double precision, equal on every machine."""
    size = config.head_dim
    frequencies = np.array([config.rope_theta ** (-i / size) for i in range(0, size, 2)])
    if config.rope_scaling:
        frequencies = scaled(frequencies, config.rope_scaling)
    # The angle itself is rounded to float32, as it was when the model was trained.
    places = np.arange(positions, dtype=np.float32)[:, None]
    angles = (places * frequencies.astype(np.float32)).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


class _Loader:
    def __init__(self, model: NativeModel, config: ModelConfig, weights: Weights | Arrays) -> None:
        self._model, self._config, self._weights = model, config, weights
        self._residual = residual_rotation(config.hidden_size)

    def run(self) -> None:
        starts = range(0, self._config.vocab_size, _EMBEDDING_ROWS)
        embedding = self._take("embed.weight")
        with ThreadPoolExecutor(max_workers=self._model.shape.threads) as pool:
            parts = [pool.submit(self._embedding, embedding, start) for start in starts]
            done = [*parts, pool.submit(self._head, embedding, parts)]
            del embedding
            done += [pool.submit(self._layer, i) for i in range(self._config.num_layers)]
            for future in done:
                future.result()

    def _embedding(self, embedding: Floats, start: int) -> None:
        rows = embedding[start : start + _EMBEDDING_ROWS].copy()
        self._rotate(rows, axis=1)
        self._model.load_embedding(start, rows)

    def _head(self, embedding: Floats, readers: list[Future[None]]) -> None:
        """`readers` of the embedding came before: a tied head is made in its place."""
        wait(readers)
        matrix = embedding if self._config.tied_head else self._take("head.weight")
        matrix *= self._take("norm.weight")
        self._rotate(matrix, axis=1)
        self._model.load_linear(LinearKind.HEAD, matrix)

    def _layer(self, layer: int) -> None:
        prefix = f"blocks.{layer}."
        self._qkv(layer, prefix)
        self._out(layer, prefix)
        gate_up = self._take(prefix + "mlp.gate_up.weight")
        gate_up *= self._take(prefix + "mlp_norm.weight")
        self._rotate(gate_up, axis=1)
        self._model.load_linear(LinearKind.GATE_UP, gate_up, layer=layer)
        down = self._take(prefix + "mlp.down.weight")
        self._rotate(down, axis=0)
        self._model.rotate(down, axis=1, power=hadamard_block(self._config.intermediate_size))
        self._model.load_linear(LinearKind.DOWN, down, layer=layer)

    def _qkv(self, layer: int, prefix: str) -> None:
        config, bias = self._config, None
        matrix = self._take(prefix + "attention.qkv.weight")
        matrix *= self._take(prefix + "attention_norm.weight")
        self._rotate(matrix, axis=1)
        values = slice(config.query_size + config.kv_size, None)
        if self._rotates_values:
            self._model.rotate(matrix[values], axis=0, power=config.head_dim)
        if config.qkv_bias:
            bias = self._take(prefix + "attention.qkv.bias")
            if self._rotates_values:
                self._model.rotate(bias[values, None], axis=0, power=config.head_dim)
        self._model.load_linear(LinearKind.QKV, matrix, layer=layer, bias_N=bias)
        self._head_norms(layer, prefix)

    def _head_norms(self, layer: int, prefix: str) -> None:
        if self._config.qk_norm:
            names = (prefix + "attention.q_norm.weight", prefix + "attention.k_norm.weight")
            self._model.load_head_norms(layer, *map(self._take, names))

    def _out(self, layer: int, prefix: str) -> None:
        matrix = self._take(prefix + "attention.out.weight")
        self._rotate(matrix, axis=0)
        if self._rotates_values:
            self._model.rotate(matrix, axis=1, power=self._config.head_dim)
        self._model.load_linear(LinearKind.OUT, matrix, layer=layer)

    def adapt(self, number: int, name: str, factors: Factors) -> None:
        """Loads what an adapter, from 1, adds to a matrix of the network."""
        _, layer, suffix = name.removesuffix(".weight").split(".", 2)
        kind, norm = _PRODUCTS[suffix]
        a, b = factors.a.copy(), factors.b.copy()
        if norm is not None:
            a *= self._take(f"blocks.{layer}.{norm}.weight")
        self._rotate_factors(kind, a, b)
        self._model.load_adapter(number, kind, a, b, layer=int(layer))

    def _rotate_factors(self, kind: LinearKind, a: Floats, b: Floats) -> None:
        """As the matrices of this kind: a its inputs, b its outputs."""
        config, rotate = self._config, self._model.rotate
        if kind in (LinearKind.QKV, LinearKind.GATE_UP):
            self._rotate(a, axis=1)
        else:
            self._rotate(b, axis=0)
        if kind is LinearKind.QKV and self._rotates_values:
            rotate(b[config.query_size + config.kv_size :], axis=0, power=config.head_dim)
        elif kind is LinearKind.OUT and self._rotates_values:
            rotate(a, axis=1, power=config.head_dim)
        elif kind is LinearKind.DOWN:
            rotate(a, axis=1, power=hadamard_block(config.intermediate_size))

    @property
    def _rotates_values(self) -> bool:
        return power_of_two_in(self._config.head_dim) == self._config.head_dim

    def _rotate(self, matrix: Floats, *, axis: int) -> None:
        """Rotates the axis that is the residual stream."""
        r = self._residual
        mix = r.mix if r.odd > 1 else None
        self._model.rotate(matrix, axis=axis, power=r.power, odd=r.odd, signs=r.signs, mix=mix)

    def _take(self, name: str) -> Floats:
        array = self._weights[name]
        _check_dtype(array.dtype, four_bit=False)
        return float_copy(array)


class _FourBitLoader(_Loader):
    """Layers in blocks of 4 bits, and nothing rotated but the head."""

    def _rotate_factors(self, kind: LinearKind, a: Floats, b: Floats) -> None:
        pass

    def _embedding(self, embedding: Floats, start: int) -> None:
        self._model.load_embedding(start, embedding[start : start + _EMBEDDING_ROWS])

    def _head(self, embedding: Floats, readers: list[Future[None]]) -> None:
        self._model.load_rotation(signs=self._residual.signs, mix=self._residual.mix)
        super()._head(embedding, readers)

    def _layer(self, layer: int) -> None:
        prefix = f"blocks.{layer}."
        bias = self._take(prefix + "attention.qkv.bias") if self._config.qkv_bias else None
        for kind, name in (
            (LinearKind.QKV, "attention.qkv.weight"),
            (LinearKind.OUT, "attention.out.weight"),
            (LinearKind.GATE_UP, "mlp.gate_up.weight"),
            (LinearKind.DOWN, "mlp.down.weight"),
        ):
            array = self._weights[prefix + name]
            _check_dtype(array.dtype, four_bit=True)
            blocks_NB = np.ascontiguousarray(array, np.uint8)
            self._model.load_blocks(
                kind, blocks_NB, layer=layer, bias_N=bias if kind is LinearKind.QKV else None
            )
        names = (prefix + "attention_norm.weight", prefix + "mlp_norm.weight")
        self._model.load_norms(layer, *map(self._take, names))
        self._head_norms(layer, prefix)


def _check_dtype(dtype: object, *, four_bit: bool) -> None:
    """Blocks of 4 bits are uint8, of NumPy or torch, and nothing else is."""
    if str(dtype).endswith("uint8") != four_bit:
        raise ValueError("dtype int4, and no other one, needs weights in blocks of 4 bits")


def _orthogonal(size: int, draw: random.Random) -> list[list[float]]:
    """A random orthogonal matrix: reflections of the unit matrix, in plain double arithmetic."""
    matrix = [[float(row == column) for column in range(size)] for row in range(size)]
    for _ in range(size if size > 1 else 0):
        normal = [draw.uniform(-1.0, 1.0) for _ in range(size)]
        length = math.sqrt(math.fsum(x * x for x in normal))
        unit = [x / length for x in normal]
        for row in matrix:
            along = 2.0 * math.fsum(x * y for x, y in zip(row, unit, strict=True))
            row[:] = [x - along * y for x, y in zip(row, unit, strict=True)]
    return matrix
