"""Renames, splits, fuses and transposes a checkpoint's tensors into the network's. Strict.

Every tensor that the configuration calls for must be there, in its shape, and no other: all of it
is checked before any data is read. Knows no file format.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from model.checkpoint import Checkpoint, CheckpointError, Layout
from model.config import ModelConfig, Norm, Position

if TYPE_CHECKING:
    from model.families import Family

Shape = tuple[int, ...]

_LAYER = re.compile(r"(?<![^.])(0|[1-9]\d{0,5})(?=\.)")  # the first whole number between dots
_SHOWN = 5  # names in an error message


def assemble(
    family: Family,
    config: ModelConfig,
    *,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    prefix: str = "",
    keep: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Reads the network's tensors, those whose names begin with `prefix`; all are checked.

    dtype None: as stored. `keep` gives what is kept of each, as soon as it is there: a share needs
    no memory for the whole. Raises CheckpointError.
    """
    if config.num_layers > len(checkpoint.names()):
        raise CheckpointError("more layers than tensors")
    layout = checkpoint.layout(family)
    fused = dict(_fused_parts(config))
    shapes = {part: shape for parts in fused.values() for part, shape in parts.items()}
    sources = _sources(checkpoint, layout, tied=config.tied_head)
    _check(checkpoint, layout, sources=sources, shapes=shapes)

    target_of = {part: target for target, parts in fused.items() for part in parts}
    found: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, parts in sources.items():
        if not any(target_of[part].startswith(prefix) for part in parts):
            continue
        tensor = checkpoint.load(name, dtype=dtype)
        if _is_transposed(layout, name):
            tensor = tensor.T.contiguous()
        rows = [shapes[part][0] for part in parts]
        found.update(zip(parts, torch.split(tensor, rows), strict=True))
        for target in {target_of[part] for part in parts}:
            if all(part in found for part in fused[target]):
                pieces = [found.pop(part) for part in fused[target]]
                whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
                weights[target] = whole if keep is None else keep(target, whole)
    return weights


def _sources(checkpoint: Checkpoint, layout: Layout, *, tied: bool) -> dict[str, tuple[str, ...]]:
    """Stored name -> the canonical parts it holds."""
    sources: dict[str, tuple[str, ...]] = {}
    unexpected = []
    for name in checkpoint.names():
        pattern, layer = _pattern(name)
        if pattern not in layout.names:
            unexpected.append(name)
            continue
        parts = layout.names[pattern]
        parts = (parts,) if isinstance(parts, str) else parts
        if parts is None or (tied and parts == ("head.weight",)):
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


def _fused_parts(config: ModelConfig) -> Iterator[tuple[str, dict[str, Shape]]]:
    """The network's tensors, each with the parts it is made of, in order, and their shapes."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield _alone("embed.weight", (vocab, hidden))
    if config.position is Position.LEARNED:
        yield _alone("position.weight", (config.max_model_len, hidden))
    if not config.tied_head:
        yield _alone("head.weight", (vocab, hidden))
    yield from _norm(config, "norm")
    for layer in range(config.num_layers):
        block = f"blocks.{layer}"
        yield from _norm(config, f"{block}.attention_norm")
        yield from _norm(config, f"{block}.mlp_norm")
        yield from _attention(config, f"{block}.attention")
        yield from _mlp(config, f"{block}.mlp")


def _attention(config: ModelConfig, name: str) -> Iterator[tuple[str, dict[str, Shape]]]:
    hidden = config.hidden_size
    rows = {"q": config.query_size, "k": config.kv_size, "v": config.kv_size}
    weights: dict[str, Shape] = {
        f"{name}.{part}.weight": (size, hidden) for part, size in rows.items()
    }
    yield f"{name}.qkv.weight", weights
    if config.qkv_bias:
        yield f"{name}.qkv.bias", {f"{name}.{part}.bias": (size,) for part, size in rows.items()}
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


def _norm(config: ModelConfig, name: str) -> Iterator[tuple[str, dict[str, Shape]]]:
    yield _alone(f"{name}.weight", (config.hidden_size,))
    if config.norm is Norm.LAYER:
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
