"""RedisQueue: the state machine in a Redis that API replicas and engines share, for any number.

Every edge of the machine is one Lua script, so it happens wholly or not at all and by the server's
clock; each may run twice. This file turns the contract's types into the scripts' arguments and
back; `redis_claims` takes work, `redis_journal` reads answers, `redis_wire` talks to the server,
`redis_keys` lists the keys. Needs Redis >= 7 or Valkey, one server and not a cluster of them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from service.messages import Allowance, End, FinishReason, Record, Submission
from service.queues.admission import (
    Meter,
    Usage,
    admission_cost,
    answer_share,
    idempotency_bytes,
    kept_bytes,
    request_bytes,
)
from service.queues.contract import (
    BLAME_KEPT,
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
from service.queues.observer import STOPPED, NullQueueObserver, QueueEvent, QueueObserver
from service.queues.redis.claims import CRASH_LOOP, DEADLINE, Claimer
from service.queues.redis.codec import encode_end, encode_tokens
from service.queues.redis.connection import Command, RedisUrl, Wire
from service.queues.redis.journal import JournalReader
from service.queues.redis.keys import ShardKeys, idempotency_name, milliseconds, shard_of
from service.queues.redis.pubsub import Wakeups
from service.queues.redis.scripts import load_scripts
from service.queues.redis.server import check_server

logger = logging.getLogger(__name__)

ENGINE_SILENCE = 10.0
"""Seconds after which an engine that was not heard of is no longer listed."""
FORGET_ENGINE = 600.0
"""Seconds after which an engine that holds nothing is forgotten."""
SWEPT_AT_ONCE = 256
"""Requests that one run of the sweeping script looks at: it keeps the server waiting."""
LINGER = 10.0
"""Seconds for which those who are reading a forgotten answer can read on."""

CANCELLED = encode_end(End(count=0, reason=FinishReason.CANCELLED))
_COUNTED = {
    WriteStatus.DUP: QueueEvent.DUP,
    WriteStatus.GAP: QueueEvent.GAP,
    WriteStatus.FENCED: QueueEvent.FENCED,
}


class RedisQueue:
    """The contract is `service.queues.contract.Queue`.

    `url` may say `allow_volatile=1` (a Redis without an append-only file is good enough) and
    `shards=<n>`: ids name their shard, each has its part of the limits, and what has one
    idempotency key must name one shard. Connects when first used.
    """

    shared = True

    def __init__(
        self, limits: QueueLimits, *, url: str, observer: QueueObserver | None = None
    ) -> None:
        self.limits = limits
        self._observer = NullQueueObserver() if observer is None else observer
        self._url = RedisUrl(url)
        self._shards = tuple(ShardKeys(shard) for shard in range(self._url.shards))
        self._wire = Wire(self._url, scripts=load_scripts(), restored=self._restored)
        self._wakeups = Wakeups(self._wire.connection)
        self._reader = JournalReader(self._wire, self._wakeups, dropped=self._drop)
        self._claimer = Claimer(
            self._wire,
            self._wakeups,
            limits=limits,
            shards=self._shards,
            observer=self._observer,
            dropped=self._drop,
            write=self.write,
        )

    async def open(self) -> None:
        info, _ = await self._wire.run_first([("INFO",), self._probe()])
        check_server(info, allow_volatile=self._url.allow_volatile)

    # --- the API's side -------------------------------------------------------------------
    async def charge(self, allowance: Allowance) -> Usage:
        limit = allowance.requests_per_minute
        if limit is None:
            return Usage()
        # One shard counts all calls of all keys: most of them belong to no shard.
        reply = await self._script("charge", self._shards[0], allowance.key, limit)
        wait, used = (float(ms) / 1000 for ms in reply)
        return Usage(requests=Meter(limit=limit, used=used), wait=wait)

    async def submit(self, submission: Submission) -> SubmitReply:
        limits, keys = self.limits, self._keys(submission.id)
        name = ""
        if submission.idempotency_key is not None:
            name = idempotency_name(submission.tenant, submission.idempotency_key)
        arguments: list[str | int] = [submission.id, submission.tenant, submission.manifest]
        # The nonce is this call's: sent twice, it is known from another call with the same id.
        arguments += [secrets.token_hex(6), name, submission.fingerprint]
        arguments += [milliseconds(limits.idempotency_ttl)]
        for limit in (limits.max_requests, limits.max_tokens, limits.max_per_tenant):
            arguments.append(max(1, limit // len(self._shards)))
        grace = submission.grace
        arguments += [milliseconds(limits.live_ttl), "" if grace is None else milliseconds(grace)]
        arguments += self._allowed(submission.allowance)
        for limit in (limits.max_bytes, limits.max_tenant_bytes):
            arguments.append(max(1, limit // len(self._shards)))
        arguments += [kept_bytes(submission), idempotency_bytes(submission)]
        for request in submission.requests:
            arguments += [request.id, admission_cost(request), request.timeout_ms or 0]
            arguments += [request.priority, request.to_json(), answer_share(request)]
            arguments += [request_bytes(request), " ".join(request.features)]
        status, followed, queued, tokens, *times = await self._script("submit", keys, *arguments)
        wait, used = (float(ms) / 1000 for ms in times)
        return SubmitReply(
            status=SubmitStatus(status.decode()),
            submission_id=followed.decode(),
            queued_requests=queued,
            queued_tokens=tokens,
            usage=self._usage(submission.allowance, used=used, wait=wait),
        )

    @staticmethod
    def _usage(allowance: Allowance | None, *, used: float, wait: float) -> Usage:
        if allowance is None or allowance.tokens_per_minute is None:
            return Usage()
        return Usage(tokens=Meter(limit=allowance.tokens_per_minute, used=used), wait=wait)

    def _allowed(self, allowance: Allowance | None) -> list[str | int]:
        """A key's name and limits in one shard; 0 is no limit."""
        if allowance is None:
            return ["", 0, 0]
        most = (allowance.tokens_per_minute, allowance.max_in_flight)
        shards = len(self._shards)
        return [allowance.key, *(0 if n is None else max(1, n // shards) for n in most)]

    async def lookup(self, submission_id: str) -> StoredSubmission | None:
        key = self._keys(submission_id).submission(submission_id)
        (fields,) = await self._wire.run([("HMGET", key, "ten", "man", "num")])
        if None in fields:
            return None
        tenant, manifest, num_requests = fields
        return StoredSubmission(
            id=submission_id,
            tenant=tenant.decode(),
            manifest=manifest.decode(),
            num_requests=int(num_requests),
        )

    async def read(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        return await self._reader.read(self._keys(request_id), request_id, after=after)

    async def read_page(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        return await self._reader.read_page(self._keys(request_id), request_id, after=after)

    def follow(self, request_id: str, *, after: int = 0) -> AsyncIterator[Record]:
        return self._reader.follow(self._keys(request_id), request_id, after=after)

    async def stop(self, request_ids: Sequence[str], reason: FinishReason) -> None:
        limits = self.limits
        only_overdue = int(reason is FinishReason.DEADLINE)
        payload = encode_end(End(count=0, reason=reason))
        times = (milliseconds(limits.resume_window), milliseconds(limits.live_ttl))
        stopped = await self._wire.run(
            [
                self._wire.script("stop", keys.admission, only_overdue, payload, *times, *ids)
                for keys, ids in self._by_shard(request_ids)
            ]
        )
        self._note(STOPPED[reason], sum(stopped))

    async def heartbeat(self, submission_ids: Sequence[str]) -> None:
        await self._wire.run(
            [
                self._wire.script("heartbeat", keys.admission, *ids)
                for keys, ids in self._by_shard(submission_ids)
            ]
        )

    async def forget(self, submission_id: str) -> None:
        keys = self._keys(submission_id)
        arguments = (submission_id, CANCELLED, milliseconds(LINGER))
        (stopped,) = await self._wire.run([self._wire.script("forget", keys.admission, *arguments)])
        self._note(QueueEvent.CANCELLED, stopped)

    async def sweep(self) -> int:
        limits = self.limits
        times = (milliseconds(limits.resume_window), milliseconds(limits.live_ttl))
        total = 0
        for keys in self._shards:
            looked_at = SWEPT_AT_ONCE
            while looked_at == SWEPT_AT_ONCE:
                looked_at, overdue, deserted = await self._script(
                    "sweep",
                    keys,
                    *(DEADLINE, *times, milliseconds(FORGET_ENGINE), SWEPT_AT_ONCE),
                    *(CANCELLED, milliseconds(limits.sweep_pause)),
                )
                self._note(QueueEvent.EXPIRED, overdue)
                self._note(QueueEvent.CANCELLED, deserted)
                total += overdue + deserted
        return total

    async def depth(self) -> QueueDepth:
        commands: list[Command] = []
        for keys in self._shards:
            commands.append(("HMGET", keys.admission, "q", "tok", "run"))
            commands.append(self._wire.script("oldest", keys.admission))
            commands.append(("HGET", keys.stored, "all"))
        replies = await self._wire.run(commands)
        queued, tokens, running = (
            sum(int(n or 0) for n in column) for column in zip(*replies[::3], strict=True)
        )
        ages = [int(age) / 1000 for age in replies[1::3] if age != b""]
        return QueueDepth(
            queued_requests=queued,
            queued_tokens=tokens,
            running_requests=running,
            oldest_seconds=max(ages, default=None),
            stored_bytes=sum(int(n or 0) for n in replies[2::3]),
        )

    async def engines(self) -> Sequence[EngineInfo]:
        now, *tables = await self._wire.run(
            [("TIME",), *(("HGETALL", keys.engines) for keys in self._shards)]
        )
        oldest = (now[0] - ENGINE_SILENCE) * 1000 + now[1] / 1000
        found: dict[str, EngineInfo] = {}
        for told in (value for table in tables for value in table.values()):
            seen, _, text = told.partition(b" ")
            try:
                if int(seen) >= oldest:
                    info = EngineInfo.from_json(text)
                    found[info.id] = info
            except (ValueError, TypeError):
                self._drop("what an engine tells of itself")
        return list(found.values())

    async def check(self) -> None:
        """A full memory passes: work is refused then (`storage_full`), but answers end."""
        await self._wire.run([self._probe()])

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
        """Raises Unavailable with the code `storage_full` where tokens were refused for want of
        memory: what was written of `writes` answers DUP next time.
        """
        replies = await self._wire.run([self._write_command(write) for write in writes])
        found = [WriteReply(WriteStatus(status.decode()), count) for status, count in replies]
        for reply in found:
            if reply.status in _COUNTED:
                self._observer.happened(_COUNTED[reply.status])
        return found

    def _write_command(self, write: Write) -> Command:
        lease, record = write.lease, write.record
        keys = self._keys(lease.request_id)
        owned = (lease.request_id, lease.epoch, lease.owner)
        if isinstance(record, End):
            window = milliseconds(self.limits.resume_window)
            return self._wire.script(
                "finish", keys.admission, *owned, record.count, encode_end(record), window
            )
        return self._wire.script(
            "append", keys.admission, *owned, record.start, len(record.ids), encode_tokens(record)
        )

    async def renew(self, leases: Sequence[Lease]) -> Sequence[str]:
        replies = await self._wire.run(self._lease_commands("renew", leases))
        return [request_id.decode() for lost in replies for request_id in lost]

    async def release(self, leases: Sequence[Lease], *, died: bool = False) -> None:
        limits = self.limits
        times = (milliseconds(limits.resume_window), milliseconds(BLAME_KEPT))
        options = (int(died), limits.max_attempts, CRASH_LOOP, *times)
        replies = await self._wire.run(self._lease_commands("release", leases, *options))
        self._note(QueueEvent.CRASHED, sum(crashed for _, crashed in replies))

    def _lease_commands(
        self, script: str, leases: Sequence[Lease], *options: str | bytes | int
    ) -> list[Command]:
        """One command per shard: the lease's length, options, (request, epoch, owner) of each."""
        arguments: dict[ShardKeys, list[str | bytes | int]] = {}
        for lease in leases:
            of_shard = arguments.setdefault(
                self._keys(lease.request_id), [milliseconds(self.limits.lease), *options]
            )
            of_shard += [lease.request_id, lease.epoch, lease.owner]
        return [
            self._wire.script(script, keys.admission, *of_shard)
            for keys, of_shard in arguments.items()
        ]

    async def stops(self) -> AsyncIterator[str]:
        hints: asyncio.Queue[bytes] = asyncio.Queue()
        wake = hints.put_nowait
        for keys in self._shards:
            self._wakeups.watch(keys.stops, wake)
        try:
            while True:
                message = await hints.get()
                if message:  # empty: the subscription stands, or was away
                    yield message.decode()
        finally:
            for keys in self._shards:
                self._wakeups.unwatch(keys.stops, wake)

    async def close(self) -> None:
        self._wire.refuse()
        self._reader.close()
        await self._wakeups.close()
        await self._wire.close()

    # --- both sides -----------------------------------------------------------------------
    def _keys(self, identifier: str) -> ShardKeys:
        return self._shards[shard_of(identifier, shards=len(self._shards))]

    def _by_shard(self, identifiers: Sequence[str]) -> list[tuple[ShardKeys, list[str]]]:
        found: dict[ShardKeys, list[str]] = {}
        for identifier in identifiers:
            found.setdefault(self._keys(identifier), []).append(identifier)
        return list(found.items())

    async def _script(self, name: str, keys: ShardKeys, *arguments: str | bytes | int) -> list[Any]:
        (reply,) = await self._wire.run([self._wire.script(name, keys.admission, *arguments)])
        return list(reply)

    def _note(self, event: QueueEvent, count: int) -> None:
        if count:
            self._observer.happened(event, count)

    def _drop(self, what: str, count: int = 1) -> None:
        self._observer.happened(QueueEvent.DROPPED, count)
        logger.warning("dropped %d malformed: %s", count, what)

    def _restored(self) -> None:
        self._observer.happened(QueueEvent.OUTAGE)
        logger.warning("redis answers again")
        self._wakeups.reconnect()
