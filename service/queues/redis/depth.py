"""The queue's depth: the counters of a shard, as `requests.lua` keeps them, and their sum."""

from __future__ import annotations

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
    """The depth of one shard; `replies` are those of `depth_commands`."""
    counters, age, stored, models = replies
    queued, tokens, running = (int(number or 0) for number in counters)
    return QueueDepth(
        queued_requests=queued,
        queued_tokens=tokens,
        running_requests=running,
        oldest_seconds=None if age == b"" else int(age) / 1000,
        stored_bytes=int(stored or 0),
        by_model=_by_model(models),
    )


def _by_model(table: Mapping[bytes, bytes]) -> dict[str, ModelDepth]:
    numbers: dict[str, dict[str, int]] = {}
    for name, number in table.items():
        field, _, model = name.decode().partition(" ")
        numbers.setdefault(model, {})[field] = int(number)
    return {
        model: ModelDepth(
            queued_requests=fields.get("q", 0),
            queued_tokens=fields.get("tok", 0),
            running_requests=fields.get("run", 0),
        )
        for model, fields in numbers.items()
    }


def sum_depths(depths: Sequence[QueueDepth]) -> QueueDepth:
    """The depth of all shards."""
    totals: dict[str, ModelDepth] = {}
    for model, part in (item for depth in depths for item in depth.by_model.items()):
        before = totals.get(model, ModelDepth())
        totals[model] = ModelDepth(
            queued_requests=before.queued_requests + part.queued_requests,
            queued_tokens=before.queued_tokens + part.queued_tokens,
            running_requests=before.running_requests + part.running_requests,
        )
    ages = [depth.oldest_seconds for depth in depths if depth.oldest_seconds is not None]
    return QueueDepth(
        queued_requests=sum(depth.queued_requests for depth in depths),
        queued_tokens=sum(depth.queued_tokens for depth in depths),
        running_requests=sum(depth.running_requests for depth in depths),
        oldest_seconds=max(ages, default=None),
        stored_bytes=sum(depth.stored_bytes for depth in depths),
        by_model=totals,
    )
