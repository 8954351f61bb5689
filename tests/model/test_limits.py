"""Limits of control groups, of both versions, in trees of files as the kernel has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model import limits

NONE = "9223372036854771712"
"""What version 1 has for no limit of memory."""
CPUS = 12


@pytest.mark.parametrize(
    ("own", "files", "memory", "cpus"),
    [
        ("", {}, None, CPUS),
        # Version 2: a container sees its own group as the root, other processes have a path.
        ("0::/", {"memory.max": "max", "cpu.max": "max 100000"}, None, CPUS),
        ("0::/", {"memory.max": "4096", "cpu.max": "150000 100000"}, 4096, 2),
        ("0::/a/b", {"a/b/memory.max": "8192", "a/b/cpu.max": "300000 100000"}, 8192, 3),
        ("0::/a/b", {"a/memory.max": "4096", "a/b/memory.max": "8192"}, 4096, CPUS),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, None, 1),
        ("0::/a", {"memory.max": "4096", "b/memory.max": "1", "b/cpu.max": "1 100000"}, 4096, CPUS),
        ("0::/a", {"cpu.max": "9900000 100000"}, None, CPUS),
        # Version 1: a tree per controller.
        ("4:memory:/", {"memory/memory.limit_in_bytes": NONE}, None, CPUS),
        ("4:memory:/a", {"memory/memory.limit_in_bytes": "8192"}, 8192, CPUS),
        (
            "4:memory:/a\n0::/",
            {"memory/memory.limit_in_bytes": NONE, "memory/a/memory.limit_in_bytes": "4096"},
            4096,
            CPUS,
        ),
        (
            "1:cpu,cpuacct:/a",
            {
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "cpu/a/cpu.cfs_quota_us": "120000",
                "cpu/a/cpu.cfs_period_us": "100000",
            },
            None,
            2,
        ),
    ],
)
def test_the_smallest_limit_of_its_groups_counts(
    own: str,
    files: dict[str, str],
    memory: int | None,
    cpus: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups, trees = tmp_path / "cgroup", tmp_path / "trees"
    groups.write_text(own and f"{own}\n")
    for name, text in files.items():
        (trees / name).parent.mkdir(parents=True, exist_ok=True)
        (trees / name).write_text(f"{text}\n")
    monkeypatch.setattr(limits, "_TREES", trees)
    monkeypatch.setattr(limits, "_OWN_GROUPS", groups)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CPUS)))
    assert (limits.memory_limit(), limits.usable_cpus()) == (memory, cpus)


def test_this_process_has_processors() -> None:
    assert 1 <= limits.usable_cores() <= limits.usable_cpus() <= len(os.sched_getaffinity(0))
