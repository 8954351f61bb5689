"""The Lua scripts of the Redis queue, complete and with the names that EVALSHA knows them by.

Redis has no way to share code between scripts, so each is assembled: its flags (the first line),
the constants that Python and Lua share, its parts, and its body. A part costs time at each call, so
a script gets only those that it needs: `append` runs once per request and engine step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from service.messages import End, FinishReason
from service.queues.contract import (
    CLEARED_AFTER,
    CRASH_LOOP,
    FINAL_SILENCE,
    JOIN_AFTER,
    PASSED_AFTER,
)
from service.queues.redis.codec import encode_end
from service.queues.redis.keys import milliseconds

_REQUESTS = ("meters", "lane", "requests")
PARTS: dict[str, tuple[str, ...]] = {
    "append": ("lane",),
    "charge": ("meters",),
    "claim": (*_REQUESTS, "blame"),
    "finish": _REQUESTS,
    "forget": _REQUESTS,
    "heartbeat": _REQUESTS,
    "oldest": _REQUESTS,
    "release": (*_REQUESTS, "blame"),
    "renew": (*_REQUESTS, "blame"),
    "stop": _REQUESTS,
    "submit": _REQUESTS,
    "sweep": _REQUESTS,
}
"""Script -> its parts in their order, after `keys`."""


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
    for name, parts in PARTS.items():
        flags, body = (directory / f"{name}.lua").read_text().split("\n", 1)
        shared = [(directory / f"{part}.lua").read_text() for part in ("keys", *parts)]
        text = "\n".join([flags, _constants(), *shared, body])
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        scripts[name] = Script(text, sha)
    return scripts


def _constants() -> str:
    """Of the contract, in Lua; the records of the ends that scripts write are plain JSON."""
    values: dict[str, int | str] = {
        "CLEARED_AFTER": CLEARED_AFTER,
        "PASSED_AFTER": PASSED_AFTER,
        "FINAL_SILENCE": FINAL_SILENCE,
        "JOIN_AFTER": milliseconds(JOIN_AFTER),
    }
    for name, reason, error in (
        ("CANCELLED", FinishReason.CANCELLED, None),
        ("DEADLINE", FinishReason.DEADLINE, None),
        ("CRASH_LOOP", FinishReason.ERROR, CRASH_LOOP),
    ):
        record = encode_end(End(count=0, reason=reason, error=error)).decode()
        values[name] = f"'{record}'"
    return "".join(f"local {name} = {value}\n" for name, value in values.items())
