"""Batch: the one input of a step. StepOutput: the one output. Nothing else passes between them.

Shape legend, used as suffixes of names everywhere in `model`:

    T  tokens computed in this step, all sequences end to end        B  blocks in a block table
    S  sequences in this step                                        V  vocabulary
    R  rows that sample a token                                      C  hidden size
    Q  rows whose given next token is scored (prompt log probs)      H  query heads, K  KV heads
    P  penalty entries, E  bias entries (ragged, as COO lists)       D  head dimension
    M  rows limited by a mask, W  words of 32 bits a mask            L  open rows
    N  log probability alternatives                                  F  MLP width

All fields are NumPy arrays on the host: a C++ runner takes their pointers, the torch runner views
them without a copy, a GPU runner uploads them or, if it keeps state on the device, reads only
`batch_slots_S` and what changed. A sequence keeps its batch slot from its first step to its last.

    sequence s computes rows  query_starts_S1[s] <= t < query_starts_S1[s + 1]
    its token at position p has its K and V at  block_table_SB[s, p // block_size], p % block_size
    row t attends to positions 0 .. positions_T[t] of its own sequence
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Seeds = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """One column per sampling parameter, one row per token to choose.

    Random numbers are a function of (seed, choice, index) alone, so nothing is carried from step to
    step. Penalties and biases are ragged: entry e changes logit `*_ids[e]` of row `*_rows[e]`.
    """

    seeds_R: Seeds
    choices_R: Ints
    indices_R: Ints  # which token of the answer this will be, from 0
    temperatures_R: Floats  # 0: greedy
    top_ks_R: Ints  # the vocabulary's size: no cut
    top_ps_R: Floats
    min_ps_R: Floats
    presence_R: Floats
    frequency_R: Floats
    repetition_R: Floats
    penalty_rows_P: Ints  # only rows with a penalty have entries, one per distinct token
    penalty_ids_P: Ints
    penalty_counts_P: Ints  # times the token stands in the answer so far; 0: in the prompt only
    bias_rows_E: Ints
    bias_ids_E: Ints
    bias_values_E: Floats  # -inf forbids the token
    wants_logprobs_R: Bools
    num_top: int  # N: the most alternatives that any row asks for
    # Rows, rising, whose choice a grammar limits: token i may be chosen where bit i % 32 of word
    # i // 32 is set. Applied before bias and penalties; each mask allows at least one token.
    mask_rows_M: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    masks_MW: Words = field(default_factory=lambda: np.zeros((0, 0), np.uint32))
    # Open rows, rising: the step returns their logits as well, because the argmax, which they take,
    # may turn out to be forbidden. For runners that keep logits (`model.runners.keeps_logits`).
    open_rows_L: Ints = field(default_factory=lambda: np.zeros(0, np.int32))

    @classmethod
    def plain(
        cls,
        rows: int,
        *,
        vocab_size: int,
        temperature: float = 0.0,
        seeds_R: Seeds | None = None,
        indices_R: Ints | None = None,
        num_top: int | None = None,
    ) -> SamplingBatch:
        """Rows without cuts, penalties, biases or masks. `num_top` None: no log probabilities."""
        ones, zeros = np.ones(rows, np.float32), np.zeros(rows, np.float32)
        none = np.zeros(0, np.int32)
        return cls(
            seeds_R=np.zeros(rows, np.uint64) if seeds_R is None else seeds_R,
            choices_R=np.zeros(rows, np.int32),
            indices_R=np.zeros(rows, np.int32) if indices_R is None else indices_R,
            temperatures_R=ones * np.float32(temperature),
            top_ks_R=np.full(rows, vocab_size, np.int32),
            top_ps_R=ones,
            min_ps_R=zeros,
            presence_R=zeros,
            frequency_R=zeros,
            repetition_R=ones,
            penalty_rows_P=none,
            penalty_ids_P=none,
            penalty_counts_P=none,
            bias_rows_E=none,
            bias_ids_E=none,
            bias_values_E=np.zeros(0, np.float32),
            wants_logprobs_R=np.full(rows, num_top is not None),
            num_top=num_top or 0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceBatch:
    """What the sequences of an encoder-decoder have besides: sources, and which are new.

    The cross-attention of sequence s reads K and V of its source's token u at
    table_SB[s, u // block_size], u % block_size.
    """

    lens_S: Ints  # tokens
    table_SB: Ints  # padded with 0, like `block_table_SB`
    is_new_S: Bools  # this step encodes it, before the decoder's tokens are computed
    tokens_U: Ints  # of the new ones, end to end


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Of a cache compressed to anchors (see `model.compression`). A: rows of T that are anchors.

    Anchor number i of a sequence has its K and V at  table_SB[s, i // block_size], i % block_size
    and, until its block there is freed, at its position, too.
    """

    table_SB: Ints  # blocks of anchors, padded with 0
    starts_T: Ints  # position at which the segment of each token begins
    seen_T: Ints  # anchors that it sees: those before its segment, or 0 for an anchor
    rows_A: Ints
    numbers_A: Ints  # of each anchor among all of its sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step computes."""

    tokens_T: Ints
    positions_T: Ints
    query_starts_S1: Ints  # [S + 1], from 0 to T
    context_lens_S: Ints  # tokens of the sequence whose KV is stored when the step is done
    block_table_SB: (
        Ints  # rows padded with 0 beyond what the sequence owns; the padding is not read
    )
    batch_slots_S: Ints  # a stable small index, for runners that keep state on a device
    sample_rows_R: Ints  # rows of T whose logits choose a token
    sampling: SamplingBatch
    score_rows_Q: Ints  # rows of T whose logits score a token that is already given
    score_ids_Q: Ints
    score_num_top: int = 0
    sources: SourceBatch | None = None  # None: the model is a decoder
    segments: Segments | None = None  # None unless the cache is compressed to anchors
    # The number of the sequence's adapter, from 1; 0: none. Empty: no sequence has one.
    adapters_S: Ints = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.tokens_T)

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.context_lens_S)

    @property
    def is_decode(self) -> bool:
        """One token a sequence: the shape that runners keep a fast path for."""
        return self.num_tokens == self.num_sequences

    def check(self, *, block_size: int, num_blocks: int, vocab_size: int) -> None:
        """Raises ValueError if the fields contradict one another. Tests always call it."""
        starts, contexts = self.query_starts_S1, self.context_lens_S
        lengths = np.diff(starts)
        if starts[0] != 0 or starts[-1] != self.num_tokens or (lengths < 1).any():
            raise ValueError("query_starts must rise from 0 to the number of tokens")
        if len(starts) != self.num_sequences + 1 or len(self.batch_slots_S) != self.num_sequences:
            raise ValueError("one query start, one context length and one batch slot per sequence")
        if len(np.unique(self.batch_slots_S)) != self.num_sequences:
            raise ValueError("two sequences in one batch slot")
        if len(self.adapters_S) not in {0, self.num_sequences}:
            raise ValueError("one adapter, or 0, per sequence")
        last = self.positions_T[starts[1:] - 1]
        if not np.array_equal(last + 1, contexts):
            raise ValueError("a context ends with the last token of its sequence")
        firsts = np.repeat(contexts - lengths, lengths)
        offsets = np.arange(self.num_tokens) - np.repeat(starts[:-1], lengths)
        if not np.array_equal(self.positions_T, firsts + offsets):
            raise ValueError("positions of a sequence must rise one by one")
        if ((self.tokens_T < 0) | (self.tokens_T >= vocab_size)).any():
            raise ValueError("token id outside the vocabulary")
        needed = -(-contexts // block_size)
        if (needed > self.block_table_SB.shape[1]).any():
            raise ValueError("a block table is shorter than its context")
        used = np.arange(self.block_table_SB.shape[1]) < needed[:, None]
        blocks = self.block_table_SB[used]
        if ((blocks < 0) | (blocks >= num_blocks)).any():
            raise ValueError("block number outside the pool")
        for rows in (self.sample_rows_R, self.score_rows_Q):
            if ((rows < 0) | (rows >= self.num_tokens)).any():
                raise ValueError("output row outside the step")
        _check_masks(self.sampling, vocab_size)


def _check_masks(sampling: SamplingBatch, vocab_size: int) -> None:
    """Raises ValueError if a mask belongs to no row or allows no token, or an open row has one."""
    rows_M, masks_MW = sampling.mask_rows_M, sampling.masks_MW
    open_L = sampling.open_rows_L
    if np.isin(open_L, rows_M).any() or sampling.temperatures_R[open_L].any():
        raise ValueError("an open row has no mask and takes the argmax")
    if len(masks_MW) != len(rows_M) or (np.diff(rows_M) < 1).any():
        raise ValueError("a mask belongs to one row, and their rows rise")
    if not len(rows_M):
        return
    if ((rows_M < 0) | (rows_M >= len(sampling.seeds_R))).any():
        raise ValueError("a mask belongs to a row that samples")
    if masks_MW.shape[1] != -(-vocab_size // 32):
        raise ValueError("a mask has a bit for each token")
    if not unpack_masks(masks_MW, vocab_size).any(axis=1).all():
        raise ValueError("a mask allows at least one token")


def unpack_masks(masks_MW: Words, vocab_size: int) -> Bools:
    """Whether each token may be chosen: [M, V]."""
    little = np.ascontiguousarray(masks_MW, dtype="<u4").view(np.uint8)
    bits_MV = np.unpackbits(little, axis=1, bitorder="little", count=vocab_size)
    return bits_MV.view(np.bool_)


def mask_of(tokens: Iterable[int], *, vocab_size: int) -> Words:
    """The mask of these tokens: [W]."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    bits[list(tokens)] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one step gives back. Log probabilities are natural, of the unmodified logits.

    Arrays that were not requested have no rows or no columns. Rows that did not request log
    probabilities hold undefined values.
    """

    tokens_R: Ints
    logprobs_R: Floats  # of the chosen token; empty if no row requests them
    top_ids_RN: Ints  # most probable first
    top_logprobs_RN: Floats
    score_logprobs_Q: Floats
    score_top_ids_QN: Ints
    score_top_logprobs_QN: Floats
    seconds: float | None = None  # that it took to compute, if the runner measures that
    # Valid until the launch of another step with open rows.
    open_logits_LV: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))
