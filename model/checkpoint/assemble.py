"""Renames, splits, fuses and transposes a checkpoint's tensors into the network's. Strict.

Every tensor that the configuration calls for must be there, in its shape, and no other: all of it
is checked before any data is read. Knows no file format. Torch-free.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from model.checkpoint import Checkpoint, CheckpointError, Layout
from model.config import Classifier, ModelConfig, Norm, Position
from model.weights import Array

if TYPE_CHECKING:
    from model.families import Family

Shape = tuple[int, ...]

_LAYER = re.compile(r"(?<![^.])(0|[1-9]\d{0,5})(?=\.)")  # the first whole number between dots
_SHOWN = 5  # names in an error message


class AssembledWeights(Mapping[str, Array]):
    """The network's tensors by canonical name. Each access reads anew, so nothing is kept.

    Arrays may be read-only views of a mapped file. May be used by several threads.
    """

    def __init__(self, family: Family, config: ModelConfig, *, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError if a tensor is missing, unexpected or of a wrong shape."""
        if config.num_layers > len(checkpoint.names()):
            raise CheckpointError("more layers than tensors")
        self._checkpoint = checkpoint
        self._layout = checkpoint.layout(family)
        self._fused = dict(fused_parts(config))
        shapes = {part: shape for parts in self._fused.values() for part, shape in parts.items()}
        self._rows = {part: shape[0] for part, shape in shapes.items()}
        self._sources = _sources(checkpoint, self._layout, config)
        _check(checkpoint, self._layout, sources=self._sources, shapes=shapes)
        self._source_of = {part: name for name, parts in self._sources.items() for part in parts}

    def __getitem__(self, name: str) -> Array:
        parts = self._fused[name]
        found: dict[str, Array] = {}
        for source in {self._source_of[part]: None for part in parts}:
            found |= self._read(source)
        pieces = [found[part] for part in parts]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._fused)

    def __len__(self) -> int:
        return len(self._fused)

    def _read(self, source: str) -> dict[str, Array]:
        """The parts of a stored tensor."""
        array = self._checkpoint.load(source)
        if _is_transposed(self._layout, source):
            array = np.ascontiguousarray(array.T)
        parts = self._sources[source]
        ends = np.cumsum([self._rows[part] for part in parts])
        return dict(zip(parts, np.split(array, ends[:-1]), strict=True))


def _sources(
    checkpoint: Checkpoint, layout: Layout, config: ModelConfig
) -> dict[str, tuple[str, ...]]:
    """Stored name -> the canonical parts it holds."""
    absent = {"head.": config.tied_head, "classifier.": config.classifier is None}
    unused = tuple(prefix for prefix, is_absent in absent.items() if is_absent)
    sources: dict[str, tuple[str, ...]] = {}
    unexpected = []
    for name in checkpoint.names():
        pattern, layer = _pattern(name)
        if pattern not in layout.names:
            unexpected.append(name)
            continue
        parts = layout.names[pattern]
        parts = (parts,) if isinstance(parts, str) else parts
        if parts is None or parts[0].startswith(unused):
            continue  # known and not needed; a tied head is stored twice by some
        sources[name] = tuple(part.replace("{i}", layer) for part in parts)
    if unexpected:
        raise CheckpointError(f"unexpected tensors: {_some(unexpected)}")
    return sources


def _check(
    checkpoint: Checkpoint,
    layout: Layout,
    *,
    sources: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, Shape],
) -> None:
    given = Counter(part for parts in sources.values() for part in parts)
    for what, names in (
        ("missing", shapes.keys() - given.keys()),
        ("unexpected", given.keys() - shapes.keys()),
        ("repeated", {part for part, times in given.items() if times > 1}),
    ):
        if names:
            raise CheckpointError(f"{what} tensors: {_some(sorted(names))}")
    wrong = []
    for name, parts in sources.items():
        rows = sum(shapes[part][0] for part in parts)
        expected: Shape = (rows, *shapes[parts[0]][1:])
        stored = checkpoint.shape(name)
        if (stored[::-1] if _is_transposed(layout, name) else stored) != expected:
            wrong.append(f"{name} {list(stored)}")
    if wrong:
        raise CheckpointError(f"tensors of the wrong shape: {_some(wrong)}")


