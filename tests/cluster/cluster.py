"""Cluster: a Redis, engines and API replicas as processes, and what a test does to them.

Tests harm it; `heal` makes it whole again. The oracle's answers are known from the requests alone,
so a test needs no second run to compare with. Without an oracle engines are the real command.
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

from loadtest.sse import Address
from service.queues import QueueLimits
from service.queues.redis.keys import ShardKeys
from service.queues.redis.queue import RedisQueue
from tests.cluster.client import Client
from tests.cluster.processes import ForkServer, Replica, run_command, wait_all_ready, wait_until
from tests.cluster.redis_process import RedisServer

AOF = ("--appendonly", "yes", "--appendfsync", "everysec", "--auto-aof-rewrite-percentage", "0")
LEAVING = 0.3  # seconds between a balancer's turn away from a replica and SIGTERM
TRIGGER = (90, 91, 92)  # before the hook's own number, the prompt of a request that trips a hook


@dataclass(frozen=True, kw_only=True)
class Timings:
    """The times of a cluster, smaller than in service. Seconds."""

    lease: float = 1.0
    pace: float = 0.01  # that an engine's step takes at least
    grace: float = 1.5  # that an unread stream goes on
    drain: float = 10.0
    keep_alive: float = 0.5
    window: float = 600.0  # that an ended answer can be read


class Cluster:
    """`engines` and `apis` are those that were started and not yet replaced, dead ones included."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        fork_server: ForkServer | None,
        timings: Timings,
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
        self.excluded: set[int] = set()  # API replicas that a balancer has taken out, by pid
        self.client = Client(self.addresses)
        self._forge = fork_server
        self._max_sequences = max_sequences  # sequences an engine runs at a time
        self._engine_flags = engine_flags  # of real engines
        self._started: list[Replica] = []
        self._sizes = (num_engines, num_apis)
        self._names = itertools.count()
        self._hook_numbers = itertools.count()
        self._accepted_before: dict[int, float] = {}  # API's pid -> its counter when the test began
        self._accepted_by_gone = 0.0

    # --- life -----------------------------------------------------------------------------
    def start(self) -> None:
        self.hooks.mkdir(parents=True, exist_ok=True)
        self.redis.start()
        self.heal()
        self.wait_until_known(len(self.engines))

    def close(self) -> None:
        for replica in self._started:
            replica.close()
        self.redis.close()

    def heal(self) -> None:
        """Everything runs, nothing is armed."""
        for hook in self.hooks.iterdir():
            hook.unlink()
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

    def begin(self) -> None:
        """Called before a test, when nothing runs: an empty Redis and counters at zero."""
        self.heal()
        self.ask("FLUSHALL")
        self._accepted_before = {
            api.pid: api.metric("quire_requests_accepted_total") for api in self.apis
        }
        self._accepted_by_gone = 0.0
        self.wait_until_known(len(self.engines))

    def wait_until_known(self, engines: int) -> None:
        """Waits until engines have told of themselves, and every API replica has heard of them."""

        def known() -> bool:
            told = int(self.ask("HLEN", self.key("engines"))) >= engines
            return told and all(api.metric("quire_engines") >= engines for api in self.apis)

        wait_until(known, "the engines tell of themselves")

    # --- replicas -------------------------------------------------------------------------
    def start_api(self, *, queue: str | None = None) -> Replica:
        """A new API replica; not ready yet."""
        timings = self.timings
        options = {
            "queue": queue or self.redis.url,
            "model": self.model,
            "model-name": self.model.name,
            "port": 0,
            "admin-port": 0,
            "lease": timings.lease,
            "keep-alive": timings.keep_alive,
            "disconnect-grace": timings.grace,
            "drain-timeout": timings.drain,
            "resume-window": timings.window,
        }
        api = run_command("api", self._log("api"), *_flags(options))
        self.apis.append(api)
        self._started.append(api)
        return api

    def start_replicas(self, *, queue: str) -> None:
        """Two engines and an API replica over another way to the queue, ready and known."""
        replicas = [self.start_engine(queue=queue) for _ in range(2)]
        wait_all_ready([*replicas, self.start_api(queue=queue)])
        self.wait_until_known(2)

    def start_engine(
        self,
        *,
        queue: str | None = None,
        pace: float | None = None,
        blocks: int = 2048,
        numeric_class: str = "oracle",
    ) -> Replica:
        """A new engine; not ready yet. All but `queue` is for engines over the oracle."""
        if self._forge is None:
            return self._start_real_engine(queue or self.redis.url)
        arguments = {
            "settings": {
                "queue": queue or self.redis.url,
                "model": str(self.model),
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
        """The oracle's answer to a body."""
        assert self._forge is not None, "a real model's answers are known from an undisturbed run"
        return self._forge.expected(body)

    def _start_real_engine(self, queue: str) -> Replica:
        options = {
            "queue": queue,
            "model": self.model,
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
        """Starts one where another ended, as an orchestrator does; not ready yet."""
        if gone in self.engines:
            self.engines.remove(gone)
            return self.start_engine()
        self.apis.remove(gone)
        return self.start_api()

    def remove_api(self, api: Replica) -> None:
        """Notes what it has accepted, before it is ended."""
        accepted = api.metric("quire_requests_accepted_total")
        self._accepted_by_gone += accepted - self._accepted_before.get(api.pid, 0.0)

    async def retire_api(self, api: Replica) -> None:
        """As an orchestrator does it: out of the balancer, a moment, SIGTERM."""
        self.excluded.add(api.pid)
        await asyncio.sleep(LEAVING)
        await asyncio.to_thread(self.remove_api, api)
        api.terminate()
        assert await asyncio.to_thread(api.exit_code) == 0, "an API replica left with an error"
        self.apis.remove(api)

    async def roll(self, replica: Replica) -> None:
        """A new one is ready before the old one is asked to leave."""
        if replica in self.apis:
            new = self.start_api()
            await asyncio.to_thread(new.wait_until_ready)
            await self.retire_api(replica)
            return
        new = self.replace(replica)
        await asyncio.to_thread(new.wait_until_ready)
        replica.terminate()
        assert await asyncio.to_thread(replica.exit_code) == 0, "an engine left with an error"

    def accepted(self) -> float:
        """Requests that API replicas say they accepted since `begin`."""
        alive = (api for api in self.apis if api.is_up)
        return self._accepted_by_gone + sum(
            api.metric("quire_requests_accepted_total") - self._accepted_before.get(api.pid, 0.0)
            for api in alive
        )

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[list[Replica]]:
        """Replaces engines that end. Gives the list of those that ended."""
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
        # The newest may still be starting: who is asked for its figures must be able to answer.
        await asyncio.to_thread(wait_all_ready, self.engines)

    # --- what a balancer and a test know ----------------------------------------------------
    def addresses(self) -> Sequence[Address]:
        """Of the API replicas that take calls."""
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
        """The journal, read with the service's own code, straight from Redis."""
        queue = RedisQueue(self.limits, url=self.redis.url)
        try:
            yield queue
        finally:
            await queue.close()

    def ask(self, *words: str | int) -> Any:
        """The reply to one Redis command."""
        with Redis(
            port=self.redis.port,
            decode_responses=True,
            encoding_errors="replace",  # a record's bytes are no text
            socket_timeout=10,
        ) as client:
            return client.execute_command(*words)

    def key(self, name: str) -> str:
        return ShardKeys(0).prefix + name

    def state_of_request(self, call_id: str, field: str) -> str:
        """A field of a request's hash: `ep` claims, `n` tokens, `own`, `st`."""
        reply = self.ask("HGET", self.key(f"r:{call_id}.0"), field)
        return "" if reply is None else str(reply)

    def deaths(self, call_id: str) -> int:
        """Engines that died while they ran a request, near its position or long before."""
        return int(self.state_of_request(call_id, "deaths") or 0)

    def journalled(self, call_id: str) -> int:
        """Tokens of a request that Redis has."""
        return int(self.state_of_request(call_id, "n") or 0)

    def owner_of(self, call_id: str) -> Replica | None:
        """The engine that holds a request."""
        owner = self.state_of_request(call_id, "own").split(":")[0]
        for engine in self.engines:
            said = engine.ready()
            if owner and said is not None and said["engine"] == owner:
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
        """A streamed completion of a prompt like no other; with `hook` it trips that hook."""
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
        """Makes an engine act when it computes the prompt of a body with this hook's number or,
        with `at`, the token of that index of the answer to a body with that seed.
        """
        number = next(self._hook_numbers) % 90
        hook = {"tokens": [*TRIGGER, number], "at": at, "action": action, "keep": keep}
        path = self.hooks / f"{number}.json"
        path.with_suffix(".tmp").write_text(json.dumps(hook))
        path.with_suffix(".tmp").rename(path)
        return number

    def happened(self, hook: int) -> list[int]:
        """The ids of the processes in which a hook acted."""
        with suppress(FileNotFoundError):
            return [int(line) for line in (self.hooks / f"{hook}.happened").read_text().split()]
        return []


def _trimmed(replicas: Sequence[Replica], number: int) -> list[Replica]:
    """The first that run; the others are ended."""
    up = [replica for replica in replicas if replica.is_up]
    for replica in up[number:]:
        replica.kill()
    return up[:number]


def _flags(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]
