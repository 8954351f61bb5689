"""WorkPools: the threads of the API for work that clients cause, a pool for each kind."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Self

from service.api.limits import ApiLimits
from service.api.observer import BUSY, ApiObserver
from service.fair_pool import FairPool


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkPools:
    """Tenants take turns in each of them; what waits is weighed in bytes."""

    bodies: FairPool  # parsing and validating JSON
    templates: FairPool  # chats to token ids, through the model's chat template
    tokens: FairPool  # text to token ids and back

    @classmethod
    def of(cls, limits: ApiLimits, observer: ApiObserver) -> Self:
        """Pools that start a thread when they first need one."""

        def pool(work: str, threads: int) -> FairPool:
            return FairPool(
                work,
                threads=threads,
                max_weight=limits.max_waiting_bytes,
                max_tenant_weight=limits.max_tenant_waiting_bytes,
                refused=partial(observer.call_refused, BUSY),
            )

        return cls(
            bodies=pool("parsing", 1),  # the interpreter lock allows no more
            templates=pool("the chat template", limits.text_threads),
            tokens=pool("tokenising", limits.text_threads),
        )

    def close(self) -> None:
        """Cancels what waits; what runs goes on to its end."""
        for pool in (self.bodies, self.templates, self.tokens):
            pool.close()
