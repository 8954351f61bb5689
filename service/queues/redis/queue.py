"""RedisQueue: the state machine in a Redis shared by any number of API replicas and engines.

Each transition is one Lua script, so it is atomic and uses the server's clock; each may run twice.
This module converts the contract's types to the scripts' arguments and back; `claims` takes work,
`journal` reads answers, `connection` sends the commands, `servers` finds the primary, `keys` lists
the keys. It is one shard, all of whose keys are on one primary; `sharded` makes one queue of many.
Needs Redis >= 7 or Valkey.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Sequence
from functools import partial
from typing import Any

from service.errors import Unavailable
from service.messages import (
    Allowance,
    End,
    FinishReason,
    Record,
    Submission,
    Tokens,
)
from service.queues.admission import (
    Meter,
    RateUsage,
)
from service.queues.contract import (
    BLAME_KEPT,
    Claim,
    EngineGroup,
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
from service.queues.observer import STOPPED, QueueEvent, QueueObserver, report_replies
from service.queues.redis.claims import Claimer, Look
from service.queues.redis.codec import encode_end, encode_tokens
from service.queues.redis.connection import Command, RedisClient, check_server
from service.queues.redis.depth import decode_depth, depth_commands
from service.queues.redis.errors import ServerAway
from service.queues.redis.held import HeldPrefixes
from service.queues.redis.journal import JournalReader, position_of
from service.queues.redis.keys import milliseconds
from service.queues.redis.lending import Lender
from service.queues.redis.mailbox import Mailbox
from service.queues.redis.pubsub import Wake, Wakeups
from service.queues.redis.registry import Registry
from service.queues.redis.scripts import load_scripts
from service.queues.redis.servers import Shard
from service.queues.redis.submissions import decode_submit, submit_command
from service.queues.usage import Usage, decode_usage, sum_usage

logger = logging.getLogger(__name__)

FORGET_ENGINE = 600.0
"""Seconds after which an engine that runs nothing is forgotten."""
SWEEP_BATCH = 256
"""Requests that one run of the sweep script examines: it blocks the server meanwhile."""
WRITE_BATCH = 128
"""Records that one run of a script journals: it blocks the server meanwhile."""
REPLICA_TIMEOUT = 1.0
"""Seconds that replicas have to acknowledge; a twentieth of that after they did not."""
LINGER = 10.0
"""Seconds for which the current readers of a forgotten answer can continue."""


class RedisQueue:
    """The contract is `service.queues.contract.Queue`. Connects at the first call."""

    shared = True

    def __init__(
        self, limits: QueueLimits, *, shard: Shard, observer: QueueObserver | None = None
    ) -> None:
        self.limits = limits
        self._observer = QueueObserver() if observer is None else observer
        self._shard = shard
        self._keys = shard.keys
        self._replicated = True  # the last time that it was asked
        self._client = RedisClient(shard.server, scripts=load_scripts(), restored=self._restored)
        self._wakeups = Wakeups(self._client.connection)
        self._rules = {
            "lease": milliseconds(limits.lease),
            "max_attempts": limits.max_attempts,
            "live_ttl": milliseconds(limits.live_ttl),
            "window": milliseconds(limits.resume_window),
            "keep_blame": milliseconds(BLAME_KEPT),
        }
        self.lender = Lender(self._client, self._keys, window=self._rules["window"])
        self._held = HeldPrefixes(self._client, self._keys.admission)
        self._mailbox = Mailbox(self._wakeups, self._keys, dropped=self._drop)
        self._reader = JournalReader(self._client, self._mailbox, self._keys, dropped=self._drop)
        self._registry = Registry(self._client, self._keys, dropped=self._drop)
        self._claimer = Claimer(
            self._client,
            self._mailbox,
            lease=limits.lease,
            rules=self._rules,
            keys=self._keys,
            observer=self._observer,
            dropped=self._drop,
            write=self.write,
        )

    async def open(self) -> None:
        """Raises ServerAway if the server is not there: then it is checked when it comes."""
        check = partial(check_server, allow_volatile=self._shard.allow_volatile)
        try:
            info, _ = await self._client.run_first([("INFO",), self._probe()])
        except ServerAway:
            self._client.verify_first(check)
            raise
        check(info)

    # --- the API's side -------------------------------------------------------------------
    async def charge(self, allowance: Allowance) -> RateUsage:
        limit = allowance.requests_per_minute
        if limit is None:
            return RateUsage()
        reply = await self._run("charge", key=allowance.key, limit=limit)
        wait, used = (float(ms) / 1000 for ms in reply)
        return RateUsage(requests=Meter(limit=limit, used=used), wait=wait)

    async def submit(
        self,
        submission: Submission,
        *,
        evict: bool | None = None,
        prepaid: float = 0.0,
        debt: float = 0.0,
    ) -> SubmitReply:
        """See `submit_command`."""
        command = submit_command(
            self._client,
            self._keys,
            submission,
            self.limits,
            evict=evict,
            prepaid=prepaid,
            debt=debt,
        )
        (reply,), acknowledged = await self._run_acknowledged([command])
        answer = decode_submit(reply, submission)
        if not acknowledged and answer.status in {SubmitStatus.OK, SubmitStatus.EXISTS}:
            raise Unavailable(
                "no replica of the journal's store acknowledged the request; send it again",
                code="backend_unavailable",
                retry_after=2.0,
            )
        return answer

    async def lookup(self, submission_id: str) -> StoredSubmission | None:
        key = self._keys.submission(submission_id)
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
        key = self._keys.submission(submission_id)
        (value,) = await self._client.run([("HGET", key, "in")])
        return None if value is None else str(value.decode())

    async def touch(self, submission_ids: Sequence[str]) -> None:
        await self._run_items("touch", submission_ids)

    async def read(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        return await self._reader.read(request_id, after=after)

    async def read_page(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        return await self._reader.read_page(request_id, after=after)

    def follow(self, request_id: str, *, after: int = 0) -> AsyncIterator[Record]:
        return self._reader.follow(request_id, after=after)

    async def stop(self, request_ids: Sequence[str], reason: FinishReason) -> None:
        overdue = reason is FinishReason.DEADLINE
        stopped = await self._run_items("stop", request_ids, only_overdue=overdue)
        self._note(STOPPED[reason], stopped or 0)

    async def heartbeat(self, submission_ids: Sequence[str]) -> None:
        await self._run_items("heartbeat", submission_ids)

    async def forget(self, submission_id: str) -> None:
        linger = milliseconds(LINGER)
        (cancelled,) = await self._run(
            "forget", submission=submission_id, linger=linger, window=self._rules["window"]
        )
        self._note(QueueEvent.CANCELLED, cancelled)

    async def sweep(self) -> int:
        total, examined = 0, SWEEP_BATCH
        while examined == SWEEP_BATCH:
            examined, overdue, abandoned = await self._run(
                "sweep",
                batch=SWEEP_BATCH,
                forget_engine=milliseconds(FORGET_ENGINE),
                sweep_pause=milliseconds(self.limits.sweep_pause),
                **self._rules,
            )
            self._note(QueueEvent.EXPIRED, overdue)
            self._note(QueueEvent.CANCELLED, abandoned)
            total += overdue + abandoned
        return total

    async def take_lease(self, name: str, owner: str, *, seconds: float) -> bool:
        (taken,) = await self._run("lease", name=name, owner=owner, ms=milliseconds(seconds))
        return bool(taken)

    async def drop_lease(self, name: str, owner: str) -> None:
        await self._run("lease", name=name, owner=owner, ms=0)

    async def usage(self, days: Sequence[int]) -> Sequence[Usage]:
        tables = await self._client.run([("HGETALL", self._keys.usage(day)) for day in days])
        counts = [{k.decode(): int(v) for k, v in table.items()} for table in tables]
        return sum_usage(map(decode_usage, days, counts))

    async def depth(self) -> QueueDepth:
        return decode_depth(await self._client.run(depth_commands(self._client, self._keys)))

    async def engines(self) -> Sequence[EngineInfo]:
        return [info for _, info in await self.reports()]

    async def reports(self) -> Sequence[tuple[float, EngineInfo]]:
        """Those engines, each with the seconds since its last heartbeat."""
        return await self._registry.reports()

    async def engine_groups(self) -> Sequence[EngineGroup]:
        return await self._registry.groups()

    async def check(self) -> None:
        """Passes if the memory is full: work is refused then (`storage_full`), but answers end."""
        await self._client.run([self._probe()])

    def _probe(self) -> Command:
        """A write that changes nothing. A server refuses it if it is a replica or cannot persist,
        and allows it if its memory is full.
        """
        return ("DEL", self._keys.probe)

    # --- the engine's side ----------------------------------------------------------------
    async def hold(self, engine: str, prefixes: Collection[str]) -> None:
        if self.has_news(engine, prefixes):
            await self._held.announce(engine, frozenset(prefixes))

    def has_news(self, engine: str, prefixes: Collection[str]) -> bool:
        """Whether `hold` has anything to send."""
        return self._held.has_news(engine, frozenset(prefixes))

    async def claim(
        self, engine: EngineInfo, *, limit: int, wait: float, under_served: int = 0
    ) -> Sequence[Claim]:
        return await self._claimer.claim(engine, limit=limit, wait=wait, under_served=under_served)

    async def look(self, engine: EngineInfo, *, limit: int, under_served: int, waits: bool) -> Look:
        """A part of `claim`, see `Claimer.look`."""
        return await self._claimer.look(engine, limit=limit, under_served=under_served, waits=waits)

    def watch_work(self, wake: Wake) -> None:
        """Calls `wake`, which must not block, whenever there may be something to claim."""
        self._mailbox.watch(wake)

    async def write(self, writes: Sequence[Write]) -> Sequence[WriteReply]:
        """Raises Unavailable with the code `storage_full` if the server had no memory for tokens:
        those of `writes` that were written return DUP next time.
        """
        batches: list[tuple[str, Sequence[int]]] = []
        for script, kind in (("append", Tokens), ("finish", End)):  # a request's end is its last
            of_kind = [i for i, write in enumerate(writes) if isinstance(write.record, kind)]
            batches += [
                (script, of_kind[begin : begin + WRITE_BATCH])
                for begin in range(0, len(of_kind), WRITE_BATCH)
            ]
        commands = [
            self._write_command(script, [writes[place] for place in places])
            for script, places in batches
        ]
        if any(script == "finish" for script, _ in batches):
            replies, _ = await self._run_acknowledged(commands)
        else:
            replies = await self._client.run(commands)
        found = [WriteReply(WriteStatus.OK, position_of(write.record)) for write in writes]
        for (_, places), refused in zip(batches, replies, strict=True):
            for number, status, count in refused:
                found[places[number - 1]] = WriteReply(WriteStatus(status.decode()), count)
        report_replies(found, self._observer)
        return found

    def _write_command(self, script: str, writes: Sequence[Write]) -> Command:
        items: list[tuple[str | int, ...]] = []
        values: list[str | bytes] = []
        for write in writes:
            lease, record = write.lease, write.record
            if isinstance(record, End):
                items.append((lease.request_id, lease.epoch, lease.owner, record.count))
                values.append(encode_end(record))
            else:
                start, end, value = str(record.start), str(record.end), encode_tokens(record)
                items.append((lease.request_id, str(lease.epoch), lease.owner, start, end))
                values += f"{lease.request_id} {end}-0 k {len(value)}\n", value
        window = self._rules["window"] if script == "finish" else None
        return self._client.script(
            script, self._keys.admission, *values, items=items, window=window
        )

    async def renew(self, leases: Sequence[Lease]) -> Sequence[str]:
        lost = await self._run_items("renew", [_leased(lease) for lease in leases])
        return [request_id.decode() for request_id in lost or ()]

    async def release(self, leases: Sequence[Lease], *, died: bool = False) -> None:
        items = [_leased(lease) for lease in leases]
        _, crashed = await self._run_items("release", items, died=died) or (0, 0)
        self._note(QueueEvent.CRASHED, crashed)

    async def stops(self) -> AsyncIterator[str]:
        messages: asyncio.Queue[bytes] = asyncio.Queue()
        wake = messages.put_nowait
        self._mailbox.watch(wake)
        try:
            while True:
                message = await messages.get()
                if message[:1] == b"s":
                    yield message[1:].decode()
        finally:
            self._mailbox.unwatch(wake)

    async def close(self) -> None:
        self._client.refuse()
        self._reader.close()
        await self._wakeups.close()
        await self._client.close()

    # --- both sides -----------------------------------------------------------------------
    async def _run_acknowledged(self, commands: Sequence[Command]) -> tuple[list[Any], bool]:
        """The replies, and whether the replicas that the URL asks for have acknowledged them."""
        wanted = self._shard.replicas
        if not wanted:
            return await self._client.run(commands), True
        within = REPLICA_TIMEOUT if self._replicated else REPLICA_TIMEOUT / 20
        wait: Command = ("WAIT", wanted, milliseconds(within))
        *replies, count = await self._client.run([*commands, wait])
        replicated = count >= wanted
        if self._replicated and not replicated:
            logger.warning("%d replicas acknowledged, %d are needed", count, wanted)
        self._replicated = replicated
        return replies, replicated

    async def _run_items(self, script: str, items: Sequence[object], **arguments: bool) -> Any:  # noqa: ANN401  # a reply of the client library
        """Runs a script on these items; None if there are none."""
        if not items:
            return None
        key = self._keys.admission
        command = self._client.script(script, key, items=items, **arguments, **self._rules)
        (reply,) = await self._client.run([command])
        return reply

    async def _run(self, script: str, /, *values: str | bytes, **arguments: object) -> list[Any]:
        command = self._client.script(script, self._keys.admission, *values, **arguments)
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
