"""The Lua scripts of the Redis queue, complete and with the names that EVALSHA knows them by.

Redis has no way to share code between scripts, so each is assembled: its flags (the first line),
the constants that Python and Lua share, its parts, and its body. A part costs time at each call, so
`append`, which runs once per engine step, gets only those that it needs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from service.messages import End, FinishReason
from service.queues.contract import (
    CLEARED_AFTER,
    CRASH_LOOP,
    ENGINE_SILENCE,
    FINAL_SILENCE,
    JOIN_AFTER,
    MAX_EVICTED,
    MAX_HOLDERS,
    OVERLOADED,
    PASSED_AFTER,
    RESERVED_FOR,
)
from service.queues.redis.codec import encode_end
from service.queues.redis.keys import milliseconds
from service.queues.usage import DAY, USAGE_KEPT

NAMES = (
    "append", "charge", "claim", "finish", "follow", "forget", "groups", "heartbeat", "hold",
    "lease", "lend", "oldest", "poll", "release", "renew", "stop", "submit", "sweep", "touch",
)  # fmt: skip
PARTS = ("keys", "meters", "mail", "lane", "storage", "affinity", "requests", "blame")
LEAN = {
    "append": ("keys", "mail", "lane"), "charge": ("keys", "meters"), "follow": ("keys",),
    "groups": ("keys",), "hold": ("keys", "affinity"), "lease": ("keys",),
    "poll": ("keys", "mail"),
}  # fmt: skip
"""Scripts that are called most, with the parts that they need; all others get all parts."""


@dataclass(frozen=True, slots=True)
class Script:
    """`sha` is what SCRIPT LOAD returns for `text`."""

    text: str
    sha: str

    @property
    def writes(self) -> bool:
        """Whether a server that takes no writes refuses it."""
        return "no-writes" not in self.text.partition("\n")[0]


def load_scripts() -> dict[str, Script]:
    """Name -> script."""
    directory = Path(__file__).parent
    scripts: dict[str, Script] = {}
    for name in NAMES:
        flags, body = (directory / f"{name}.lua").read_text().split("\n", 1)
        shared = [(directory / f"{part}.lua").read_text() for part in LEAN.get(name, PARTS)]
        text = "\n".join([flags, _constants(), *shared, body])
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        scripts[name] = Script(text, sha)
    return scripts


def _constants() -> str:
    """The contract's constants, and the records of the ends that scripts write, in Lua."""
    numbers = (CLEARED_AFTER, PASSED_AFTER, FINAL_SILENCE, milliseconds(JOIN_AFTER), MAX_EVICTED)
    cancelled = End(count=0, reason=FinishReason.CANCELLED)
    deadline = End(count=0, reason=FinishReason.DEADLINE)
    crash_loop = End(count=0, reason=FinishReason.ERROR, error=CRASH_LOOP)
    records = ", ".join(f"'{encode_end(e).decode()}'" for e in (cancelled, deadline, crash_loop))
    return (
        f"local CLEARED_AFTER, PASSED_AFTER, FINAL_SILENCE, JOIN_AFTER, MAX_EVICTED = "
        f"{str(numbers)[1:-1]}\n"
        f"local MAX_HOLDERS, OVERLOADED, RESERVED_FOR, ENGINE_SILENCE = "
        f"{MAX_HOLDERS}, {OVERLOADED}, {milliseconds(RESERVED_FOR)}, "
        f"{milliseconds(ENGINE_SILENCE)}\n"
        f"local USAGE_KEPT = {USAGE_KEPT * DAY}\n"
        f"local CANCELLED, DEADLINE, CRASH_LOOP = {records}\n"
    )
