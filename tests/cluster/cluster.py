"""Cluster: Redis, engines and API replicas as processes, and the operations of tests on them.

Tests inject faults; `heal` replaces and resumes what they ended or stopped. The oracle's output
follows from the request alone, so a test needs no second run to compare with. Without the oracle,
engines run the real command.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from redis import Redis

from service.bench.sse import Address
from service.queues.contract import QueueLimits
from service.queues.redis.keys import ShardKeys
from service.queues.redis.queue import RedisQueue
from service.queues.redis.servers import shards_of
from tests.cluster.client import Client
from tests.cluster.processes import ForkServer, Replica, run_command, wait_all_ready, wait_until
from tests.cluster.redis_process import RedisServer

AOF = ("--appendonly", "yes", "--appendfsync", "everysec", "--auto-aof-rewrite-percentage", "0")
LEAVING = 0.3  # seconds between removal from the balancer and SIGTERM
TRIGGER = (90, 91, 92)  # end of a prompt that triggers a hook, followed by the hook's number


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Times in seconds, shorter than in production."""

    lease: float = 1.0
    pace: float = 0.01  # minimum time of an engine's step
    grace: float = 1.5  # reconnect grace period
    drain: float = 10.0
    keep_alive: float = 0.5
    window: float = 600.0  # resume window


