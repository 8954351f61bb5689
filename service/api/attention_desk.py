"""AttentionDesk: one call at a time to whatever reads attention off a network.

Reading is seconds of computing that the engine has to share the machine with, so there is no queue
for it: who comes while another is served is asked to come again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from service.errors import Unavailable

DIGITS = 4  # of a weight: over 512 tokens an even share is 0.002


class AttentionReader(Protocol):
    """What knows the network. `read` blocks and may be called from any thread."""

    num_layers: int
    num_heads: int

    def read(
        self, tokens: Sequence[int], *, layer: int | None, head: int | None
    ) -> Sequence[Sequence[float]]:
        """For each token its weights over the tokens up to itself; None is the mean over all."""
        ...


class AttentionDesk:
    """Lets one call at a time to the reader."""

    def __init__(self, reader: AttentionReader) -> None:
        self.reader = reader
        self._reading: asyncio.Task[list[list[float]]] | None = None

    async def read(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        *,
        layer: int | None,
        head: int | None,
    ) -> list[list[float]]:
        """The rounded rows of some positions. Raises Unavailable while it reads for another.

        A caller that leaves frees nothing: the thread cannot be stopped.
        """
        if self._reading is not None and not self._reading.done():
            raise Unavailable("attention is being read for another call", retry_after=1)
        self._reading = asyncio.create_task(
            asyncio.to_thread(self._rows, tokens, positions, layer=layer, head=head)
        )
        return await asyncio.shield(self._reading)

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
