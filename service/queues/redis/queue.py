"""RedisQueue: the state machine in a Redis shared by any number of API replicas and engines.

Each transition is one Lua script, so it is atomic and uses the server's clock; each may run twice.
This module converts the contract's types to the scripts' arguments and back; `claims` takes work,
`journal` reads answers, `connection` sends the commands, `keys` lists the keys. Needs Redis >= 7 or
Valkey, a single primary and not a cluster.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from service.messages import Allowance, End, FinishReason, GenerationRequest, Record, Submission
from service.queues.admission import (
    Meter,
    RateUsage,
    admission_cost,
    answer_share,
    base_bytes,
    idempotency_bytes,
    kept_bytes,
    request_bytes,
    token_bytes,
)
from service.queues.contract import (
    BLAME_KEPT,
    ENGINE_SILENCE,
    Claim,
    EngineInfo,
    Lease,
    QueueDepth,
    QueueLimits,
    StoredSubmission,
    SubmitReply,
    SubmitStatus,
    Write,
    WriteReply,
    WriteStatus,
)
from service.queues.observer import (
    STOPPED,
    QueueEvent,
    QueueObserver,
    report_replies,
)
from service.queues.redis.claims import Claimer
from service.queues.redis.codec import encode_end, encode_tokens
from service.queues.redis.connection import Command, RedisClient, RedisUrl, check_server, present
from service.queues.redis.depth import decode_depth, depth_commands
from service.queues.redis.journal import JournalReader
from service.queues.redis.keys import ShardKeys, idempotency_name, milliseconds, shard_of
from service.queues.redis.pubsub import Wakeups
from service.queues.redis.scripts import load_scripts

logger = logging.getLogger(__name__)

FORGET_ENGINE = 600.0
"""Seconds after which an engine that runs nothing is forgotten."""
SWEEP_BATCH = 256
"""Requests that one run of the sweep script examines: it blocks the server meanwhile."""
LINGER = 10.0
"""Seconds for which the current readers of a forgotten answer can continue."""


class RedisQueue:
    """The contract is `service.queues.contract.Queue`.

    `url` accepts `allow_volatile=1` (a Redis without an append-only file is good enough) and
    `shards=<n>`: ids name their shard, each shard has its part of the limits, and submissions with
    the same idempotency key must name the same shard. Connects at the first call.
    """

    shared = True

    def __init__(
        self, limits: QueueLimits, *, url: str, observer: QueueObserver | None = None
    ) -> None:
        self.limits = limits
        self._observer = QueueObserver() if observer is None else observer
        self._url = RedisUrl(url)
        self._shards = tuple(
            ShardKeys(shard, prefix=self._url.prefix) for shard in range(self._url.shards)
        )
        self._client = RedisClient(self._url, scripts=load_scripts(), restored=self._restored)
        self._wakeups = Wakeups(self._client.connection)
        self._rules = {
            "lease": milliseconds(limits.lease),
            "max_attempts": limits.max_attempts,
            "live_ttl": milliseconds(limits.live_ttl),
            "window": milliseconds(limits.resume_window),
            "keep_blame": milliseconds(BLAME_KEPT),
        }
        self._reader = JournalReader(self._client, self._wakeups, dropped=self._drop)
        self._claimer = Claimer(
            self._client,
            self._wakeups,
            lease=limits.lease,
            rules=self._rules,
            shards=self._shards,
            observer=self._observer,
            dropped=self._drop,
            write=self.write,
        )

    async def open(self) -> None:
        info, _ = await self._client.run_first([("INFO",), self._probe()])
        check_server(info, allow_volatile=self._url.allow_volatile)

    # --- the API's side -------------------------------------------------------------------
    async def charge(self, allowance: Allowance) -> RateUsage:
        limit = allowance.requests_per_minute
        if limit is None:
            return RateUsage()
        # One shard counts all calls of all keys: most of them belong to no shard.
        reply = await self._run("charge", self._shards[0], key=allowance.key, limit=limit)
        wait, used = (float(ms) / 1000 for ms in reply)
        return RateUsage(requests=Meter(limit=limit, used=used), wait=wait)

    async def submit(self, submission: Submission) -> SubmitReply:
        limits, allowance, key = self.limits, submission.allowance, submission.idempotency_key
        tokens_per_minute = None if allowance is None else allowance.tokens_per_minute
        status, followed, queued, tokens, *times = await self._run(
            "submit",
            self._keys(submission.id),
            submission.manifest,
            submission.input,
            *(request.to_json() for request in submission.requests),
            id=submission.id,
            tenant=submission.tenant,
            # Identifies this call: the script recognises it if it is sent again.
            nonce=secrets.token_hex(6),
            fingerprint=submission.fingerprint,
            idempotency=None if key is None else idempotency_name(submission.tenant, key),
            idempotency_ttl=milliseconds(limits.idempotency_ttl),
            live_ttl=milliseconds(limits.live_ttl),
            grace=None if submission.grace is None else milliseconds(submission.grace),
            max_requests=self._per_shard(limits.max_requests),
            max_tokens=self._per_shard(limits.max_tokens),
            max_per_tenant=self._per_shard(limits.max_per_tenant),
            max_bytes=self._per_shard(limits.max_bytes),
            max_tenant_bytes=self._per_shard(limits.max_tenant_bytes),
            kept_bytes=kept_bytes(submission),
            base_bytes=base_bytes(submission),
            token_bytes=token_bytes(submission),
            keep=None if submission.keep is None else milliseconds(submission.keep),
            idempotency_bytes=idempotency_bytes(submission),
            key=None if allowance is None else allowance.key,
            tokens_per_minute=self._per_shard(tokens_per_minute),
            max_in_flight=self._per_shard(None if allowance is None else allowance.max_in_flight),
            requests=[_admitted(request) for request in submission.requests],
        )
        wait, used = (float(ms) / 1000 for ms in times)
        usage = RateUsage()
        if tokens_per_minute is not None:
            usage = RateUsage(tokens=Meter(limit=tokens_per_minute, used=used), wait=wait)
        return SubmitReply(
            status=SubmitStatus(status.decode()),
            submission_id=followed.decode(),
            queued_requests=queued,
            queued_tokens=tokens,
            usage=usage,
        )

    def _per_shard(self, limit: int | None) -> int | None:
        return None if limit is None else max(1, limit // len(self._shards))

    async def lookup(self, submission_id: str) -> StoredSubmission | None:
        key = self._keys(submission_id).submission(submission_id)
        (fields,) = await self._client.run([("HMGET", key, "ten", "man", "num")])
        if None in fields:
            return None
        tenant, manifest, num_requests = fields
        return StoredSubmission(
            id=submission_id,
            tenant=tenant.decode(),
            manifest=manifest.decode(),
            num_requests=int(num_requests),
        )

    async def read_input(self, submission_id: str) -> str | None:
        key = self._keys(submission_id).submission(submission_id)
        (value,) = await self._client.run([("HGET", key, "in")])
        return None if value is None else str(value.decode())

    async def touch(self, submission_ids: Sequence[str]) -> None:
        await self._run_by_shard("touch", submission_ids, submission_ids)

    async def read(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        return await self._reader.read(self._keys(request_id), request_id, after=after)

    async def read_page(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        return await self._reader.read_page(self._keys(request_id), request_id, after=after)

    def follow(self, request_id: str, *, after: int = 0) -> AsyncIterator[Record]:
        return self._reader.follow(self._keys(request_id), request_id, after=after)

    async def stop(self, request_ids: Sequence[str], reason: FinishReason) -> None:
        overdue = reason is FinishReason.DEADLINE
        stopped = await self._run_by_shard("stop", request_ids, request_ids, only_overdue=overdue)
        self._note(STOPPED[reason], sum(stopped))

    async def heartbeat(self, submission_ids: Sequence[str]) -> None:
        await self._run_by_shard("heartbeat", submission_ids, submission_ids)

    async def forget(self, submission_id: str) -> None:
        keys, linger = self._keys(submission_id), milliseconds(LINGER)
        (cancelled,) = await self._run(
            "forget", keys, submission=submission_id, linger=linger, window=self._rules["window"]
        )
        self._note(QueueEvent.CANCELLED, cancelled)

    async def sweep(self) -> int:
        total = 0
        for keys in self._shards:
            examined = SWEEP_BATCH
            while examined == SWEEP_BATCH:
                examined, overdue, abandoned = await self._run(
                    "sweep",
                    keys,
                    batch=SWEEP_BATCH,
                    forget_engine=milliseconds(FORGET_ENGINE),
                    sweep_pause=milliseconds(self.limits.sweep_pause),
                    **self._rules,
                )
                self._note(QueueEvent.EXPIRED, overdue)
                self._note(QueueEvent.CANCELLED, abandoned)
                total += overdue + abandoned
        return total

    async def depth(self) -> QueueDepth:
        commands = [
            command for keys in self._shards for command in depth_commands(self._client, keys)
        ]
        return decode_depth(await self._client.run(commands))

    async def engines(self) -> Sequence[EngineInfo]:
        now, *tables = await self._client.run(
            [("TIME",), *(("HGETALL", keys.engines) for keys in self._shards)]
        )
        oldest = (now[0] - ENGINE_SILENCE) * 1000 + now[1] / 1000
        found: dict[str, EngineInfo] = {}
        for report in (value for table in tables for value in table.values()):
            seen, _, text = report.partition(b" ")
            try:
                if int(seen) >= oldest:
                    info = EngineInfo.from_json(text)
                    found[info.id] = info
            except (ValueError, TypeError):
                self._drop("report of an engine")
        return list(found.values())

    async def check(self) -> None:
        """Passes if the memory is full: work is refused then (`storage_full`), but answers end."""
        await self._client.run([self._probe()])

    def _probe(self) -> Command:
        """A write that changes nothing. A server refuses it if it is a replica or cannot persist,
        and allows it if its memory is full.
        """
        return ("DEL", self._shards[0].probe)

    # --- the engine's side ----------------------------------------------------------------
    async def claim(
        self, engine: EngineInfo, *, limit: int, wait: float, under_served: int = 0
    ) -> Sequence[Claim]:
        return await self._claimer.claim(engine, limit=limit, wait=wait, under_served=under_served)

    async def write(self, writes: Sequence[Write]) -> Sequence[WriteReply]:
        """Raises Unavailable with the code `storage_full` if the server had no memory for tokens:
        those of `writes` that were written return DUP next time.
        """
        replies = await self._client.run([self._write_command(write) for write in writes])
        found = [WriteReply(WriteStatus(status.decode()), count) for status, count in replies]
        report_replies(found, self._observer)
        return found

    def _write_command(self, write: Write) -> Command:
        record = write.record
        key, lease = self._keys(write.lease.request_id).admission, _leased(write.lease)
        if isinstance(record, End):
            return self._client.script(
                "finish",
                key,
                encode_end(record),
                count=record.count,
                window=self._rules["window"],
                **lease,
            )
        count = len(record.ids)
        return self._client.script(
            "append", key, encode_tokens(record), start=record.start, count=count, **lease
        )

    async def renew(self, leases: Sequence[Lease]) -> Sequence[str]:
        replies = await self._run_by_shard("renew", *_split(leases))
        return [request_id.decode() for lost in replies for request_id in lost]

    async def release(self, leases: Sequence[Lease], *, died: bool = False) -> None:
        replies = await self._run_by_shard("release", *_split(leases), died=died)
        self._note(QueueEvent.CRASHED, sum(crashed for _, crashed in replies))

    async def stops(self) -> AsyncIterator[str]:
        hints: asyncio.Queue[bytes] = asyncio.Queue()
        wake = hints.put_nowait
        for keys in self._shards:
            self._wakeups.watch(keys.stops, wake)
        try:
            while True:
                message = await hints.get()
                if message:  # empty: subscribed, at first or again
                    yield message.decode()
        finally:
            for keys in self._shards:
                self._wakeups.unwatch(keys.stops, wake)

    async def close(self) -> None:
        self._client.refuse()
        self._reader.close()
        await self._wakeups.close()
        await self._client.close()

    # --- both sides -----------------------------------------------------------------------
    def _keys(self, identifier: str) -> ShardKeys:
        return self._shards[shard_of(identifier, shards=len(self._shards))]

    async def _run_by_shard(
        self, script: str, ids: Sequence[str], items: Sequence[object], **arguments: bool
    ) -> list[Any]:
        """Runs a script once per shard, with the items of the ids that name it."""
        of_shard: dict[ShardKeys, list[object]] = {}
        for identifier, item in zip(ids, items, strict=True):
            of_shard.setdefault(self._keys(identifier), []).append(item)
        return await self._client.run(
            [
                self._client.script(script, keys.admission, items=group, **arguments, **self._rules)
                for keys, group in of_shard.items()
            ]
        )

    async def _run(
        self, script: str, keys: ShardKeys, /, *values: str | bytes, **arguments: object
    ) -> list[Any]:
        command = self._client.script(script, keys.admission, *values, **arguments)
        (reply,) = await self._client.run([command])
        return list(reply)

    def _note(self, event: QueueEvent, count: int) -> None:
        if count:
            self._observer.happened(event, count)

    def _drop(self, what: str, count: int = 1) -> None:
        self._observer.happened(QueueEvent.DROPPED, count)
        logger.warning("dropped %d malformed: %s", count, what)

    def _restored(self) -> None:
        self._observer.happened(QueueEvent.OUTAGE)
        logger.warning("redis is available again")
        self._wakeups.reconnect()


def _leased(lease: Lease) -> dict[str, Any]:
    """A lease as the scripts expect it."""
    return {"request": lease.request_id, "epoch": lease.epoch, "owner": lease.owner}


def _split(leases: Sequence[Lease]) -> tuple[list[str], list[dict[str, Any]]]:
    return [lease.request_id for lease in leases], [_leased(lease) for lease in leases]


def _admitted(request: GenerationRequest) -> dict[str, Any]:
    """A request as `submit.lua` expects it."""
    return present(
        id=request.id,
        cost=admission_cost(request),
        timeout=request.timeout_ms or None,
        priority=request.priority,
        share=answer_share(request),
        bytes=request_bytes(request),
        features=" ".join(request.features),
    )
