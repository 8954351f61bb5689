"""NoiseRunner: logits are seeded noise of a token and those before it, through the real sampler.

Exact and cheap, and it hesitates: tables of noise like no token much better than another. Texts in
quotes come to their end because what ends things is a little likelier. Earlier tokens are read from
its cache, so it notices if that has other ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from model.batch import Batch, StepOutput
from model.sampler import sample
from tests.support.builders import tiny_model_config

ENDINGS = (b'"', b'"}', b'", "', b"}", b"]", b"")
WORDS = (
    b'{"', b'":', b'": ', b'", "', b'"}', b'"]', b"},", b"\n  ", b"true", b"false", b"null",
    b"name", b"ag", b"age", b"kind", b"tag", b"tags", b"fix", b"fixed", b"value", b"next",
    "é".encode(), b"12", b"100", b"the ",
)  # fmt: skip
TOKEN_BYTES = (*(bytes([byte]) for byte in range(256)), *WORDS, b"", b"")
VOCAB_SIZE = len(TOKEN_BYTES)
EOS_IDS = frozenset({VOCAB_SIZE - 1})


class NoiseRunner:
    """Without a network; what a step computes is a function of its tokens and of cached ones."""

    def __init__(
        self,
        *,
        num_blocks: int = 1024,
        max_model_len: int = 2048,
        token_bytes: Sequence[bytes] = TOKEN_BYTES,
        keeps_logits: bool = False,
    ) -> None:
        size = len(token_bytes)
        self.config = tiny_model_config(vocab_size=size, max_model_len=max_model_len)
        self.block_size = 4
        self.num_blocks = num_blocks
        self.numeric_class = "noise"
        self.exact = True
        self.keeps_logits = keeps_logits
        generator = torch.Generator().manual_seed(3)
        self._by_token = torch.randn((size, size), generator=generator)
        self._by_context = torch.randn((64, size), generator=generator)
        self._cache = np.zeros((num_blocks, self.block_size), np.int64)
        for token, text in enumerate(token_bytes):
            self._by_token[:, token] += 2.5 if text in ENDINGS else 0.0

    def run(self, batch: Batch) -> StepOutput:
        """Samples the rows that sample."""
        size = self.config.vocab_size
        batch.check(block_size=self.block_size, num_blocks=self.num_blocks, vocab_size=size)
        rows = batch.sample_rows_R
        tokens_R = torch.from_numpy(batch.tokens_T[rows]).long()
        logits_RV = self._by_token[tokens_R] + self._by_context[self._contexts(batch)]
        sampled = sample(logits_RV, batch.sampling)
        none = np.zeros(0, np.float32)
        return StepOutput(
            tokens_R=sampled.tokens_R.int().numpy(),
            logprobs_R=sampled.logprobs_R.numpy(),
            top_ids_RN=sampled.top_ids_RN.int().numpy(),
            top_logprobs_RN=sampled.top_logprobs_RN.numpy(),
            score_logprobs_Q=none,
            score_top_ids_QN=np.zeros((0, 0), np.int32),
            score_top_logprobs_QN=np.zeros((0, 0), np.float32),
            open_logits_LV=logits_RV.numpy()[batch.sampling.open_rows_L],
        )

    def _contexts(self, batch: Batch) -> torch.Tensor:
        """Stores the tokens of a step. Returns a number per sampled row, of all up to it."""
        owners_T = np.repeat(np.arange(batch.num_sequences), np.diff(batch.query_starts_S1))
        blocks, offsets = np.divmod(batch.positions_T, self.block_size)
        self._cache[batch.block_table_SB[owners_T, blocks], offsets] = batch.tokens_T
        numbers = []
        for row in batch.sample_rows_R:
            length = int(batch.positions_T[row]) + 1
            table = batch.block_table_SB[owners_T[row], : -(-length // self.block_size)]
            tokens = self._cache[table].ravel()[:length]
            numbers.append(int(tokens @ np.arange(1, 1 + length)) % len(self._by_context))
        return torch.tensor(numbers, dtype=torch.long)

    def warm_up(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing to give back."""
