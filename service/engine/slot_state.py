"""SlotState: what a packer keeps of the sequence in a batch slot. Shapes: `model.batch`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from model.batch import Floats, Ints, Words, mask_of
from service.engine.bans import BannedSequences, singles
from service.engine.output import stop_ids
from service.engine.penalties import PenaltyCounts
from service.engine.sequence import Sequence

NO_INTS: Ints = np.empty(0, np.int32)
NO_FLOATS: Floats = np.empty(0, np.float32)
Biases = tuple[Ints, Floats]  # token ids, values


@dataclass(slots=True, kw_only=True)
class SlotState:
    """What was written for the sequence in a batch slot."""

    owner: tuple[int, int]  # arrival, preemptions: a resumed sequence is a new owner
    banned: BannedSequences
    num_blocks: int = 0
    min_tokens: int = 0
    penalties: PenaltyCounts | None = None
    biases: Biases = (NO_INTS, NO_FLOATS)
    early_biases: Biases = (NO_INTS, NO_FLOATS)  # of the first min_tokens
    mask: Words | None = None  # of the allowed tokens; None: all
    adjusts: bool = False  # whether any logit of its rows is adjusted

    def bias(self, sequence: Sequence, drafts: list[int], *, index: int) -> Biases:
        """Biases of the output token after these drafts, of which this is the index."""
        early = index < self.min_tokens
        ids, values = self.early_biases if early else self.biases
        if not self.banned:
            return ids, values
        first = max(sequence.num_prompt, len(sequence.tokens) - self.banned.context)
        known = [*sequence.tokens[first:], *drafts]
        banned = np.array(sorted(self.banned.after(known)), np.int32)
        kept = ~np.isin(ids, banned)
        forbidden = np.full(len(banned), -np.inf, np.float32)
        return np.concatenate([ids[kept], banned]), np.concatenate([values[kept], forbidden])

    @classmethod
    def of(
        cls,
        sequence: Sequence,
        owner: tuple[int, int],
        *,
        vocab_size: int,
        eos_ids: frozenset[int],
    ) -> Self:
        """What does not change while the sequence holds the batch slot."""
        request = sequence.request
        params = request.sampling
        state = cls(owner=owner, banned=BannedSequences(params.banned))
        if params.repetition_penalty != 1.0:
            state.penalties = PenaltyCounts(request.prompt_ids[request.source :])
        elif params.presence_penalty or params.frequency_penalty:
            state.penalties = PenaltyCounts(())
        bias = dict(params.logit_bias) | dict.fromkeys(singles(params.banned), -np.inf)
        state.biases = _columns(bias)
        state.min_tokens = request.min_tokens
        if request.min_tokens:
            forbidden = dict.fromkeys(stop_ids(request, eos_ids), -np.inf)
            state.early_biases = _columns(bias | forbidden)
        if params.allowed:
            state.mask = mask_of(params.allowed, vocab_size=vocab_size)
        state.adjusts = bool(state.penalties or state.banned or bias or len(state.early_biases[0]))
        return state


def _columns(bias: dict[int, float]) -> Biases:
    ids = np.fromiter(bias, np.int32, len(bias))
    values = np.fromiter(bias.values(), np.float32, len(bias))
    return ids, values
