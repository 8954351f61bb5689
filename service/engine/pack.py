"""Packer: Plan -> Batch. `unpack` is the way back.

These two files know both sequences and tensors. They decide nothing. What does not change while
a sequence holds its seat stands in columns indexed by seat and is written once; a step gathers the
rows it needs, so that a decode step costs little Python per sequence. Shape legend: `model.batch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

from model.batch import Batch, Bools, Floats, Ints, SamplingBatch, Seeds, Words
from service.engine.answer import stop_ids
from service.engine.plan import EngineConfig, Plan
from service.engine.sequence import Sequence
from service.messages import SamplingParams

_NO_INTS: Ints = np.empty(0, np.int32)
_NO_FLOATS: Floats = np.empty(0, np.float32)
_NO_WORDS: Words = np.empty((0, 0), np.uint32)
_UNREAD = 0  # stands for a token that only the runner knows


class _PenaltyCounts:
    """How often each token stands in an answer: two growing arrays, brought up to date by reading.

    Tokens of the prompt count 0; they are listed only where a repetition penalty asks for them.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        self._index = {token: index for index, token in enumerate(dict.fromkeys(prompt))}
        self._ids = np.fromiter(self._index, np.int32, len(self._index))
        self._counts = np.zeros(len(self._index), np.int32)
        self._num_read = 0

    def rows(self, sequence: Sequence, drafts: list[int]) -> list[tuple[Ints, Ints]]:
        """Distinct ids and counts: over the whole answer so far, then with each of the drafts."""
        ids, counts = self._read(sequence)
        rows = [(ids, counts)]
        for draft in drafts:
            place = np.flatnonzero(ids == draft)
            if place.size:
                counts = counts.copy()
                counts[place[0]] += 1
            else:
                ids = np.append(ids, np.int32(draft))
                counts = np.append(counts, np.int32(1))
            rows.append((ids, counts))
        return rows

    def _read(self, sequence: Sequence) -> tuple[Ints, Ints]:
        for token in sequence.tokens[sequence.num_prompt + self._num_read :]:
            index = self._index.setdefault(token, len(self._index))
            if index >= len(self._ids):
                self._grow()
            self._ids[index] = token
            self._counts[index] += 1
        self._num_read = sequence.num_output
        return self._ids[: len(self._index)], self._counts[: len(self._index)]

    def _grow(self) -> None:
        room = max(16, len(self._ids))
        self._ids = np.concatenate([self._ids, np.zeros(room, np.int32)])
        self._counts = np.concatenate([self._counts, np.zeros(room, np.int32)])


@dataclass(slots=True, kw_only=True)
class _Seat:
    """What was written for the sequence on a seat. A preempted one comes back as a new sitting."""

    sitting: tuple[int, int]  # arrival, preemptions
    num_blocks: int = 0
    min_tokens: int = 0
    penalties: _PenaltyCounts | None = None
    bias_ids: Ints = field(default_factory=_NO_INTS.copy)
    bias_values: Floats = field(default_factory=_NO_FLOATS.copy)
    early_ids: Ints = field(default_factory=_NO_INTS.copy)  # the same, until min_tokens
    early_values: Floats = field(default_factory=_NO_FLOATS.copy)
    adjusts: bool = False  # whether any logit of its rows is changed

    def bias(self, num_output: int) -> tuple[Ints, Floats]:
        """Biases of the answer's token number `num_output`."""
        if num_output < self.min_tokens:
            return self.early_ids, self.early_values
        return self.bias_ids, self.bias_values


class _Adjusted(NamedTuple):
    """A sequence whose logits are changed before a token is chosen."""

    first_row: int
    sequence: Sequence
    seat: _Seat
    drafts: list[int]


class _Columns(NamedTuple):
    """What rows that sample were written of their seats."""

    seats_R: Ints
    seeds_R: Seeds
    choices_R: Ints
    top_ks_R: Ints
    floats_R: Floats  # [6, R]: see Packer
    wants_logprobs_R: Bools
    num_top: int


