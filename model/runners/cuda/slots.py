"""BatchSlots: the host's mirror of the state on the device, so that only changes are uploaded.

The device's state (`model.kernels.inputs`) has a row per batch slot. Before a step the batch's
columns and block tables are compared with the mirror, and what differs is uploaded. The device
advances its counters by itself, and so does the mirror: after a decode step nothing differs but a
new block now and then. The newest token of a slot is unknown here until the step that sampled it
has been read.

    0 ............ N | N ............. 2N | 2N
    batch slots        rows that verify     padding rows

A sequence that samples several rows in a step, to verify drafts, takes its parameters not from its
batch slot but from a row of the state for each: they sample different tokens of its answer. Its
own slot stays as it was, because the host decides how many of those tokens are accepted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from model.batch import Batch, Bools, Ints
from model.kernels.inputs import Column

_NUM_SAMPLING = Column.MIN_P + 1 - Column.INDEX  # adjacent columns, from INDEX to MIN_P
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class BatchSlots:
    """The mirror of `num_slots` batch slots, as many rows that verify, and `pad_slot`."""

    def __init__(self, num_slots: int, *, table_width: int, adapted: bool = False) -> None:
        """`adapted`: whether sequences may have adapters."""
        self._num_slots = num_slots
        self._adapted = adapted
        self.pad_slot = 2 * num_slots
        rows = self.pad_slot + 1
        self.mirror = np.zeros((rows, Column.TABLE + table_width), np.int32)
        self._known = np.zeros(rows, np.bool_)  # whether LAST is the device's
        self._sampled_by = np.full(rows, -1, np.int64)  # newest step that wrote LAST

    @property
    def most_changes(self) -> int:
        """Places that `changes` returns at most: all of the batch slots, and all that verify."""
        return self._num_slots * (self.mirror.shape[1] + _NUM_SAMPLING)

    def sampling_slots(self, batch: Batch) -> Ints:
        """Rows of the state, one per sampled row, that hold its sampling parameters: [R]."""
        sequences_R = np.searchsorted(batch.query_starts_S1, batch.sample_rows_R, side="right") - 1
        slots_R = batch.batch_slots_S[sequences_R]
        if len(slots_R) <= 1:
            return slots_R
        verifies_R = np.bincount(sequences_R)[sequences_R] > 1
        own = np.arange(self._num_slots, self._num_slots + len(slots_R), dtype=np.int32)
        return np.where(verifies_R, own, slots_R)

    def set_pad_block(self, block: int) -> None:
        """Makes padding rows write to a block that no sequence has."""
        self.mirror[self.pad_slot, Column.TABLE :] = block

    def padding_change(self) -> tuple[Ints, Ints]:
        """What `changes` returns for a step of padding rows alone: one value, as it is already."""
        slots = np.array([self.pad_slot])
        return self._places(slots, Column.LAST), self.mirror[slots, Column.LAST]

    def changes(
        self, batch: Batch, batch_slots_R: Ints, *, unread_T: Bools | None, decode: bool
    ) -> tuple[Ints, Ints]:
        """(places, values) to write into the flat state before the step; updates the mirror.

        A decode step takes tokens and positions from the state, any other from the batch.
        """
        slots_S = batch.batch_slots_S
        parts = [
            self._compare(slots_S, Column.TABLE, batch.block_table_SB),
            self._compare(batch_slots_R, Column.INDEX, _sampling_columns(batch)),
        ]
        if self._adapted:
            numbers = batch.adapters_S if batch.adapters_S.size else np.zeros_like(slots_S)
            parts.append(self._compare(slots_S, Column.ADAPTER, numbers[:, None]))
        if decode:
            parts.append(self._compare(slots_S, Column.LENGTH, (batch.context_lens_S - 1)[:, None]))
            parts.append(self._tokens(batch, unread_T))
        places, values = zip(*parts, strict=True)
        return np.concatenate(places), np.concatenate(values)

    def sampled(self, batch_slots_R: Ints, *, step: int, decode: bool) -> None:
        """Advances the counters as the device does when the step runs."""
        self.mirror[batch_slots_R, Column.INDEX] += 1
        if decode:
            self.mirror[batch_slots_R, Column.LENGTH] += 1
        self._known[batch_slots_R] = False
        self._sampled_by[batch_slots_R] = step

    def read(self, batch_slots_R: Ints, tokens_R: Ints, *, step: int) -> None:
        """Stores the tokens that a step sampled, but not over those of a later step."""
        newest = self._sampled_by[batch_slots_R] == step
        slots = batch_slots_R[newest]
        self.mirror[slots, Column.LAST] = tokens_R[newest]
        self._known[slots] = True

    def _tokens(self, batch: Batch, unread_T: Bools | None) -> tuple[Ints, Ints]:
        """The decoded tokens that the device does not have already."""
        slots = batch.batch_slots_S
        stale = ~self._known[slots] | (self.mirror[slots, Column.LAST] != batch.tokens_T)
        if unread_T is not None:
            stale &= ~unread_T
        slots = slots[stale]
        self.mirror[slots, Column.LAST] = batch.tokens_T[stale]
        self._known[slots] = True
        return self._places(slots, Column.LAST), batch.tokens_T[stale]

    def _compare(self, slots: Ints, first: int, wanted: Ints) -> tuple[Ints, Ints]:
        """What differs from `wanted` in the columns from `first` on."""
        columns = slice(first, first + wanted.shape[1])
        rows, offsets = np.nonzero(self.mirror[slots, columns] != wanted)
        values = wanted[rows, offsets]
        self.mirror[slots[rows], first + offsets] = values
        return self._places(slots[rows], first + offsets), values

    def _places(self, slots: Ints, columns: int | npt.NDArray[np.intp]) -> Ints:
        places: Ints = (slots.astype(np.int64) * self.mirror.shape[1] + columns).astype(np.int32)
        return places


def _sampling_columns(batch: Batch) -> Ints:
    """Columns INDEX to MIN_P of the rows that sample, floats by their bits."""
    sampling = batch.sampling
    wanted = np.empty((len(sampling.indices_R), _NUM_SAMPLING), np.int32)
    columns = (
        sampling.indices_R,
        (sampling.seeds_R & _LOW).astype(np.uint32).view(np.int32),
        (sampling.seeds_R >> _HALF).astype(np.uint32).view(np.int32),
        sampling.choices_R,
        np.ascontiguousarray(sampling.temperatures_R).view(np.int32),
        sampling.top_ks_R,
        np.ascontiguousarray(sampling.top_ps_R).view(np.int32),
        np.ascontiguousarray(sampling.min_ps_R).view(np.int32),
    )
    for index, column in enumerate(columns):
        wanted[:, index] = column
    return wanted
