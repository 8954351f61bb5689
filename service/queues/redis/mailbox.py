"""Mailbox: what the scripts send to this process (`mail.lua`): new records of journals that it
reads, requests that were stopped, and that there is something to claim.

A journal's stream is authoritative. A message saves its reader the trip: it has the records
themselves. Messages are lost if the connection breaks; then, and if a follower does not keep up,
its inbox is `outdated`, and it reads the stream.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable

from service.messages import End, Record
from service.queues.redis.codec import Malformed, decode_entry
from service.queues.redis.keys import ShardKeys
from service.queues.redis.pubsub import Wake, Wakeups

HELD = 64
"""Records that are held for a follower that is slower than the answer."""
MAX_READERS = 16
"""Mailboxes that get the records of one journal; followers elsewhere look again by themselves."""


class Inbox:
    """The records of one journal that one follower has not taken yet."""

    def __init__(self) -> None:
        self.records: deque[Record] = deque()
        self.news = asyncio.Event()
        self.outdated = True  # at first: what was journalled before is not in it

    def put(self, record: Record) -> None:
        if len(self.records) < HELD:
            self.records.append(record)
            self.news.set()
        else:
            self.miss()

    def take(self, after: int) -> list[Record]:
        """The records beyond the first `after` tokens of the answer, up to a gap."""
        taken: list[Record] = []
        while self.records:
            record = self.records.popleft()
            if isinstance(record, End):
                if record.count == after:
                    taken.append(record)
                else:
                    self.miss()
            elif record.start > after:
                self.miss()
            elif record.end > after:
                taken.append(record)
                after = record.end
        return taken

    def miss(self) -> None:
        """Records may be missing."""
        self.records.clear()
        self.outdated = True
        self.news.set()


class Mailbox:
    """Calls `dropped` with a description of each entry that is
    not a record.
    """

    def __init__(
        self, wakeups: Wakeups, keys: ShardKeys, *, dropped: Callable[[str], None]
    ) -> None:
        self.name = secrets.token_hex(6)
        self._wakeups = wakeups
        self._keys = keys
        self._dropped = dropped
        self._inboxes: dict[str, set[Inbox]] = {}
        self._watchers: set[Wake] = set()

    def watch(self, wake: Wake) -> None:
        """Calls `wake`, which must not block, with each message that has no records, and with an
        empty one if messages may have been missed.
        """
        self._watchers.add(wake)

    def unwatch(self, wake: Wake) -> None:
        self._watchers.discard(wake)

    def subscribe(self, name: str) -> None:
        """For good: messages to an engine of this process, or to `name`."""
        self._wakeups.watch(self._keys.mailbox(name), self._receive)

    def open(self, request_id: str) -> Inbox:
        """An inbox for the records that the scripts send to `name`, see `follow.lua`."""
        self.subscribe(self.name)
        inbox = Inbox()
        self._inboxes.setdefault(request_id, set()).add(inbox)
        return inbox

    def close(self, request_id: str, inbox: Inbox) -> None:
        inboxes = self._inboxes[request_id]
        inboxes.discard(inbox)
        if not inboxes:
            del self._inboxes[request_id]

    def _receive(self, message: bytes) -> None:
        if message[:1] == b"j":
            self._deliver(message)
            return
        if not message:
            for inboxes in self._inboxes.values():
                for inbox in inboxes:
                    inbox.miss()
        for wake in tuple(self._watchers):
            wake(message)

    def _deliver(self, message: bytes) -> None:
        begin = 1
        while begin < len(message):
            end = message.index(b"\n", begin) + 1
            request_id, entry_id, field, length = message[begin:end].split()
            begin = end + int(length)
            inboxes = self._inboxes.get(request_id.decode())
            if not inboxes:
                continue
            try:
                record = decode_entry(entry_id, {field: message[end:begin]})
            except Malformed as error:
                self._dropped(str(error))
                continue
            for inbox in inboxes:
                inbox.put(record)
