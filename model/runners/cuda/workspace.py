"""Workspace: what the cuda runner's steps compute with on the device, sized for the largest step.

It is there once, from the start to the end, so recorded steps find it where it was. What of it a
step leaves for the host to read: logits, tops, tokens. It launches nothing but the attention's
lists of work. Legend: `model.batch`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from model.attention.triton_paged import attention_programs
from model.config import ModelConfig
from model.kernels.attention import Partials, WorkList
from model.kernels.head import Tops
from model.kernels.inputs import Column
from model.runners import RunnerOptions
from model.runners.cuda.network import StepInputs


class Workspace:
    """The seats' state and the buffers of one runner."""

    def __init__(
        self,
        config: ModelConfig,
        options: RunnerOptions,
        *,
        windows: Iterable[int | None],
        state: torch.Tensor,
    ) -> None:
        device, sequences = state.device, options.max_sequences
        self.state = state
        self._work = {
            window: WorkList(
                max_rows=options.max_batch_tokens,
                max_sequences=sequences,
                max_context=config.max_model_len,
                group=config.num_heads // config.num_kv_heads,
                device=device,
            )
            for window in windows
        }
        self._partials = Partials(
            next(iter(self._work.values())),
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            device=device,
        )
        self._programs = attention_programs(device)
        self.starts_S1 = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        self.logits_RV = torch.empty(
            (sequences, config.vocab_size), dtype=torch.float32, device=device
        )
        self.tops = Tops.empty(sequences, 1, device=device)  # of the logits, adjusted if they are
        self.tokens_R = torch.zeros(sequences, dtype=torch.int32, device=device)

    def num_merges(self, lengths: list[int]) -> int:
        """Tiles of rows that the attention of sequences of so many rows has."""
        return next(iter(self._work.values())).num_tiles(lengths)

    def fill(
        self, starts_S1: torch.Tensor, contexts_S: torch.Tensor, batch_slots_S: torch.Tensor
    ) -> None:
        """Makes the lists of the attention's work."""
        for window, work in self._work.items():
            work.fill(starts_S1, contexts_S, batch_slots_S, window=window)

    def inputs(
        self,
        tokens_T: torch.Tensor,
        positions_T: torch.Tensor,
        slots_T: torch.Tensor,
        *,
        merges: int,
    ) -> StepInputs:
        """A step over the work that was filled in."""
        return StepInputs(
            tokens_T=tokens_T,
            positions_T=positions_T,
            slots_T=slots_T,
            table_SB=self.state[:, Column.TABLE :],
            work=self._work,
            partials=self._partials,
            programs=self._programs,
            merges=merges,
        )