class Cluster:
    """`engines` and `apis` hold started replicas that were not replaced yet, dead ones included.
    `api_forks` (of `tests.faults.role_process`) forks API replicas; without it they are commands,
    whose imports take seconds.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        fork_server: ForkServer | None,
        timings: Timings,
        api_forks: ForkServer | None = None,
        num_engines: int = 2,
        num_apis: int = 2,
        max_sequences: int = 16,
        engine_flags: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self.folder = folder
        self.model = model
        self.timings = timings
        self.redis = RedisServer(folder / "redis", options=AOF)
        self.hooks = folder / "hooks"
        self.engines: list[Replica] = []
        self.apis: list[Replica] = []
        self.excluded: set[int] = set()  # pids of API replicas that were removed from the balancer
        self.client = Client(self.addresses)
        self._forge = fork_server
        self._api_forks = api_forks
        self._max_sequences = max_sequences  # of each engine
        self._engine_flags = engine_flags  # of real engines
        self._started: list[Replica] = []
        self._sizes = (num_engines, num_apis)
        self._names = itertools.count()
        self._hook_numbers = itertools.count()
        self._accepted_before: dict[
            int, float
        ] = {}  # pid of an API replica -> its counter at `reset`
        self._accepted_by_gone = 0.0

    # --- life -----------------------------------------------------------------------------
    def start(self) -> None:
        self.hooks.mkdir(parents=True, exist_ok=True)
        self.redis.start()
        self.heal()
        self.wait_until_registered(len(self.engines))

    def close(self) -> None:
        for replica in self._started:
            replica.close()
        self.redis.close()

    def heal(self) -> None:
        """Removes hooks, resumes stopped replicas, starts what has ended again, Redis too."""
        for hook in self.hooks.iterdir():
            hook.unlink()
        if not self.redis.is_up:
            self.redis.start()
        self.ask("CONFIG", "SET", "maxmemory", "0")
        for replica in (*self.engines, *self.apis):
            if replica.state == "T":
                replica.resume()
        self.excluded.clear()
        num_engines, num_apis = self._sizes
        self.engines = _trimmed(self.engines, num_engines)
        self.apis = _trimmed(self.apis, num_apis)
        started = [self.start_api() for _ in range(num_apis - len(self.apis))]
        started += [self.start_engine() for _ in range(num_engines - len(self.engines))]
        wait_all_ready(started)

    def reset(self) -> None:
        """Called before a test, when no request runs: heals, empties Redis, zeroes counters."""
        self.heal()
        self.ask("FLUSHALL")
        self._accepted_before = {
            api.pid: api.metric("quire_requests_accepted_total") for api in self.apis
        }
        self._accepted_by_gone = 0.0
        self.wait_until_registered(len(self.engines))

    def wait_until_registered(self, engines: int) -> None:
        """Waits until engines are registered and every API replica knows them."""

        def known() -> bool:
            registered = int(self.ask("HLEN", self.key("engines"))) >= engines
            return registered and all(api.metric("quire_engines") >= engines for api in self.apis)

        wait_until(known, "the engines are registered")

    # --- replicas -------------------------------------------------------------------------
    def start_api(self, *, queue: str | None = None) -> Replica:
        """Starts an API replica without waiting for readiness."""
        timings = self.timings
        options = {
            "queue": queue or self.redis.url,
            "model": str(self.model),
            "model-name": self.model.name,
            "port": 0,
            "admin-port": 0,
            "lease": timings.lease,
            "keep-alive": timings.keep_alive,
            "disconnect-grace": timings.grace,
            "drain-timeout": timings.drain,
            "resume-window": timings.window,
            "keep-responses": timings.window,
            "files": str(self.folder / "files"),
        }
        if self._api_forks is None:
            api = run_command("api", self._log("api"), *_flags(options))
        else:
            settings = {name.replace("-", "_"): value for name, value in options.items()}
            api = self._api_forks.engine(self._log("api"), {"role": "api", "settings": settings})
        self.apis.append(api)
        self._started.append(api)
        return api

    def start_replicas(self, *, queue: str) -> None:
        """Starts two engines and an API replica with this queue URL and waits until registered."""
        replicas = [self.start_engine(queue=queue) for _ in range(2)]
        wait_all_ready([*replicas, self.start_api(queue=queue)])
        self.wait_until_registered(2)

    def start_engine(
        self,
        *,
        queue: str | None = None,
        pace: float | None = None,
        blocks: int = 2048,
        numeric_class: str = "oracle",
        model_name: str | None = None,
    ) -> Replica:
        """Starts an engine without waiting. Only `queue` applies to real engines. `model_name`: of
        the same files under another name, which is another model.
        """
        if self._forge is None:
            return self._start_real_engine(queue or self.redis.url)
        arguments = {
            "settings": {
                "queue": queue or self.redis.url,
                "model": str(self.model),
                "model_name": model_name or self.model.name,
                "lease": self.timings.lease,
                "resume_window": self.timings.window,
                "max_sequences": self._max_sequences,
            },
            "hooks": str(self.hooks),
            "pace": self.timings.pace if pace is None else pace,
            "blocks": blocks,
            "numeric_class": numeric_class,
        }
        engine = self._forge.engine(self._log("engine"), arguments)
        self.engines.append(engine)
        self._started.append(engine)
        return engine

    def expected(self, body: dict[str, Any]) -> Sequence[int]:
        """The oracle's tokens for a body."""
        assert self._forge is not None, (
            "the expected output of a real model needs an undisturbed run"
        )
        return self._forge.expected(body)

    def _start_real_engine(self, queue: str) -> Replica:
        options = {
            "queue": queue,
            "model": self.model,
            "model-name": self.model.name,
            "admin-port": 0,
            "lease": self.timings.lease,
            "resume-window": self.timings.window,
            "max-sequences": self._max_sequences,
            **self._engine_flags,
        }
        engine = run_command("engine", self._log("engine"), *_flags(options))
        self.engines.append(engine)
        self._started.append(engine)
        return engine

    def _log(self, kind: str) -> Path:
        return self.folder / f"{kind}-{next(self._names)}.log"

    def replace(self, gone: Replica) -> Replica:
        """Starts a replacement, as an orchestrator does, without waiting for readiness."""
        if gone in self.engines:
            self.engines.remove(gone)
            return self.start_engine()
        self.apis.remove(gone)
        return self.start_api()

    def count_before_end(self, api: Replica) -> None:
        """Called before it is ended: keeps its counter of accepted requests."""
        accepted = api.metric("quire_requests_accepted_total")
        self._accepted_by_gone += accepted - self._accepted_before.get(api.pid, 0.0)

    async def retire_api(self, api: Replica) -> None:
        """As an orchestrator does: removes it from the balancer, waits, sends SIGTERM."""
        self.excluded.add(api.pid)
        await asyncio.sleep(LEAVING)
        await asyncio.to_thread(self.count_before_end, api)
        api.terminate()
        assert await asyncio.to_thread(api.exit_code) == 0, "an API replica exited with an error"
        self.apis.remove(api)

    async def roll(self, replica: Replica) -> None:
        """Rolling update: the new replica is ready before the old one gets SIGTERM."""
        if replica in self.apis:
            new = self.start_api()
            await asyncio.to_thread(new.wait_until_ready)
            await self.retire_api(replica)
            return
        new = self.replace(replica)
        await asyncio.to_thread(new.wait_until_ready)
        replica.terminate()
        assert await asyncio.to_thread(replica.exit_code) == 0, "an engine exited with an error"

    def accepted(self) -> float:
        """Requests that API replicas accepted since `reset`."""
        alive = (api for api in self.apis if api.is_up)
        return self._accepted_by_gone + sum(
            api.metric("quire_requests_accepted_total") - self._accepted_before.get(api.pid, 0.0)
            for api in alive
        )

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[list[Replica]]:
        """Replaces engines that end. Yields the list of those."""
        ended: list[Replica] = []

        async def watch() -> None:
            while True:
                for engine in [engine for engine in self.engines if not engine.state]:
                    ended.append(engine)
                    self.replace(engine)
                await asyncio.sleep(0.05)

        watching = asyncio.create_task(watch())
        try:
            yield ended
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        # The newest may still be starting, and tests read its metrics.
        await asyncio.to_thread(wait_all_ready, self.engines)

    # --- state -------------------------------------------------------------------------------
    def addresses(self) -> Sequence[Address]:
        """Addresses of the API replicas that accept requests."""
        return [
            api.address("API")
            for api in self.apis
            if api.is_up and api.ready() and api.pid not in self.excluded
        ]

    @property
    def limits(self) -> QueueLimits:
        return QueueLimits(lease=self.timings.lease)

    @asynccontextmanager
    async def queue(self) -> AsyncIterator[RedisQueue]:
        """Reads the journal in Redis with the service's own code."""
        queue = RedisQueue(self.limits, shard=shards_of(self.redis.url)[0])
        try:
            yield queue
        finally:
            await queue.close()

    def ask(self, *words: str | int) -> Any:
        """The reply to one Redis command."""
        with Redis(
            port=self.redis.port,
            decode_responses=True,
            encoding_errors="replace",  # records are not text
            socket_timeout=60,
        ) as client:
            return client.execute_command(*words)

    def key(self, name: str) -> str:
        return ShardKeys(0).prefix + name

    def state_of_request(self, call_id: str, field: str) -> str:
        """A field of a request's hash: `ep` (claims), `n` (tokens), `own`, `st`, `deaths`."""
        reply = self.ask("HGET", self.key(f"r:{call_id}.0"), field)
        return "" if reply is None else str(reply)

    def deaths(self, call_id: str) -> int:
        """Engines that died while they ran a request."""
        return int(self.state_of_request(call_id, "deaths") or 0)

    def journalled(self, call_id: str) -> int:
        """Tokens of a request in the journal."""
        return int(self.state_of_request(call_id, "n") or 0)

    def owner_of(self, call_id: str) -> Replica | None:
        """The engine that runs a request."""
        owner = self.state_of_request(call_id, "own").split(":")[0]
        for engine in self.engines:
            record = engine.ready()
            if owner and record is not None and record["engine"] == owner:
                return engine
        return None

    # --- requests -------------------------------------------------------------------------
    def body(
        self,
        rng: random.Random,
        *,
        max_tokens: int = 40,
        temperature: float | None = None,
        hook: int | None = None,
    ) -> dict[str, Any]:
        """A streamed completion of a unique prompt; with `hook` it triggers that hook."""
        prompt = [rng.randrange(60) for _ in range(12)]
        if hook is not None:
            prompt += [*TRIGGER, hook]
        return {
            "model": self.model.name,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": rng.choice([0.0, 0.8]) if temperature is None else temperature,
            "seed": rng.randrange(2**31),
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }

    def arm(
        self, action: str | float, *, keep: bool = False, at: tuple[int, int] | None = None
    ) -> int:
        """Makes an engine run `action` when it computes a prompt with this hook's number or,
        with `at` = (seed, index), that output token of the request with that seed.
        """
        number = next(self._hook_numbers) % 90
        hook = {"tokens": [*TRIGGER, number], "at": at, "action": action, "keep": keep}
        path = self.hooks / f"{number}.json"
        path.with_suffix(".tmp").write_text(json.dumps(hook))
        path.with_suffix(".tmp").rename(path)
        return number

    def happened(self, hook: int) -> list[int]:
        """Pids of the processes in which a hook ran."""
        with suppress(FileNotFoundError):
            return [int(line) for line in (self.hooks / f"{hook}.happened").read_text().split()]
        return []


def _trimmed(replicas: Sequence[Replica], number: int) -> list[Replica]:
    """The first `number` running replicas; kills the others."""
    up = [replica for replica in replicas if replica.is_up]
    for replica in up[number:]:
        replica.kill()
    return up[:number]


def _flags(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]
