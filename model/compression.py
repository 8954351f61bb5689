"""Compression of the KV cache: which keys a token sees, a function of the text alone. Torch-free.

`window:<n>` (StreamingLLM, arXiv 2309.17453): a token sees the first `SINKS` tokens of the text and
the last n, itself included. A mask over absolute positions, so prompts and answers, chunks, batches
and recomputation agree. Keys are stored with their absolute rotary position. A query meets the
window at its own position, and the sinks at the position that it has in StreamingLLM's cache:
distances never exceed n + SINKS - 1, and a text may be longer than the model was trained for.

`anchors` (AnLLM, arXiv 2402.07616): a segment ends with an anchor, the token of a sentence's end. A
token sees its own segment and the anchors of earlier ones; an anchor sees its segment alone. So of
a finished segment only the anchor's keys and values are kept. Positions are absolute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from model.config import ModelConfig, Position

NO_COMPRESSION = "none"
SINKS = 4  # tokens, as in the paper
MAX_STREAM = 2**17  # tokens of a text under a window: float32 still has its angles to 0.01 rad


@dataclass(frozen=True, slots=True)
class Window:
    """Sinks and a window of `size` tokens."""

    size: int

    @property
    def span(self) -> int:
        """Tokens that a query sees at most."""
        return SINKS + self.size

    @property
    def name(self) -> str:
        """Its part of the numeric class."""
        return f"window{self.size}"

    def most_slots(self, num_slots: int, *, block_size: int, chunk: int) -> int:
        """KV slots that a text of `num_slots` tokens holds at most, with steps of at most `chunk`:
        the sinks' last block and the window's first one may be partly used.
        """
        sinks = -(-SINKS // block_size) * block_size
        return min(num_slots, sinks + self.size + chunk + 2 * block_size)

    def longest_text(self, slots: int, *, block_size: int, chunk: int) -> int | None:
        """Tokens of a text for which so many slots are enough; None: of any."""
        most = self.most_slots(MAX_STREAM, block_size=block_size, chunk=chunk)
        return slots if most > slots else None

    def first(self, position: int) -> int:
        """The oldest position in the window of a query."""
        return max(0, position - self.size + 1)


@dataclass(frozen=True, slots=True)
class Anchors:
    """The anchors of finished segments, and the segment that is not finished."""

    name = "anchors1"  # 1: the rule of `model.segments.anchor_ids`

    def most_slots(self, num_slots: int, *, block_size: int, chunk: int) -> int:
        """KV slots that a text of `num_slots` tokens holds at most: without any anchor all of them,
        and those of a step's anchors twice until it ends, in partly used blocks.
        """
        return num_slots + chunk + 3 * block_size

    def longest_text(self, slots: int, *, block_size: int, chunk: int) -> int | None:
        """Tokens of a text for which so many slots are enough."""
        return slots - (chunk + 3 * block_size)


Compression = Window | Anchors


def parse_compression(text: str) -> Compression | None:
    """None for `none`. Raises ValueError for an unknown policy."""
    if text == NO_COMPRESSION:
        return None
    if text == "anchors":
        return Anchors()
    kind, _, size = text.partition(":")
    if kind != "window" or not size.isascii() or not size.isdigit():
        raise ValueError(
            "kv_compression must be none, window:<tokens> (such as window:1024), or anchors"
        )
    if not 1 <= int(size) <= MAX_STREAM - SINKS:
        raise ValueError(f"the window of kv_compression must be from 1 to {MAX_STREAM - SINKS}")
    return Window(int(size))


def compressed_config(config: ModelConfig, compression: Compression | None) -> ModelConfig:
    """The model as it is served: under a window, its context is no longer the trained one.

    Raises ValueError for a model that cannot be compressed.
    """
    if compression is None:
        return config
    if config.bidirectional or config.sliding_window is not None:
        raise ValueError("kv_compression is for decoders without a sliding window of their own")
    if isinstance(compression, Anchors):
        return config
    if config.position is not Position.ROTARY or config.rope_free_layers:
        raise ValueError("a window as kv_compression needs rotary positions in every layer")
    if compression.span > config.max_model_len:
        raise ValueError(
            f"the window of kv_compression must be at most {config.max_model_len - SINKS}: "
            "with the sinks it must fit the model's context"
        )
    return replace(config, max_model_len=max(config.max_model_len, MAX_STREAM))


def check_compression(text: str, *, runner: str, num_ranks: int = 1) -> None:
    """Raises ValueError if a runner does not have the policy."""
    if parse_compression(text) is None:
        return
    if runner not in ("auto", "torch"):
        raise ValueError(f"kv_compression needs the torch runner, not {runner}")
    if num_ranks > 1:
        raise ValueError("kv_compression does not support tensor parallelism")
