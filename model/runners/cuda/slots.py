"""Seats: what the host knows of the state on the device, so that only changes travel.

The device's state (`model.kernels.inputs`) has a row a seat. This is its mirror: before a step the
batch's columns and block tables are compared with it, and what differs is sent. The device counts
on by itself, and so does the mirror: after a decode step nothing differs but a new block now and
then. The newest token of a seat is unknown here until the step that sampled it has been read.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from model.batch import Batch, Bools, Ints
from model.kernels.inputs import Column

_SAMPLING = slice(Column.INDEX, Column.MIN_P + 1)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Seats:
    """The mirror of `num_seats` seats and of the one that belongs to nobody."""

    def __init__(self, num_seats: int, *, table_width: int) -> None:
        self.nobody = num_seats
        self.mirror = np.zeros((num_seats + 1, Column.TABLE + table_width), np.int32)
        self._known = np.zeros(num_seats + 1, np.bool_)  # whether LAST is the device's
        self._sampled_by = np.full(num_seats + 1, -1, np.int64)  # the newest step that wrote LAST

    def give_nobody(self, block: int) -> None:
        """Lets rows that only fill up write to a block that no sequence has."""
        self.mirror[self.nobody, Column.TABLE :] = block

    def changes(
        self, batch: Batch, seats_R: Ints, *, unread_T: Bools | None, decode: bool
    ) -> tuple[Ints, Ints]:
        """(places, values) to write into the flat state before the step. The mirror has them then.

        A decode step takes token and position from the state, any other from the batch.
        """
        batch_slots_S = batch.batch_slots_S
        width = batch.block_table_SB.shape[1]
        parts = [
            self._compare(batch_slots_S, Column.TABLE, batch.block_table_SB, width),
            self._compare(
                seats_R, Column.INDEX, _sampling(batch), _SAMPLING.stop - _SAMPLING.start
            ),
        ]
        if decode:
            lengths_S1 = (batch.context_lens_S - 1)[:, None]
            parts.append(self._compare(batch_slots_S, Column.LENGTH, lengths_S1, 1))
            parts.append(self._tokens(batch, unread_T))
        return (
            np.concatenate([places for places, _ in parts]),
            np.concatenate([values for _, values in parts]),
        )

    def sampled(self, seats_R: Ints, *, step: int, decode: bool) -> None:
        """Counts on as the device does when the step runs."""
        self.mirror[seats_R, Column.INDEX] += 1
        if decode:
            self.mirror[seats_R, Column.LENGTH] += 1
        self._known[seats_R] = False
        self._sampled_by[seats_R] = step

    def read(self, seats_R: Ints, tokens_R: Ints, *, step: int) -> None:
        """Learns the tokens that a step sampled, where no later one has sampled again."""
        newest = self._sampled_by[seats_R] == step
        seats = seats_R[newest]
        self.mirror[seats, Column.LAST] = tokens_R[newest]
        self._known[seats] = True

    def _tokens(self, batch: Batch, unread_T: Bools | None) -> tuple[Ints, Ints]:
        """The decoded tokens that the device does not have already."""
        seats = batch.batch_slots_S
        stale = ~self._known[seats] | (self.mirror[seats, Column.LAST] != batch.tokens_T)
        if unread_T is not None:
            stale &= ~unread_T
        seats = seats[stale]
        self.mirror[seats, Column.LAST] = batch.tokens_T[stale]
        self._known[seats] = True
        return self._places(seats, Column.LAST), batch.tokens_T[stale]

    def _compare(
        self, seats: Ints, first: int, wanted: npt.NDArray[np.int32], width: int
    ) -> tuple[Ints, Ints]:
        columns = slice(first, first + width)
        rows, offsets = np.nonzero(self.mirror[seats, columns] != wanted)
        values = wanted[rows, offsets]
        self.mirror[seats[rows], first + offsets] = values
        return self._places(seats[rows], first + offsets), values

    def _places(self, seats: Ints, columns: int | npt.NDArray[np.intp]) -> Ints:
        places: Ints = (seats.astype(np.int64) * self.mirror.shape[1] + columns).astype(np.int32)
        return places


def _sampling(batch: Batch) -> npt.NDArray[np.int32]:
    """Columns INDEX to MIN_P of the rows that sample, floats by their bits."""
    sampling = batch.sampling
    wanted = np.empty((len(sampling.indices_R), _SAMPLING.stop - _SAMPLING.start), np.int32)
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
