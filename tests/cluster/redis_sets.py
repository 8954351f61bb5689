"""Several real servers as one store: independent ones, a Redis Cluster, a Sentinel set."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from redis import Redis
from redis.crc import key_slot

from tests.cluster.redis_process import AOF, RedisServer, free_port

UP = 3600.0
"""Seconds: if the server had just started, owners would get a lease to renew theirs first."""
DAY = 86_400_000
"""Milliseconds: with a frozen clock no node may think that another one is silent."""
SLOTS = 16384
WAIT = 120.0


def wait_until(condition: Callable[[], object], *, meanwhile: Callable[[], None]) -> None:
    """Polls the condition; raises TimeoutError after `WAIT`."""
    end = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        meanwhile()
        time.sleep(0.02)


class RedisSet:
    """Servers that start and end together. A frozen clock of theirs moves with `advance`."""

    servers: Sequence[RedisServer]
    url: str

    def start(self) -> None:
        """Returns when they serve."""
        raise NotImplementedError

    def close(self) -> None:
        for server in self.servers:
            server.close()

    def advance(self, seconds: float) -> None:
        for server in self.servers:
            if server.frozen_clock:
                server.advance(seconds)

    def empty(self) -> None:
        """Deletes all keys."""
        for server in self.servers:
            if server.ask("ROLE") == "*3":  # a primary: b"master", offset, replicas
                server.ask("FLUSHALL")


class Independent(RedisSet):
    """Servers that do not know each other."""

    def __init__(self, folder: Path, *, count: int = 3, frozen_clock: bool = False) -> None:
        self.servers = [
            RedisServer(folder / f"{i}", frozen_clock=frozen_clock) for i in range(count)
        ]
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in self.servers)
        self.url = f"redis://{hosts}/0"

    def start(self) -> None:
        for server in self.servers:
            server.start()
        self.advance(UP)


class Cluster(RedisSet):
    """A Redis Cluster of three primaries, each with `replicas` replicas."""

    def __init__(
        self,
        folder: Path,
        *,
        replicas: int = 0,
        frozen_clock: bool = False,
        program: str = "redis-server",
    ) -> None:
        self.frozen_clock = frozen_clock
        self.servers = [
            RedisServer(
                folder / f"{i}",
                options=(*AOF, *_cluster_options(DAY if frozen_clock else 2000)),
                frozen_clock=frozen_clock,
                program=program,
            )
            for i in range(3 * (1 + replicas))
        ]
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in self.servers[:3])
        self.url = f"redis+cluster://{hosts}"

    def start(self) -> None:
        for server in self.servers:
            server.start()
        first, *others = self.servers
        for i, primary in enumerate(self.servers[:3]):
            low, high = i * SLOTS // 3, (i + 1) * SLOTS // 3 - 1
            assert primary.ask("CLUSTER", "ADDSLOTSRANGE", low, high) == "+OK"
            assert primary.ask("CLUSTER", "SET-CONFIG-EPOCH", i + 1) == "+OK"
        for other in others:
            bus = other.options[-1]
            assert first.ask("CLUSTER", "MEET", "127.0.0.1", other.port, bus) == "+OK"
        self._until(lambda: all(self._is_formed(server) for server in self.servers))
        for i, replica in enumerate(self.servers[3:]):
            with Redis(port=self.servers[i % 3].port) as admin:
                name = admin.execute_command("CLUSTER MYID")
            assert replica.ask("CLUSTER", "REPLICATE", name.decode()) == "+OK"
        self._until(lambda: all(map(is_linked, self.servers[3:])))
        self.advance(UP)

    def _until(self, condition: Callable[[], object]) -> None:
        """Nodes that meet compare clocks, so a frozen one has to go on meanwhile."""
        wait_until(condition, meanwhile=lambda: self.advance(0.1))

    def _is_formed(self, server: RedisServer) -> bool:
        with Redis(port=server.port) as admin:
            state = admin.execute_command("CLUSTER INFO")
        return (
            state["cluster_state"] == "ok"
            and int(state["cluster_known_nodes"]) == len(self.servers)
            and int(state["cluster_slots_ok"]) == SLOTS
        )

    def primary_of(self, key: str) -> RedisServer:
        """The server that had the slot of a key from the start."""
        return self.servers[key_slot(key.encode()) * 3 // SLOTS]


class SentinelProcess(RedisServer):
    """Watches `primary` under the name `quire`; two of three have to agree that it is down."""

    def __init__(
        self, directory: Path, primary: RedisServer, *, program: str, silence: int
    ) -> None:
        super().__init__(directory, options=("--sentinel",), program=program)
        self._watched = primary
        self._silence = silence

    def _files(self) -> tuple[str, ...]:
        file = self.directory / "sentinel.conf"
        if not file.exists():
            file.write_text(
                f"sentinel monitor quire 127.0.0.1 {self._watched.port} 2\n"
                f"sentinel down-after-milliseconds quire {self._silence}\n"
                "sentinel failover-timeout quire 5000\n"
            )
        return (str(file),)


class SentinelSet(RedisSet):
    """A primary, a replica, and three Sentinels that watch them."""

    def __init__(
        self, folder: Path, *, frozen_clock: bool = False, program: str = "redis-server"
    ) -> None:
        self.primary, self.replica = (
            RedisServer(
                folder / name,
                options=(*AOF, "--repl-diskless-sync-delay", "0"),
                frozen_clock=frozen_clock,
                program=program,
            )
            for name in ("primary", "replica")
        )
        silence = DAY if frozen_clock else 2000
        sentinels = [
            SentinelProcess(folder / f"{i}", self.primary, program=program, silence=silence)
            for i in range(3)
        ]
        self.servers = [self.primary, self.replica, *sentinels]
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
        self.url = f"redis+sentinel://{hosts}/quire"

    def start(self) -> None:
        self.primary.start()
        self.replica.start()
        assert self.replica.ask("REPLICAOF", "127.0.0.1", self.primary.port) == "+OK"
        wait_until(lambda: is_linked(self.replica), meanwhile=lambda: self.advance(0.1))
        for sentinel in self.servers[2:]:
            sentinel.start()
        wait_until(
            lambda: all(_is_watching(sentinel) for sentinel in self.servers[2:]),
            meanwhile=lambda: None,
        )
        self.advance(UP)


def _cluster_options(timeout: int) -> tuple[str, ...]:
    return (
        "--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf",
        "--cluster-node-timeout", str(timeout), "--repl-diskless-sync-delay", "0",
        "--cluster-require-full-coverage", "no",  # other shards go on
        "--cluster-port", str(free_port()),
    )  # fmt: skip


def is_linked(replica: RedisServer) -> bool:
    """Whether a replica has what its primary has, but for what is on the way."""
    return replica.info("replication").get("master_link_status") == "up"


def _is_watching(sentinel: RedisServer) -> bool:
    """Whether a Sentinel knows the replica and the other two."""
    with Redis(port=sentinel.port) as admin:
        state = admin.sentinel_masters()["quire"]
    return bool(state["num-slaves"] == 1 and state["num-other-sentinels"] == 2)
