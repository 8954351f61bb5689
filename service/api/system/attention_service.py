"""AttentionService: reads a network's attention for one call at a time, tenants in turns.

A read takes seconds of CPU time that the engine needs too: there is one thread, and a short queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Protocol

from fastapi import Depends, Request

from service.api.limits import ApiLimits
from service.api.observer import BUSY, ApiObserver
from service.fair_pool import FairPool

DIGITS = 4  # of a weight: over 512 tokens the mean is 0.002


class AttentionReader(Protocol):
    """Reads attention from the network. `read` blocks; any thread may call it."""

    num_layers: int
    num_heads: int

    def read(
        self, tokens: Sequence[int], *, layer: int | None, head: int | None
    ) -> Sequence[Sequence[float]]:
        """Returns each token's weights over the tokens up to itself. None: the mean over all
        layers, or all heads.
        """
        ...


class AttentionService:
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
        """Returns the rounded rows at `positions`. Raises RateLimited or Unavailable if too many
        calls wait. Cancelling this does not stop a read that has begun.
        """

        def rows() -> list[list[float]]:
            weights = self.reader.read(tokens, layer=layer, head=head)
            return [[round(weight, DIGITS) for weight in weights[at]] for at in positions]

        return await self._pool.run(tenant, rows)

    def close(self) -> None:
        """Cancels the calls that wait."""
        self._pool.close()


async def _attention(request: Request) -> AttentionService | None:
    service = request.app.state.attention
    assert service is None or isinstance(service, AttentionService)  # noqa: S101  # see build_app
    return service


Attention = Annotated[AttentionService | None, Depends(_attention)]
"""None if no network is in the process."""
