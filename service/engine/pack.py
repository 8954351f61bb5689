"""Packer: Plan -> Batch. `unpack` is the inverse.

Only these two, `adjusted`, `slot_state` and `penalties` use both sequences and tensors. They decide
nothing. What is constant while a sequence holds its batch slot is in columns indexed by batch slot
and written once; a step gathers the rows it needs, so that a decode step costs little Python per
sequence. Shapes: `model.batch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np

from model.batch import Batch, Bools, Floats, Ints, SamplingBatch, Seeds, Words
from service.engine.adapters import Adapters
from service.engine.adjusted import Adjusted, bias_columns, penalty_columns
from service.engine.plan import EngineConfig, Plan
from service.engine.sequence import Sequence
from service.engine.slot_state import NO_FLOATS, NO_INTS, SlotState
from service.engine.sources import source_columns
from service.messages import SamplingParams

_NO_WORDS: Words = np.empty((0, 0), np.uint32)
_ANY_TOKEN = 0  # in place of an unread one, which the runner has


class _Columns(NamedTuple):
    """Sampling parameters of rows, gathered from their batch slots."""

    batch_slots_R: Ints
    adapters_R: Ints  # empty if no row has one
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
        adapters: Adapters | None = None,
        anchor_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`anchor_ids`: for a cache compressed to anchors (see `segments`)."""
        num = config.max_sequences
        self.anchor_ids = anchor_ids
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._adapters = adapters or Adapters()
        self._numbers = np.zeros(num, np.int32)  # of the adapters
        self._states: list[SlotState | None] = [None] * num
        self._table = np.zeros((num, -(-max_model_len // block_size)), np.int32)
        self._seeds = np.zeros(num, np.uint64)
        self._choices = np.zeros(num, np.int32)
        self._top_ks = np.zeros(num, np.int32)
        # temperature, top_p, min_p, presence, frequency, repetition: one row each, for one gather
        self._floats = np.zeros((6, num), np.float32)
        self._num_tops = np.zeros(num, np.int32)  # 0 also without log probabilities
        self._wants_logprobs = np.zeros(num, np.bool_)
        self._counting = np.arange(num + 1, dtype=np.int32)
        # Columns of the last decode step and their batch slots: most often those of the next one.
        self._gathered: tuple[list[int], _Columns] | None = None

    def pack(self, plan: Plan, *, deferred: bool = False) -> Batch:
        """The batch of a non-empty plan; sequences in the plan's order. If sampling is `deferred`,
        `adjusted` is called when the step before has been read.
        """
        sequences = list(plan.tokens)
        for sequence in sequences:
            self._update_slot(sequence)
        if plan.num_tokens == len(sequences) == len(plan.sampling):
            return self._pack_decodes(plan, sequences, deferred=deferred)
        # Lists, because most steps are small: one NumPy operation costs as much as many rows.
        starts, contexts, batch_slots = [0], [], []
        positions: list[range] = []
        sample_rows: list[int] = []
        sample_slots: list[int] = []
        outputs: list[int] = []
        for sequence, num in plan.tokens.items():
            batch_slot, computed = _slot_of(sequence), sequence.num_computed
            end = starts[-1] + num
            starts.append(end)
            contexts.append(computed + num)
            batch_slots.append(batch_slot)
            positions.append(range(computed, computed + num))
            if samples := sequence.samples(num):
                # The first row samples after the last token, each further one after a draft.
                sample_rows.extend(range(end - samples, end))
                sample_slots.extend([batch_slot] * samples)
                outputs.extend(range(sequence.num_output, sequence.num_output + samples))
        batch_slots_S, width = (
            np.array(batch_slots, np.int32),
            -(-max(contexts) // self._block_size),
        )
        score_rows_Q, score_ids_Q, score_num_top = _scores(plan, starts)
        return Batch(
            tokens_T=_tokens(plan),
            positions_T=np.fromiter(chain.from_iterable(positions), np.int32, plan.num_tokens),
            query_starts_S1=np.array(starts, np.int32),
            context_lens_S=np.array(contexts, np.int32),
            block_table_SB=self._table[batch_slots_S, :width],
            batch_slots_S=batch_slots_S,
            adapters_S=self._numbered(batch_slots_S),
            sample_rows_R=np.array(sample_rows, np.int32),
            sampling=self._sampling(
                plan,
                self._gather(np.array(sample_slots, np.int32)),
                np.array(outputs, np.int32),
                deferred=deferred,
            ),
            score_rows_Q=score_rows_Q,
            score_ids_Q=score_ids_Q,
            score_num_top=score_num_top,
            sources=source_columns(sequences),
        )

    def _pack_decodes(self, plan: Plan, sequences: list[Sequence], *, deferred: bool) -> Batch:
        """The same for steps of one token per sequence, its last. They are the most frequent ones,
        and little changes between them.
        """
        batch_slots = [_slot_of(sequence) for sequence in sequences]
        lengths = [sequence.num_tokens for sequence in sequences]
        if self._gathered is None or self._gathered[0] != batch_slots:
            self._gathered = batch_slots, self._gather(np.array(batch_slots, np.int32))
        _, columns = self._gathered
        count, contexts_S = len(sequences), np.array(lengths, np.int32)
        width = -(-max(lengths) // self._block_size)
        outputs_R = np.array([sequence.num_output for sequence in sequences], np.int32)
        score_rows_Q, score_ids_Q, score_num_top = _scores(plan, range(count))
        return Batch(
            tokens_T=np.array(
                [_ANY_TOKEN if s.num_unread else s.tokens[-1] for s in sequences], np.int32
            ),
            positions_T=contexts_S - 1,
            query_starts_S1=self._counting[: count + 1],
            context_lens_S=contexts_S,
            block_table_SB=self._table[columns.batch_slots_R, :width],
            batch_slots_S=columns.batch_slots_R,
            adapters_S=columns.adapters_R,
            sample_rows_R=self._counting[:count],
            sampling=self._sampling(plan, columns, outputs_R, deferred=deferred),
            score_rows_Q=score_rows_Q,
            score_ids_Q=score_ids_Q,
            score_num_top=score_num_top,
            sources=source_columns(sequences),
        )

    def _update_slot(self, sequence: Sequence) -> None:
        """Writes what is new of a sequence: everything at first, later its new blocks."""
        index = _slot_of(sequence)
        owner = (sequence.arrival, sequence.preemptions)
        state = self._states[index]
        if state is None or state.owner != owner:
            state = self._states[index] = SlotState.of(
                sequence, owner, vocab_size=self._vocab_size, eos_ids=self._eos_ids
            )
            self._table[index] = 0
            self._numbers[index] = self._adapters.number(sequence.request)
            self._write_columns(index, sequence.request.sampling)
        if state.num_blocks != len(sequence.blocks):
            fresh = sequence.blocks[state.num_blocks :]
            self._table[index, state.num_blocks : len(sequence.blocks)] = fresh
            state.num_blocks = len(sequence.blocks)

    def _write_columns(self, index: int, params: SamplingParams) -> None:
        self._seeds[index] = params.seed
        self._choices[index] = params.choice
        self._top_ks[index] = min(params.top_k or self._vocab_size, self._vocab_size)
        self._floats[:, index] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        )
        self._num_tops[index] = params.top_logprobs or 0
        self._wants_logprobs[index] = params.top_logprobs is not None
        self._gathered = None

    def _numbered(self, batch_slots_S: Ints) -> Ints:
        """The numbers of the sequences' adapters; empty if no sequence has one."""
        numbers_S = self._numbers[batch_slots_S]
        return numbers_S if numbers_S.any() else NO_INTS

    def _gather(self, batch_slots_R: Ints) -> _Columns:
        return _Columns(
            batch_slots_R,
            self._numbered(batch_slots_R),
            self._seeds[batch_slots_R],
            self._choices[batch_slots_R],
            self._top_ks[batch_slots_R],
            self._floats[:, batch_slots_R],
            self._wants_logprobs[batch_slots_R],
            int(self._num_tops[batch_slots_R].max(initial=0)),
        )

    def _sampling(
        self, plan: Plan, columns: _Columns, indices_R: Ints, *, deferred: bool
    ) -> SamplingBatch:
        """Everything that the sampled tokens depend on, besides the logits."""
        temperatures_R, top_ps_R, min_ps_R, presence_R, frequency_R, repetition_R = columns.floats_R
        sampling = SamplingBatch(
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
            penalty_rows_P=NO_INTS,
            penalty_ids_P=NO_INTS,
            penalty_counts_P=NO_INTS,
            bias_rows_E=NO_INTS,
            bias_ids_E=NO_INTS,
            bias_values_E=NO_FLOATS,
            wants_logprobs_R=columns.wants_logprobs_R,
            num_top=columns.num_top,
        )
        return sampling if deferred else self.adjusted(plan, sampling)

    def adjusted(self, plan: Plan, sampling: SamplingBatch) -> SamplingBatch:
        """With what may depend on earlier tokens: penalties, biases and masks."""
        rows = list(self._adjusted(plan, sampling.indices_R.tolist()))
        mask_rows, masks, open_rows = self._masks(plan)
        if not rows and not mask_rows.size and not open_rows.size:
            return sampling
        penalty_rows, penalty_ids, penalty_counts = penalty_columns(rows)
        bias_rows, bias_ids, bias_values = bias_columns(rows)
        return replace(
            sampling,
            penalty_rows_P=penalty_rows,
            penalty_ids_P=penalty_ids,
            penalty_counts_P=penalty_counts,
            bias_rows_E=bias_rows,
            bias_ids_E=bias_ids,
            bias_values_E=bias_values,
            mask_rows_M=mask_rows,
            masks_MW=masks,
            open_rows_L=open_rows,
        )

    def _masks(self, plan: Plan) -> tuple[Ints, Words, Ints]:
        """Rows with a grammar or a set of allowed tokens, and their masks; open rows."""
        rows: list[int] = []
        open_rows: list[int] = []
        masks: list[Words] = []
        row = 0
        for sequence in plan.sampling:
            num = 1 + len(plan.drafts.get(sequence, ()))
            state = self._state_of(sequence)
            if state is None or sequence in plan.skipped:
                pass
            elif sequence.guide is not None and sequence.guide.is_open:
                open_rows.append(row)
                plan.opened[sequence] = sequence.guide
            elif sequence.guide is not None and sequence.guide.binds(num):
                rows.extend(range(row, row + num))
                masks.append(sequence.guide.masks(num))
            elif state.mask is not None:
                rows.extend(range(row, row + num))
                masks.append(np.tile(state.mask, (num, 1)))
            row += num
        open_rows_L = np.array(open_rows, np.int32)
        if not rows:
            return NO_INTS, _NO_WORDS, open_rows_L
        return np.array(rows, np.int32), np.concatenate(masks), open_rows_L

    def _adjusted(self, plan: Plan, indices: list[int]) -> Iterator[Adjusted]:
        row = 0
        for sequence in plan.sampling:
            state = self._state_of(sequence)
            drafts = plan.drafts.get(sequence, [])
            if state is not None and state.adjusts:
                yield Adjusted(row, indices[row], sequence, state, drafts)
            row += 1 + len(drafts)

    def _state_of(self, sequence: Sequence) -> SlotState | None:
        """None if the sequence ended after the plan was made: nobody reads what it samples."""
        return None if sequence.batch_slot is None else self._states[sequence.batch_slot]


def unread_rows(plan: Plan) -> Bools | None:
    """Rows of the step whose token an earlier step in flight will yield; None if there are none.

    Called when the plan is packed, before it is launched.
    """
    unread = [sequence.num_unread > 0 for sequence in plan.tokens]
    if not any(unread):
        return None
    unread_S = np.array(unread, np.bool_)
    if plan.num_tokens == len(unread):
        return unread_S
    ends_S = np.cumsum(np.fromiter(plan.tokens.values(), np.int64, len(plan.tokens)))
    unread_T = np.zeros(plan.num_tokens, np.bool_)
    unread_T[ends_S[unread_S] - 1] = True
    return unread_T


def _slot_of(sequence: Sequence) -> int:
    if sequence.batch_slot is None:
        raise ValueError("a sequence in a plan must have a batch slot")
    return sequence.batch_slot


def _tokens(plan: Plan) -> Ints:
    slices: list[Iterable[int]] = []
    for sequence, num in plan.tokens.items():
        slices.append(sequence.tokens[sequence.num_computed : sequence.num_computed + num])
        if sequence in plan.drafts:
            slices.append(plan.drafts[sequence])
        elif sequence.num_unread:
            slices.append((_ANY_TOKEN,))
    return np.fromiter(chain.from_iterable(slices), np.int32, plan.num_tokens)


def _scores(plan: Plan, starts: Iterable[int]) -> tuple[Ints, Ints, int]:
    """Rows whose next token is scored, those tokens, and the number of alternatives."""
    if not plan.scored:
        return NO_INTS, NO_INTS, 0
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
