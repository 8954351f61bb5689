"""Doctor: checks a machine and a configuration before they serve, and states what to do.

    machine.py    what the machine is
    hardware.py   processor, kernels, threads, memory, GPU, and the speed that they allow
    models.py     the files of the models
    store.py      the queue's store, and that of files
    report.py     all of these, printed

Loads no weights and downloads nothing. No finding contains a password or a path.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How much a finding matters. NOTE: it serves, but not as well as it could. BAD: it does not
    serve, or answers can be lost.
    """

    OK = "ok"
    NOTE = "note"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: a subject, what was found and, if anything can be done, what."""

    subject: str
    text: str
    level: Level = Level.OK
    advice: str = ""
