"""Steps of padding rows alone: they compile, warm up and measure what real steps need.

They take the path of real steps, from the upload on, and leave no trace: padding rows write to a
block and a batch slot that no sequence has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from model.batch import Batch, Ints, SamplingBatch

_NUM_TOP = 20  # log probability alternatives: as many as the API permits


def padding_lengths(num_tokens: int, *, max_sequences: int, max_context: int) -> Ints:
    """Lengths of as many sequences as possible that together have so many tokens."""
    count = min(max_sequences, num_tokens)
    lengths = np.full(count, num_tokens // count, np.int32)
    lengths[: num_tokens % count] += 1
    return np.minimum(lengths, max_context)


def padding_batch(
    lengths: Iterable[int],
    *,
    pad_slot: int,
    vocab_size: int,
    adjusted: bool = False,
    logprobs: bool = False,
    scored: int = 0,
) -> Batch:
    """Padding rows in sequences of such lengths, each of which samples a token.

    If `adjusted`, each has a mask, a bias and a penalty; with `logprobs`, log probabilities. Tokens
    of the first `scored` rows are scored.
    """
    lengths_S = np.array(list(lengths), np.int32)
    starts = np.cumsum([0, *lengths_S]).astype(np.int32)
    rows = int(starts[-1])
    scored_Q = np.arange(min(scored, rows), dtype=np.int32)
    num_top = _NUM_TOP if logprobs else None
    sampling = SamplingBatch.plain(
        len(lengths_S), vocab_size=vocab_size, temperature=1.0, num_top=num_top
    )
    return Batch(
        tokens_T=np.zeros(rows, np.int32),
        positions_T=np.arange(rows, dtype=np.int32) - np.repeat(starts[:-1], lengths_S),
        query_starts_S1=starts,
        context_lens_S=lengths_S,
        block_table_SB=np.zeros((len(lengths_S), 0), np.int32),
        batch_slots_S=np.full(len(lengths_S), pad_slot, np.int32),
        sample_rows_R=starts[1:] - 1,
        sampling=_adjusted(sampling, vocab_size) if adjusted else sampling,
        score_rows_Q=scored_Q,
        score_ids_Q=np.zeros_like(scored_Q),
        score_num_top=_NUM_TOP,
    )


def _adjusted(sampling: SamplingBatch, vocab_size: int) -> SamplingBatch:
    rows = np.arange(len(sampling.seeds_R), dtype=np.int32)
    zeros = np.zeros_like(rows)
    return replace(
        sampling,
        penalty_rows_P=rows,
        penalty_ids_P=zeros,
        penalty_counts_P=zeros + 1,
        bias_rows_E=rows,
        bias_ids_E=zeros,
        bias_values_E=zeros.astype(np.float32),
        mask_rows_M=rows,
        masks_MW=np.full((len(rows), -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32),
    )
