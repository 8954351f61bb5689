"""The roof: how fast this machine could do the 8-bit products of a step, and nothing else.

    time of a step >= max(weights read / memory bandwidth, products / products a second)

Both rates are probed by the native library beside the measurements, because a machine's speed
changes; with one thread and with all, the better counts. Attention, norms, sampling, HTTP and
everything that is not a product come on top, so no server reaches the roof.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PROBED_BYTES = 2**28  # far more than the caches hold
_REPEATS = 5


class NoRoof(Exception):
    """The machine cannot be probed; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Numbers in the matrices of all layers, and of the head; each is a byte in 8 bits."""

    layers: int
    head: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """What was probed. The products are of numbers of rows at a time, as a step has them."""

    variant: str
    bytes_a_second: float
    products_a_second: Mapping[int, float]  # by rows

    def decode(self, weights: Weights, *, rows: int) -> float:
        """Tokens a second at most, of steps that compute `rows` tokens."""
        return rows / self._seconds(weights.layers, weights.head, rows, outputs=rows)

    def prefill(self, weights: Weights, *, tokens: int) -> float:
        """Prompt tokens a second at most; the head is for the last one only."""
        return tokens / self._seconds(weights.layers, weights.head, tokens, outputs=1)

    def _seconds(self, layers: int, head: int, rows: int, *, outputs: int) -> float:
        nearest = min(self.products_a_second, key=lambda probed: abs(probed - rows))
        products = layers * rows + head * outputs
        return max(
            (layers + head) / self.bytes_a_second, products / self.products_a_second[nearest]
        )


def count_weights(model: Path) -> Weights:
    """Of a GGUF file. An embedding is read by rows, and counts only where it is the head too."""
    import gguf

    sizes = {
        str(tensor.name): int(tensor.n_elements)
        for tensor in gguf.GGUFReader(model).tensors
        if len(tensor.shape) > 1
    }
    embedding = sizes.pop("token_embd.weight")
    head = sizes.pop("output.weight", embedding)
    return Weights(layers=sum(sizes.values()), head=head)


def probe(*, threads: Sequence[int], rows: Sequence[int]) -> Roof:
    """Takes about a second. Raises NoRoof where there is no native library."""
    try:
        from model.native import NativeUnavailable
        from model.native.library import NativeLibrary
    except ImportError as missing:
        raise NoRoof(str(missing)) from missing
    try:
        library = NativeLibrary()
    except NativeUnavailable as unavailable:
        raise NoRoof(str(unavailable)) from unavailable
    calls, variant = library.calls, library.variants[0]
    return Roof(
        variant=variant,
        bytes_a_second=max(
            calls.quire_probe_memory(count, _PROBED_BYTES, _REPEATS) for count in threads
        ),
        products_a_second={
            number: max(
                calls.quire_probe_products(variant.encode(), count, number, _REPEATS)
                for count in threads
            )
            for number in rows
        },
    )
