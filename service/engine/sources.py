"""The columns of a batch about the sources of encoder-decoders. Shapes: `model.batch`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import numpy as np

from model.batch import SourceBatch
from service.engine.sequence import Sequence


def source_columns(sequences: Iterable[Sequence]) -> SourceBatch | None:
    """What a step needs of its sequences' sources; None for a decoder."""
    sources = [sequence.source for sequence in sequences if sequence.source is not None]
    if not sources:
        return None
    table = np.zeros((len(sources), max(len(source.blocks) for source in sources)), np.int32)
    for row, source in zip(table, sources, strict=True):
        row[: len(source.blocks)] = source.blocks
    new = [source for source in sources if not source.encoded]
    return SourceBatch(
        lens_S=np.array([len(source.tokens) for source in sources], np.int32),
        table_SB=table,
        is_new_S=np.array([not source.encoded for source in sources], np.bool_),
        tokens_U=np.fromiter(chain.from_iterable(source.tokens for source in new), np.int32),
    )
