"""Registry: the engines that have sent a report lately, one by one or summed up in groups.

A report is the JSON of an `EngineInfo`. It begins with the name of the engine's group, and with its
speed, which `groups.lua` adds up without decoding the rest: a replica reads a few groups, and not
a thousand reports.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from service.queues.contract import ENGINE_SILENCE, EngineGroup, EngineInfo
from service.queues.redis.connection import RedisClient
from service.queues.redis.keys import ShardKeys, milliseconds

SHARED_FOR = 1.0
"""Seconds for which all replicas read the same sums."""


def encode_report(engine: EngineInfo) -> str:
    fields = asdict(engine)
    name = json.dumps(asdict(engine.without_load()))
    group = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()[:12]
    first = {"group": group, "tokens_per_second": fields.pop("tokens_per_second")}
    return json.dumps(first | fields, separators=(",", ":"))


class Registry:
    """Calls `dropped` with a description of each report that is malformed."""

    def __init__(
        self, client: RedisClient, keys: ShardKeys, *, dropped: Callable[[str], None]
    ) -> None:
        self._client = client
        self._keys = keys
        self._dropped = dropped

    async def reports(self) -> list[tuple[float, EngineInfo]]:
        """Each engine, with the seconds since its last report. Raises Unavailable."""
        now, table = await self._client.run([("TIME",), ("HGETALL", self._keys.engines)])
        found: list[tuple[float, EngineInfo]] = []
        for entry in table.values():
            seen, info = self._decode(entry)
            silence = now[0] + now[1] / 1e6 - seen
            if info is not None and silence <= ENGINE_SILENCE:
                found.append((silence, info))
        return found

    async def groups(self) -> list[EngineGroup]:
        """Raises Unavailable."""
        share = milliseconds(SHARED_FOR)
        command = self._client.script("groups", self._keys.admission, share=share)
        (reply,) = await self._client.run([command])
        rows: Sequence[tuple[int, float | None, str]]
        rows = json.loads(reply.decode("utf-8", "replace")) if reply else []
        found = []
        for engines, speed, entry in rows:
            _, info = self._decode(entry)
            if info is not None:
                total = info.tokens_per_second if speed is None else speed
                common = info.without_load()
                found.append(EngineGroup(common, engines=engines, tokens_per_second=total))
        return found

    def _decode(self, entry: Any) -> tuple[float, EngineInfo | None]:  # noqa: ANN401 - str or bytes
        """When it was sent (seconds, of the server's clock), and the report; None: malformed."""
        text = entry.decode("utf-8", "replace") if isinstance(entry, bytes) else entry
        seen, _, report = text.partition(" ")
        try:
            return int(seen) / 1000, EngineInfo.from_json(report)
        except (ValueError, TypeError):
            self._dropped("report of an engine")
            return 0.0, None