def fused_parts(config: ModelConfig) -> Iterator[tuple[str, dict[str, Shape]]]:
    """The network's tensors, each with the parts it is made of, in order, and their shapes."""
    yield from _ends(config)
    if config.classifier is not None:
        yield from _classifier(config, config.classifier)
    for layer in range(config.num_layers):
        block = f"blocks.{layer}"
        if config.has_attention_norm(layer):
            yield from _norm(config, f"{block}.attention_norm")
        yield from _norm(config, f"{block}.mlp_norm")
        yield from _attention(config, f"{block}.attention")
        if config.encoder is not None:
            yield from _norm(config, f"{block}.cross_norm")
            yield from _attention(config, f"{block}.cross", projections=("q", "kv"))
        yield from _mlp(config, f"{block}.mlp")
    for fused, shapes in fused_parts(config.encoder) if config.encoder else ():
        # Encoder and decoder have one embedding.
        prefix = "" if fused == "embed.weight" else "encoder."
        yield f"encoder.{fused}", {f"{prefix}{part}": shape for part, shape in shapes.items()}


def _ends(config: ModelConfig) -> Iterator[tuple[str, dict[str, Shape]]]:
    """What stands before the blocks and behind them."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield _alone("embed.weight", (vocab, hidden))
    if config.position is Position.LEARNED:
        rows = config.max_model_len + config.position_offset
        yield _alone("position.weight", (rows, hidden))
    if config.position is Position.RELATIVE:
        yield _alone("distances.weight", (config.num_buckets, config.num_heads))
    if config.num_types:
        yield _alone("types.weight", (config.num_types, hidden))
    if config.embed_norm:
        yield from _norm(config, "embed_norm")
    if not config.tied_head:
        yield _alone("head.weight", (vocab, hidden))
    if config.head_bias:
        yield _alone("head_bias", (1, vocab))
    if config.final_norm:
        yield from _norm(config, "norm")


def _attention(
    config: ModelConfig, name: str, *, projections: tuple[str, ...] = ("qkv",)
) -> Iterator[tuple[str, dict[str, Shape]]]:
    """`projections`: matrices, each by the letters of its parts."""
    hidden = config.hidden_size
    rows = {"q": config.query_size, "k": config.kv_size, "v": config.kv_size}
    for letters in projections:
        kinds: dict[str, tuple[int, ...]] = {"weight": (hidden,)}
        if config.qkv_bias:
            kinds["bias"] = ()
        for kind, rest in kinds.items():
            parts: dict[str, Shape] = {f"{name}.{x}.{kind}": (rows[x], *rest) for x in letters}
            yield f"{name}.{letters}.{kind}", parts
    if config.qk_norm:
        yield _alone(f"{name}.q_norm.weight", (config.head_dim,))
        yield _alone(f"{name}.k_norm.weight", (config.head_dim,))
    yield _alone(f"{name}.out.weight", (hidden, config.query_size))
    if config.out_bias:
        yield _alone(f"{name}.out.bias", (hidden,))


def _mlp(config: ModelConfig, name: str) -> Iterator[tuple[str, dict[str, Shape]]]:
    width, hidden = config.intermediate_size, config.hidden_size
    kinds: dict[str, Shape] = {"weight": (width, hidden)}
    if config.mlp_bias:
        kinds["bias"] = (width,)
        yield _alone(f"{name}.down.bias", (hidden,))
    yield _alone(f"{name}.down.weight", (hidden, width))
    for kind, shape in kinds.items():
        if config.gated_mlp:
            yield (
                f"{name}.gate_up.{kind}",
                {f"{name}.{part}.{kind}": shape for part in ("gate", "up")},
            )
        else:
            yield _alone(f"{name}.up.{kind}", shape)


def _classifier(config: ModelConfig, head: Classifier) -> Iterator[tuple[str, dict[str, Shape]]]:
    hidden, labels = config.hidden_size, len(head.labels)
    if head.dense:
        yield _alone("classifier.dense.weight", (hidden, hidden))
        if head.bias:
            yield _alone("classifier.dense.bias", (hidden,))
    if head.norm:
        yield from _norm(config, "classifier.norm")
    yield _alone("classifier.out.weight", (labels, hidden))
    if head.out_bias:
        yield _alone("classifier.out.bias", (labels,))


def _norm(config: ModelConfig, name: str) -> Iterator[tuple[str, dict[str, Shape]]]:
    yield _alone(f"{name}.weight", (config.hidden_size,))
    if config.norm is Norm.LAYER and config.norm_bias:
        yield _alone(f"{name}.bias", (config.hidden_size,))


def _alone(name: str, shape: Shape) -> tuple[str, dict[str, Shape]]:
    return name, {name: shape}


def _pattern(name: str) -> tuple[str, str]:
    """A stored name with its layer's number as {i}, and the number."""
    match = _LAYER.search(name)
    if match is None:
        return name, ""
    return f"{name[: match.start()]}{{i}}{name[match.end() :]}", match[0]


def _is_transposed(layout: Layout, name: str) -> bool:
    return _pattern(name)[0] in layout.transposed


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