class Packer:
    """Builds the batches of one engine."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        block_size: int,
        max_model_len: int,
        vocab_size: int,
        eos_ids: frozenset[int],
    ) -> None:
        num = config.max_sequences
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._seats: list[_Seat | None] = [None] * num
        self._table = np.zeros((num, -(-max_model_len // block_size)), np.int32)
        self._seeds = np.zeros(num, np.uint64)
        self._choices = np.zeros(num, np.int32)
        self._top_ks = np.zeros(num, np.int32)
        # temperature, top_p, min_p, presence, frequency, repetition: a row each, for one gather
        self._floats = np.zeros((6, num), np.float32)
        self._num_tops = np.zeros(num, np.int32)  # 0 too where no log probabilities are wanted
        self._wants_logprobs = np.zeros(num, np.bool_)
        self._counting = np.arange(num + 1, dtype=np.int32)
        # What the last step of decodes gathered, and for which seats: most often those of the next.
        self._gathered: tuple[list[int], _Columns] | None = None

    def pack(self, plan: Plan) -> Batch:
        """The batch of a plan that is not empty; sequences in the plan's order."""
        sequences = list(plan.tokens)
        for sequence in sequences:
            self._sit(sequence)
        if plan.num_tokens == len(sequences) == len(plan.sampling):
            return self._pack_decodes(plan, sequences)
        # Lists, because most steps are small: each operation of NumPy costs as much as many rows.
        starts, contexts, seats = [0], [], []
        positions: list[range] = []
        sample_rows: list[int] = []
        sample_seats: list[int] = []
        outputs: list[int] = []
        for sequence, num in plan.tokens.items():
            seat, computed = _seat_of(sequence), sequence.num_computed
            end = starts[-1] + num
            starts.append(end)
            contexts.append(computed + num)
            seats.append(seat)
            positions.append(range(computed, computed + num))
            if samples := sequence.samples(num):
                # The first samples what follows the last token, each one after it another draft.
                sample_rows.extend(range(end - samples, end))
                sample_seats.extend([seat] * samples)
                outputs.extend(range(sequence.num_output, sequence.num_output + samples))
        batch_slots_S, width = np.array(seats, np.int32), -(-max(contexts) // self._block_size)
        score_rows_Q, score_ids_Q, score_num_top = _scores(plan, starts)
        return Batch(
            tokens_T=_tokens(plan),
            positions_T=np.fromiter(chain.from_iterable(positions), np.int32, plan.num_tokens),
            query_starts_S1=np.array(starts, np.int32),
            context_lens_S=np.array(contexts, np.int32),
            block_table_SB=self._table[batch_slots_S, :width],
            batch_slots_S=batch_slots_S,
            sample_rows_R=np.array(sample_rows, np.int32),
            sampling=self._sampling(
                plan,
                self._gather(np.array(sample_seats, np.int32)),
                np.array(outputs, np.int32),
            ),
            score_rows_Q=score_rows_Q,
            score_ids_Q=score_ids_Q,
            score_num_top=score_num_top,
        )

    def _pack_decodes(self, plan: Plan, sequences: list[Sequence]) -> Batch:
        """The same for one token of each sequence, its last: the steps that cost the most Python,
        between which the least changes.
        """
        seats = [_seat_of(sequence) for sequence in sequences]
        lengths = [sequence.num_tokens for sequence in sequences]
        if self._gathered is None or self._gathered[0] != seats:
            self._gathered = seats, self._gather(np.array(seats, np.int32))
        _, columns = self._gathered
        count, contexts_S = len(sequences), np.array(lengths, np.int32)
        width = -(-max(lengths) // self._block_size)
        outputs_R = np.array([sequence.num_output for sequence in sequences], np.int32)
        score_rows_Q, score_ids_Q, score_num_top = _scores(plan, range(count))
        return Batch(
            tokens_T=np.array(
                [_UNREAD if s.num_unread else s.tokens[-1] for s in sequences], np.int32
            ),
            positions_T=contexts_S - 1,
            query_starts_S1=self._counting[: count + 1],
            context_lens_S=contexts_S,
            block_table_SB=self._table[columns.seats_R, :width],
            batch_slots_S=columns.seats_R,
            sample_rows_R=self._counting[:count],
            sampling=self._sampling(plan, columns, outputs_R),
            score_rows_Q=score_rows_Q,
            score_ids_Q=score_ids_Q,
            score_num_top=score_num_top,
        )

    def _sit(self, sequence: Sequence) -> None:
        """Writes what is new of a sequence: all of it at first, later its new blocks."""
        index = _seat_of(sequence)
        sitting = (sequence.arrival, sequence.preemptions)
        seat = self._seats[index]
        if seat is None or seat.sitting != sitting:
            seat = self._seats[index] = self._new_seat(sequence, sitting)
            self._table[index] = 0
            self._write_columns(index, sequence.request.sampling)
        if seat.num_blocks != len(sequence.blocks):
            fresh = sequence.blocks[seat.num_blocks :]
            self._table[index, seat.num_blocks : len(sequence.blocks)] = fresh
            seat.num_blocks = len(sequence.blocks)

    def _new_seat(self, sequence: Sequence, sitting: tuple[int, int]) -> _Seat:
        request = sequence.request
        params = request.sampling
        seat = _Seat(sitting=sitting)
        if params.repetition_penalty != 1.0:
            seat.penalties = _PenaltyCounts(request.prompt_ids)
        elif params.presence_penalty or params.frequency_penalty:
            seat.penalties = _PenaltyCounts(())
        bias = dict(params.logit_bias)
        seat.bias_ids, seat.bias_values = _bias_columns(bias)
        seat.min_tokens = request.min_tokens
        if request.min_tokens:
            forbidden = dict.fromkeys(stop_ids(request, self._eos_ids), -np.inf)
            seat.early_ids, seat.early_values = _bias_columns(bias | forbidden)
        seat.adjusts = bool(seat.penalties or len(seat.bias_ids) or len(seat.early_ids))
        return seat

    def _write_columns(self, seat: int, params: SamplingParams) -> None:
        self._seeds[seat] = params.seed
        self._choices[seat] = params.choice
        self._top_ks[seat] = min(params.top_k or self._vocab_size, self._vocab_size)
        self._floats[:, seat] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        )
        self._num_tops[seat] = params.top_logprobs or 0
        self._wants_logprobs[seat] = params.top_logprobs is not None
        self._gathered = None

    def _gather(self, seats_R: Ints) -> _Columns:
        return _Columns(
            seats_R,
            self._seeds[seats_R],
            self._choices[seats_R],
            self._top_ks[seats_R],
            self._floats[:, seats_R],
            self._wants_logprobs[seats_R],
            int(self._num_tops[seats_R].max(initial=0)),
        )

    def _sampling(self, plan: Plan, columns: _Columns, indices_R: Ints) -> SamplingBatch:
        """All that the choice of each row's token depends on."""
        adjusted = list(self._adjusted(plan))
        penalty_rows, penalty_ids, penalty_counts = _penalties(adjusted)
        bias_rows, bias_ids, bias_values = _biases(adjusted)
        mask_rows, masks = _masks(plan)
        temperatures_R, top_ps_R, min_ps_R, presence_R, frequency_R, repetition_R = columns.floats_R
        return SamplingBatch(
            seeds_R=columns.seeds_R,
            choices_R=columns.choices_R,
            indices_R=indices_R,
            temperatures_R=temperatures_R,
            top_ks_R=columns.top_ks_R,
            top_ps_R=top_ps_R,
            min_ps_R=min_ps_R,
            presence_R=presence_R,
            frequency_R=frequency_R,
            repetition_R=repetition_R,
            penalty_rows_P=penalty_rows,
            penalty_ids_P=penalty_ids,
            penalty_counts_P=penalty_counts,
            bias_rows_E=bias_rows,
            bias_ids_E=bias_ids,
            bias_values_E=bias_values,
            wants_logprobs_R=columns.wants_logprobs_R,
            num_top=columns.num_top,
            mask_rows_M=mask_rows,
            masks_MW=masks,
        )

    def _adjusted(self, plan: Plan) -> Iterator[_Adjusted]:
        """Those whose logits are changed."""
        row = 0
        for sequence in plan.sampling:
            seat = self._seats[_seat_of(sequence)]
            drafts = plan.drafts.get(sequence, [])
            if seat is not None and seat.adjusts:
                yield _Adjusted(row, sequence, seat, drafts)
            row += 1 + len(drafts)


def unread_rows(plan: Plan) -> Bools | None:
    """Rows of the step whose token an earlier step, still under way, will yield; None: no row.

    Called when the plan is packed, before it is launched.
    """
    unread = [sequence.num_unread > 0 for sequence in plan.tokens]
    if not any(unread):
        return None
    unread_S = np.array(unread, np.bool_)
    ends_S = np.cumsum(np.fromiter(plan.tokens.values(), np.int64, len(plan.tokens)))
    unread_T = np.zeros(plan.num_tokens, np.bool_)
    unread_T[ends_S[unread_S] - 1] = True
    return unread_T


def _seat_of(sequence: Sequence) -> int:
    if sequence.seat is None:
        raise ValueError("a sequence in a plan has a seat")
    return sequence.seat


def _tokens(plan: Plan) -> Ints:
    slices: list[Iterable[int]] = []
    for sequence, num in plan.tokens.items():
        slices.append(sequence.tokens[sequence.num_computed : sequence.num_computed + num])
        if sequence in plan.drafts:
            slices.append(plan.drafts[sequence])
        elif sequence.num_unread:
            slices.append((_UNREAD,))
    return np.fromiter(chain.from_iterable(slices), np.int32, plan.num_tokens)


def _scores(plan: Plan, starts: Iterable[int]) -> tuple[Ints, Ints, int]:
    """Rows whose next token is given and scored, those tokens, and how many alternatives."""
    if not plan.scored:
        return _NO_INTS, _NO_INTS, 0
    rows: list[int] = []
    ids: list[int] = []
    num_top = 0
    for start, sequence in zip(starts, plan.tokens, strict=False):  # the last start is the end
        if scored := plan.scored.get(sequence):
            # The row that scores a position is the one before it.
            rows.extend(position - 1 - sequence.num_computed + start for position in scored)
            ids.extend(sequence.tokens[scored.start : scored.stop])
            num_top = max(num_top, sequence.request.prompt_logprobs or 0)
    return np.array(rows, np.int32), np.array(ids, np.int32), num_top


def _penalties(adjusted: list[_Adjusted]) -> tuple[Ints, Ints, Ints]:
    rows: list[int] = []
    ids: list[Ints] = []
    counts: list[Ints] = []
    for first, sequence, seat, drafts in adjusted:
        if seat.penalties is None:
            continue
        for row, (row_ids, row_counts) in enumerate(seat.penalties.rows(sequence, drafts)):
            rows.append(first + row)
            ids.append(row_ids)
            counts.append(row_counts)
    if not rows:
        return _NO_INTS, _NO_INTS, _NO_INTS
    lengths = [len(row_ids) for row_ids in ids]
    repeated = np.repeat(np.array(rows, np.int32), lengths)
    return repeated, np.concatenate(ids), np.concatenate(counts)


def _biases(adjusted: list[_Adjusted]) -> tuple[Ints, Ints, Floats]:
    rows: list[int] = []
    ids: list[Ints] = []
    values: list[Floats] = []
    for first, sequence, seat, drafts in adjusted:
        for row in range(1 + len(drafts)):
            row_ids, row_values = seat.bias(sequence.num_output + row)
            if len(row_ids):
                rows.append(first + row)
                ids.append(row_ids)
                values.append(row_values)
    if not rows:
        return _NO_INTS, _NO_INTS, _NO_FLOATS
    lengths = [len(row_ids) for row_ids in ids]
    repeated = np.repeat(np.array(rows, np.int32), lengths)
    return repeated, np.concatenate(ids), np.concatenate(values)


def _masks(plan: Plan) -> tuple[Ints, Words]:
    """The rows that a grammar limits, and which tokens it allows there."""
    rows: list[int] = []
    masks: list[Words] = []
    row = 0
    for sequence in plan.sampling:
        num = 1 + len(plan.drafts.get(sequence, ()))
        if sequence.guide is not None:
            rows.extend(range(row, row + num))
            masks.append(sequence.guide.masks(num))
        row += num
    if not rows:
        return _NO_INTS, _NO_WORDS
    return np.array(rows, np.int32), np.concatenate(masks)


def _bias_columns(bias: dict[int, float]) -> tuple[Ints, Floats]:
    ids = np.fromiter(bias, np.int32, len(bias))
    values = np.fromiter(bias.values(), np.float32, len(bias))
    return ids, values
