"""Segments of a text whose cache is compressed to anchors (see `model.compression`). Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from model.batch import Ints, Segments

_ENDS = tuple(mark.encode() for mark in ".!?\u3002\uff01\uff1f")


def anchor_ids(token_bytes: Sequence[bytes], eos_ids: Iterable[int]) -> frozenset[int]:
    """Tokens whose text ends a sentence, closing quotes, brackets and white space aside, and the
    ends of answers.
    """
    texts = (text.strip().rstrip(b"\"')]*_").rstrip() for text in token_bytes)
    return frozenset(eos_ids) | {id_ for id_, text in enumerate(texts) if text.endswith(_ENDS)}


def segments_of(anchors: Sequence[int], positions: range) -> tuple[Ints, Ints, Ints, Ints]:
    """Of the tokens of a sequence at these positions, given the positions of all anchors up to the
    last of them: where their segments begin, how many anchors they see, which of them (by offset)
    are anchors, and the numbers of these.
    """
    places, at = np.asarray(anchors, np.int32), np.arange(positions.start, positions.stop)
    before = np.searchsorted(places, at).astype(np.int32)
    starts = np.concatenate([np.zeros(1, np.int32), places + 1])[before].astype(np.int32)
    first, last = np.searchsorted(places, [positions.start, positions.stop])
    offsets = (places[first:last] - positions.start).astype(np.int32)
    seen = before.copy()
    seen[offsets] = 0
    return starts, seen, offsets, np.arange(first, last, dtype=np.int32)


def segments_batch(texts: Sequence[tuple[Sequence[int], range, Sequence[int]]]) -> Segments:
    """The segments of a step. Of each sequence: its anchors, the positions to compute, and the
    blocks of its anchors.
    """
    width = max([1, *(len(blocks) for _, _, blocks in texts)])
    table_SB = np.zeros((len(texts), width), np.int32)
    columns = [segments_of(anchors, positions) for anchors, positions, _ in texts]
    begins = np.cumsum([0, *(len(positions) for _, positions, _ in texts)])
    for row, (_, _, blocks) in enumerate(texts):
        table_SB[row, : len(blocks)] = blocks
    starts, seen, offsets, numbers = zip(*columns, strict=True)
    rows = [offset + begin for offset, begin in zip(offsets, begins[:-1], strict=True)]
    return Segments(
        table_SB=table_SB,
        starts_T=np.concatenate(starts),
        seen_T=np.concatenate(seen),
        rows_A=np.concatenate(rows).astype(np.int32),
        numbers_A=np.concatenate(numbers),
    )
