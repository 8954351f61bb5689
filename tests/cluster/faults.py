"""Random faults of a soak.

The first API replica and the first engine are never killed or replaced, because their memory is
compared at the end. All other processes may be killed at any time.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable

from tests.cluster.cluster import Cluster
from tests.cluster.processes import Replica

LOG_TAIL = 4000  # characters of the log of a process that ended by itself


class Faults:
    """`done` counts faults by name. `api` and `engine` are the replicas that are never ended."""

    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self.done: Counter[str] = Counter()
        self.api = cluster.apis[0]
        self.engine = cluster.engines[0]
        self._cluster = cluster
        self._rng = rng
        self._faults: dict[str, tuple[float, Callable[[], Awaitable[None]]]] = {
            "engine killed": (5, self._kill_engine),
            "engine replaced": (2, self._roll_engine),
            "engine stopped for a while": (3, self._stop_engine),
            "API killed": (2, self._kill_api),
            "API replaced": (1, self._roll_api),
            "API stopped for a while": (1, self._stop_api),
            "Redis paused": (2, self._pause_redis),
            "Redis stopped for a while": (1, self._stop_redis),
        }

    async def inject(self) -> None:
        """Injects one fault and replaces what it ended. Raises AssertionError if a process had
        ended by itself.
        """
        await self._replace_ended()
        names = list(self._faults)
        weights = [self._faults[name][0] for name in names]
        (name,) = self._rng.choices(names, weights=weights)
        await self._faults[name][1]()
        self.done[name] += 1

    async def _replace_ended(self) -> None:
        """Raises AssertionError if a process ended by itself; replaces it."""
        gone = [each for each in (*self._cluster.engines, *self._cluster.apis) if not each.state]
        for each in gone:
            await asyncio.to_thread(self._cluster.replace(each).wait_until_ready)
        said = [f"{each.log.name}: {each.log.read_text()[-LOG_TAIL:]}" for each in gone]
        assert not gone, f"ended by themselves: {' '.join(said)}"

    async def _kill_engine(self) -> None:
        victim = self._rng.choice(
            [each for each in self._cluster.engines if each is not self.engine]
        )
        await asyncio.to_thread(victim.kill)
        await asyncio.to_thread(self._cluster.replace(victim).wait_until_ready)

    async def _roll_engine(self) -> None:
        victims = [each for each in self._cluster.engines if each is not self.engine]
        await self._cluster.roll(self._rng.choice(victims))

    async def _stop_engine(self) -> None:
        victim = self._rng.choice(self._cluster.engines)
        await self._stop(victim, self._rng.uniform(0.2, 2.5) * self._cluster.timings.lease)

    async def _kill_api(self) -> None:
        victim = self._api_to_end()
        await asyncio.to_thread(self._cluster.count_before_end, victim)
        await asyncio.to_thread(victim.kill)
        await asyncio.to_thread(self._cluster.replace(victim).wait_until_ready)

    async def _roll_api(self) -> None:
        await self._cluster.roll(self._api_to_end())

    async def _stop_api(self) -> None:
        await self._stop(self._rng.choice(self._cluster.apis), self._rng.uniform(0.2, 2))

    async def _pause_redis(self) -> None:
        milliseconds = self._rng.randint(200, 1500)
        await asyncio.to_thread(self._cluster.ask, "CLIENT", "PAUSE", milliseconds, "ALL")
        await asyncio.sleep(milliseconds / 1000)

    async def _stop_redis(self) -> None:
        pid = self._cluster.redis.pid
        redis = Replica(pid, self._cluster.folder / "redis.log", exit_code=lambda: None)
        await self._stop(redis, self._rng.uniform(0.2, 1.5) * self._cluster.timings.lease)

    async def _stop(self, replica: Replica, seconds: float) -> None:
        await asyncio.to_thread(replica.pause)
        try:
            await asyncio.sleep(seconds)
        finally:
            await asyncio.to_thread(replica.resume)

    def _api_to_end(self) -> Replica:
        return self._rng.choice([each for each in self._cluster.apis if each is not self.api])
