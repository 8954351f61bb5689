"""The ways of a decode step, recorded for every rung: a token a sequence, nothing scored.

    likeliest   seats ── network ── head's tops ── write-back
    networks    seats ── network ── head's logits and tops
    choices                                      logits and tops ── choice ── write-back

Between the last two the logits may be adjusted, and the tops with them. A recorded way reads seats
where they were uploaded to and leaves everything else in the workspace.
"""

from __future__ import annotations

import torch

from model.kernels.choice import choose
from model.kernels.inputs import advance, decode_rows
from model.kernels.matmul import Product
from model.runners.cuda.accelerator import Accelerator
from model.runners.cuda.buckets import Ladder, rungs
from model.runners.cuda.network import FusedNetwork
from model.runners.cuda.workspace import Workspace


class DecodeLadders:
    """A ladder a way. `batch_slots_S` is where a step's seats lie first; `pool` holds K and V."""

    def __init__(
        self,
        accelerator: Accelerator,
        network: FusedNetwork,
        space: Workspace,
        *,
        batch_slots_S: torch.Tensor,
        pool: torch.Tensor,
        block_size: int,
    ) -> None:
        self._network = network
        self._space = space
        self._seats_S = batch_slots_S
        self._pool = pool
        self._block_size = block_size
        self.sizes = rungs(len(space.tokens_R))
        self.networks = Ladder(accelerator, self.sizes, self._run_network)
        self.choices = Ladder(accelerator, self.sizes, self._choose)
        self.likeliest = Ladder(accelerator, self.sizes, self._run_likeliest)

    def of(self, *, likeliest_alone: bool) -> tuple[Ladder, ...]:
        """The ladders that a step climbs, in order."""
        return (self.likeliest,) if likeliest_alone else (self.networks, self.choices)

    def all(self) -> tuple[Ladder, ...]:
        """Those that any step climbs."""
        general = self.of(likeliest_alone=False)
        return (*general, self.likeliest) if self._network.fuses_head else general

    def _run_likeliest(self, size: int) -> None:
        tops = self._space.tops.of(size)
        self._network.tops(self._hidden(size), None, out=tops, logits_RV=None)
        advance(self._space.state, self._seats_S[:size], tops.ids_RN[:, 0], stored=1)

    def _run_network(self, size: int) -> None:
        tops, logits_RV = self._space.tops.of(size), self._space.logits_RV[:size]
        self._network.tops(self._hidden(size), None, out=tops, logits_RV=logits_RV)

    def _choose(self, size: int) -> None:
        space, seats_R = self._space, self._seats_S[:size]
        tokens_R = choose(space.logits_RV[:size], space.state, seats_R, tops=space.tops.of(size))
        advance(space.state, seats_R, tokens_R, stored=1)
        space.tokens_R[:size].copy_(tokens_R)

    def _hidden(self, size: int) -> tuple[torch.Tensor, Product]:
        """The end of the residual stream."""
        space, batch_slots_S = self._space, self._seats_S[:size]
        tokens, positions, slots, contexts = decode_rows(
            space.state, batch_slots_S, block_size=self._block_size
        )
        space.fill(space.starts_S1[: size + 1], contexts, batch_slots_S)
        inputs = space.inputs(tokens, positions, slots, merges=size)
        return self._network.hidden(inputs, self._pool, block_size=self._block_size)
