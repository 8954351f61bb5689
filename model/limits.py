"""What this process may use of the machine, by its affinity and its control groups.

A container, a service and a slice each have groups, one within the other, and the smallest limit
counts. Version 2 has one tree of groups, version 1 a tree per controller.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_TREES = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_UNLIMITED = 2**60
"""Bytes: version 1 has a number near 2**63 for no limit."""


def usable_cpus() -> int:
    """Processors that this process may use."""
    return max(1, math.ceil(min([len(os.sched_getaffinity(0)), *_quotas()])))


def usable_cores() -> int:
    """Physical cores among the usable processors: threads of one core share its multipliers."""
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text(encoding="ascii") if path.is_file() else str(cpu))
    return min(len(siblings), usable_cpus())


def memory_limit() -> int | None:
    """In bytes; None: all of the machine's."""
    texts = [*_read("", "memory.max"), *_read("memory", "memory.limit_in_bytes")]
    limits = [int(text) for text in texts if text.isdecimal()]
    return min((limit for limit in limits if limit < _UNLIMITED), default=None)


def _quotas() -> Iterator[float]:
    """Processors that the groups allow, such as 1.5."""
    first = (text.split() for text in _read("", "cpu.max"))
    rest = zip(_read("cpu", "cpu.cfs_quota_us"), _read("cpu", "cpu.cfs_period_us"), strict=False)
    for quota, period in (*first, *rest):
        if quota.isdecimal():  # not `max` or -1
            yield int(quota) / int(period)


def _read(controller: str, name: str) -> Iterator[str]:
    """The file of this name of each group that this process is in."""
    for folder in _groups(controller):
        with suppress(OSError):  # the root has no limits
            yield (folder / name).read_text(encoding="ascii").strip()


def _groups(controller: str) -> Iterator[Path]:
    """From the root of the visible tree to the process's own group; "": of version 2. In a
    container the root is its own group already, and the path may be one outside.
    """
    yield (folder := _TREES / controller)
    with suppress(OSError):
        for line in _OWN_GROUPS.read_text(encoding="utf-8").splitlines():
            _, names, path = line.split(":", 2)
            if controller in names.split(","):
                for part in PurePosixPath(path).parts[1:]:
                    yield (folder := folder / part)
