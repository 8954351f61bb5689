"""The Lua scripts of the Redis queue, complete and with the names that EVALSHA knows them by.

Redis has no way to share code between scripts, so `shared.lua` is put into each of them, after the
first line, which holds the script's flags.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

NAMES = (
    "charge",
    "submit",
    "claim",
    "append",
    "finish",
    "renew",
    "release",
    "stop",
    "sweep",
    "heartbeat",
    "forget",
    "oldest",
)


@dataclass(frozen=True, slots=True)
class Script:
    """`sha` is what SCRIPT LOAD answers for `text`."""

    text: str
    sha: str

    @property
    def writes(self) -> bool:
        """Whether a server that takes no writes refuses it."""
        return "no-writes" not in self.text.partition("\n")[0]


def load_scripts() -> dict[str, Script]:
    """Name -> script."""
    directory = Path(__file__).parent
    shared = (directory / "shared.lua").read_text()
    scripts: dict[str, Script] = {}
    for name in NAMES:
        flags, body = (directory / f"{name}.lua").read_text().split("\n", 1)
        text = f"{flags}\n{shared}\n{body}"
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        scripts[name] = Script(text, sha)
    return scripts
