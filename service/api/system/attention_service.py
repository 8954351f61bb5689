"""AttentionDesk: one call at a time to the reader of a network's attention, tenants in turns.

Reading is seconds of computing that the engine has to share the machine with, so there is one
thread for it, and few calls may wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from service.api.limits import ApiLimits
from service.api.observer import BUSY, ApiObserver
from service.fair_pool import FairPool

DIGITS = 4  # of a weight: over 512 tokens an even share is 0.002


class AttentionReader(Protocol):
    """The network's side. `read` blocks and may be called from any thread."""

    num_layers: int
    num_heads: int

    def read(
        self, tokens: Sequence[int], *, layer: int | None, head: int | None
    ) -> Sequence[Sequence[float]]:
        """For each token its weights over the tokens up to itself; None is the mean over all."""
        ...


class AttentionDesk:
    """Lets one call at a time to the reader."""

    def __init__(self, reader: AttentionReader, limits: ApiLimits, observer: ApiObserver) -> None:
        self.reader = reader
        self._pool = FairPool(
            "attention",
            threads=1,
            max_weight=limits.max_waiting_maps,
            max_tenant_weight=limits.max_tenant_waiting_maps,
            refused=partial(observer.call_refused, BUSY),
        )

    async def read(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        *,
        tenant: str,
        layer: int | None,
        head: int | None,
    ) -> list[list[float]]:
        """The rounded rows of some positions. Raises RateLimited or Unavailable if too many calls
        wait. A caller that leaves while its rows are read frees nothing: the thread cannot be
        stopped.
        """
        work = partial(self._rows, tokens, positions, layer=layer, head=head)
        return await self._pool.run(tenant, work)

    def close(self) -> None:
        """Cancels the calls that wait."""
        self._pool.close()

    def _rows(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        *,
        layer: int | None,
        head: int | None,
    ) -> list[list[float]]:
        rows = self.reader.read(tokens, layer=layer, head=head)
        return [[round(weight, DIGITS) for weight in rows[position]] for position in positions]
