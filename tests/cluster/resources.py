"""Resource snapshots: what a process or a Redis uses at one moment; two of them reveal a leak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.processes import total

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceSnapshot:
    """Figures of one process by name."""

    part: str
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Allowance:
    """Allowed growth: a share plus a number."""

    share: float
    number: float

    def allows(self, start: float, end: float) -> bool:
        return end <= start * (1 + self.share) + self.number


ALLOWANCES: Mapping[str, Allowance] = {
    "RSS, MiB": Allowance(0.05, 8),  # allocators keep some memory
    "descriptors": Allowance(0, 3),
    "threads": Allowance(0, 2),
    "KV blocks used": Allowance(0, 0),
    "sequences": Allowance(0, 0),
    "memory, MiB": Allowance(0.05, 2),
    "keys": Allowance(0, 2),
    "connections": Allowance(0, 16),  # each process keeps its maximum
}
"""Figures without an entry may grow."""


def snapshot_process(part: str, pid: int) -> ResourceSnapshot:
    """Memory, descriptors and threads from /proc."""
    folder = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return ResourceSnapshot(
        part=part,
        figures={
            "RSS, MiB": int(fields["VmRSS"].split()[0]) / 1024,
            "descriptors": float(len(list((folder / "fd").iterdir()))),
            "threads": float(fields["Threads"]),
        },
    )


def snapshot_engine(part: str, metrics: Mapping[str, float]) -> ResourceSnapshot:
    blocks = {
        f"KV blocks {state}": total(metrics, "quire_kv_blocks", f'state="{state}"')
        for state in ("used", "cached", "free")
    }
    names = ("quire_sequences_running", "quire_sequences_waiting")
    held = sum(total(metrics, name) for name in names)
    return ResourceSnapshot(part=part, figures={**blocks, "sequences": held})


def snapshot_redis(cluster: Cluster) -> ResourceSnapshot:
    """Excludes the memory of idempotency keys, which stay for a day, and the keys of engine deaths,
    which stay for ten minutes (one key per death). Counts connections apart from other descriptors,
    and apart from other keys those that name what engines hold, which are bounded per engine.
    """
    process = snapshot_process("redis", cluster.redis.pid).figures
    memory, clients = cluster.ask("INFO", "memory"), cluster.ask("INFO", "clients")
    keys = [str(key) for key in cluster.ask("KEYS", "*")]
    kept = [key for key in keys if key.startswith(cluster.key("idem:"))]
    deaths = [key for key in keys if key.startswith(cluster.key("blamed:"))]
    held = [key for key in keys if key.startswith(cluster.key("h:"))]
    taken = len(kept) * (int(cluster.ask("MEMORY", "USAGE", kept[0]) or 0) if kept else 0)
    return ResourceSnapshot(
        part="redis",
        figures={
            **process,
            "descriptors": process["descriptors"] - float(clients["connected_clients"]),
            "memory, MiB": (float(memory["used_memory"]) - taken) / MIB,
            "keys": float(len(keys) - len(kept) - len(deaths) - len(held)),
            "idempotency keys": float(len(kept)),
            "deaths of engines": float(len(deaths)),
            "prefixes that engines hold": float(len(held)),
            "connections": float(clients["connected_clients"]),
        },
    )


def leaks(start: ResourceSnapshot, end: ResourceSnapshot) -> list[str]:
    """Figures that grew beyond their allowance."""
    return [
        f"{end.part}: {name} grew from {start.figures[name]:.1f} to {value:.1f}"
        for name, value in end.figures.items()
        if name in ALLOWANCES and not ALLOWANCES[name].allows(start.figures[name], value)
    ]
