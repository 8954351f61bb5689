"""Adjusted: sequences whose logits are adjusted before sampling, and the columns for that.

Shapes: `model.batch`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np

from model.batch import Floats, Ints
from service.engine.sequence import Sequence
from service.engine.slot_state import NO_FLOATS, NO_INTS, SlotState

_Values = TypeVar("_Values", Ints, Floats)


class Adjusted(NamedTuple):
    """A sequence whose logits are adjusted before sampling."""

    first_row: int
    first_index: int  # of that row's token in the output
    sequence: Sequence
    state: SlotState
    drafts: list[int]


def penalty_columns(adjusted: list[Adjusted]) -> tuple[Ints, Ints, Ints]:
    """Rows, ids and counts of the entries of penalties."""
    rows = [
        (each.first_row + row, ids, counts)
        for each in adjusted
        if (penalties := each.state.penalties) is not None
        for row, (ids, counts) in enumerate(penalties.rows(each.sequence, each.drafts))
    ]
    return _flatten(rows, NO_INTS)


def bias_columns(adjusted: list[Adjusted]) -> tuple[Ints, Ints, Floats]:
    """Rows, ids and values of the entries of biases."""
    rows = [
        (
            each.first_row + row,
            *each.state.bias(each.sequence, each.drafts[:row], index=each.first_index + row),
        )
        for each in adjusted
        for row in range(1 + len(each.drafts))
    ]
    return _flatten(rows, NO_FLOATS)


def _flatten(
    rows: list[tuple[int, Ints, _Values]], no_values: _Values
) -> tuple[Ints, Ints, _Values]:
    """(row, ids, values) of each row -> three columns with one entry per id."""
    rows = [row for row in rows if len(row[1])]
    if not rows:
        return NO_INTS, NO_INTS, no_values
    numbers, ids, values = zip(*rows, strict=True)
    lengths = [len(row_ids) for row_ids in ids]
    return (
        np.repeat(np.array(numbers, np.int32), lengths),
        np.concatenate(ids),
        np.concatenate(values),
    )
