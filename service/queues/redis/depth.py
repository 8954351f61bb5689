"""The queue's depth: the counters of each shard, as `requests.lua` keeps them, summed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from service.queues.contract import ModelDepth, QueueDepth
from service.queues.redis.connection import Command, RedisClient
from service.queues.redis.keys import ShardKeys


def depth_commands(client: RedisClient, keys: ShardKeys) -> tuple[Command, ...]:
    """The commands that read the counters of one shard."""
    return (
        ("HMGET", keys.admission, "q", "tok", "run"),
        client.script("oldest", keys.admission),
        ("HGET", keys.stored, "all"),
        ("HGETALL", keys.models),
    )


def decode_depth(replies: Sequence[Any]) -> QueueDepth:
    """The sum over shards; `replies` are those of `depth_commands`, shard by shard."""
    counts, ages, stored, models = (replies[field::4] for field in range(4))
    queued, tokens, running = (
        sum(int(number or 0) for number in column) for column in zip(*counts, strict=True)
    )
    return QueueDepth(
        queued_requests=queued,
        queued_tokens=tokens,
        running_requests=running,
        oldest_seconds=max((int(age) / 1000 for age in ages if age != b""), default=None),
        stored_bytes=sum(int(number or 0) for number in stored),
        by_model=_by_model(models),
    )


def _by_model(tables: Sequence[Mapping[bytes, bytes]]) -> dict[str, ModelDepth]:
    totals: Counter[tuple[str, str]] = Counter()
    for name, number in (item for table in tables for item in table.items()):
        field, _, model = name.decode().partition(" ")
        totals[model, field] += int(number)
    return {
        model: ModelDepth(
            queued_requests=totals[model, "q"],
            queued_tokens=totals[model, "tok"],
            running_requests=totals[model, "run"],
        )
        for model, _ in list(totals)
    }
