"""The roof: the fastest that this machine could compute the 8-bit products of a step.

    time of a step >= max(bytes read / memory bandwidth, products / products per second)

The native library probes both rates during the measurements because a machine's speed changes; it
probes with one thread and with all, and the better result counts. The probes are not the engine's
own loops: one reads memory, one runs the instructions of a product on registers alone. Loads,
attention, norms, sampling and HTTP come on top, so no server reaches the roof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.config import ModelConfig
from model.native import NativeUnavailable
from model.native.library import NativeLibrary

_PROBED_BYTES = 2**28  # far more than the caches hold
_REPEATS = 5


class NoRoof(Exception):
    """The machine cannot be probed; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Numbers of weights in the matrices of all layers and of the head, which has 8 bits."""

    layers: int
    head: int
    layer_bytes: float = 1.0  # per weight of the layers; a block of 4 bits: 20 for 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """Probed rates."""

    variant: str
    bytes_a_second: float
    products_a_second: float

    def decode(self, weights: Weights, *, rows: int) -> float:
        """Upper bound of tokens per second for steps of `rows` tokens."""
        return rows / self.seconds(weights, rows=rows, outputs=rows)

    def prefill(self, weights: Weights, *, tokens: int) -> float:
        """Upper bound of prompt tokens per second; the head computes the last token only."""
        return tokens / self.seconds(weights, rows=tokens, outputs=1)

    def seconds(self, weights: Weights, *, rows: int, outputs: int, kv_bytes: int = 0) -> float:
        """Lower bound of a step that computes `rows` tokens and reads `kv_bytes` of the KV pool."""
        products = weights.layers * rows + weights.head * outputs
        read = weights.layers * weights.layer_bytes + weights.head + kv_bytes
        return max(read / self.bytes_a_second, products / self.products_a_second)


def count_weights(config: ModelConfig) -> Weights:
    """Of a model. An embedding is read by rows; it counts only if it is the head too."""
    attention = config.query_size * 2 + config.kv_size * 2
    mlp = config.intermediate_size * (3 if config.gated_mlp else 2)
    return Weights(
        layers=config.num_layers * config.hidden_size * (attention + mlp),
        head=config.vocab_size * config.hidden_size,
    )


def probe(*, threads: Sequence[int], variant: str = "") -> Roof:
    """Takes about a second. Raises NoRoof if the native library is unavailable.

    `variant`: of the native code; empty: the fastest one.
    """
    try:
        library = NativeLibrary()
    except NativeUnavailable as unavailable:
        raise NoRoof(str(unavailable)) from unavailable
    calls, variant = library.calls, variant or library.variants[0]
    return Roof(
        variant=variant,
        bytes_a_second=max(
            calls.quire_probe_memory(count, _PROBED_BYTES, _REPEATS) for count in threads
        ),
        products_a_second=max(
            calls.quire_probe_products(variant.encode(), count, _REPEATS) for count in threads
        ),
    )
