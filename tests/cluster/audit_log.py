"""AuditLog: the fate of every request that the queue accepted.

It reads the requests in Redis often enough to see each end before the resume window is over. A
request that vanishes without an end was lost.
"""

from __future__ import annotations

from collections import Counter

from redis import Redis
from redis.exceptions import RedisError

from tests.cluster.cluster import Cluster

IN_FLIGHT = "in flight"


class AuditLog:
    """`fates`: request id -> finish reason, or IN_FLIGHT."""

    def __init__(self, cluster: Cluster) -> None:
        self.fates: dict[str, str] = {}
        self.vanished: set[str] = set()
        self._prefix = cluster.key("r:")
        self._port = cluster.redis.port

    def update(self) -> bool:
        """Reads Redis. Returns False, and changes nothing, if Redis does not respond."""
        found: dict[str, str] = {}
        try:
            with Redis(port=self._port, decode_responses=True, socket_timeout=60) as redis:
                keys = list(redis.scan_iter(match=f"{self._prefix}*", count=1000))
                with redis.pipeline(transaction=False) as pipeline:
                    for key in keys:
                        pipeline.hmget(key, "st", "fin")
                    for key, (state, ending) in zip(keys, pipeline.execute(), strict=True):
                        if state is None:
                            continue  # it expired since the scan
                        fate = ending.split('"')[3] if state == "ended" else IN_FLIGHT
                        found[key.removeprefix(self._prefix)] = fate
        except RedisError:
            return False
        open_before = {each for each, fate in self.fates.items() if fate == IN_FLIGHT}
        self.vanished |= open_before - found.keys()
        self.fates |= found
        return True

    def tally(self) -> Counter[str]:
        """Number of requests by fate."""
        return Counter(self.fates.values())
