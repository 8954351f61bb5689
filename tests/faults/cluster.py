"""Cluster: a Redis, engines and API replicas as processes, and what a test does to them.

Tests harm it; `heal` makes it whole again. The oracle's answers are known from the requests alone,
so a test needs no second run to compare with.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import Redis

from service.messages import GenerationRequest, SamplingParams
from service.queues import QueueLimits
from service.queues.redis import RedisQueue
from tests.conftest import TinyModel
from tests.fakes import oracle_answer
from tests.faults.client import Address, Client
from tests.faults.processes import Forge, Replica, run_command, wait_all_ready, wait_until
from tests.queues.redis_process import RedisServer

AOF = ("--appendonly", "yes", "--appendfsync", "everysec", "--auto-aof-rewrite-percentage", "0")
TRIGGER = (90, 91, 92)  # before the hook's own number, the prompt of a request that trips a hook


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The times of a cluster, smaller than in service. Seconds."""

    lease: float = 1.0
    pace: float = 0.01  # that an engine's step takes at least
    grace: float = 1.5  # that an unread stream goes on
    drain: float = 10.0
    keep_alive: float = 0.5


class Cluster:
    """`engines` and `apis` are those that were started and not yet replaced, dead ones included."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        forge: Forge,
        scale: Scale,
        num_engines: int = 2,
        num_apis: int = 2,
        seats: int = 16,
    ) -> None:
        self.folder = folder
        self.model = model
        self.scale = scale
        self.redis = RedisServer(folder / "redis", options=AOF)
        self.hooks = folder / "hooks"
        self.engines: list[Replica] = []
        self.apis: list[Replica] = []
        self.excluded: set[int] = set()  # API replicas that a balancer has taken out, by pid
        self.client = Client(self.addresses)
        self._forge = forge
        self._seats = seats  # sequences an engine runs at a time
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
        """Waits until engines have told of themselves."""

        def known() -> bool:
            return int(self.ask("HLEN", self.key("engines"))) >= engines

        wait_until(known, "the engines tell of themselves")

    # --- replicas -------------------------------------------------------------------------
    def start_api(self, *, queue: str | None = None) -> Replica:
        """A new API replica; not ready yet."""
        scale = self.scale
        options = {
            "queue": queue or self.redis.url,
            "model": self.model,
            "port": 0,
            "admin-port": 0,
            "lease": scale.lease,
            "keep-alive": scale.keep_alive,
            "disconnect-grace": scale.grace,
            "drain-timeout": scale.drain,
        }
        api = run_command("api", self._log("api"), *_flags(options))
        self.apis.append(api)
        self._started.append(api)
        return api

    def start_engine(
        self,
        *,
        queue: str | None = None,
        pace: float | None = None,
        blocks: int = 2048,
        numeric_class: str = "oracle",
    ) -> Replica:
        """A new engine over the oracle; not ready yet."""
        arguments = {
            "settings": {
                "queue": queue or self.redis.url,
                "model": str(self.model),
                "lease": self.scale.lease,
                "max_sequences": self._seats,
            },
            "hooks": str(self.hooks),
            "pace": self.scale.pace if pace is None else pace,
            "blocks": blocks,
            "numeric_class": numeric_class,
        }
        engine = self._forge.engine(self._log("engine"), arguments)
        self.engines.append(engine)
        self._started.append(engine)
        return engine

    def start_real_engine(self) -> Replica:
        """`quire engine` with the model itself, in float32; not ready yet."""
        options = {
            "queue": self.redis.url,
            "model": self.model,
            "runner": "torch",
            "dtype": "float32",
            "threads": 1,
            "admin-port": 0,
            "lease": self.scale.lease,
            "kv-memory": "8MiB",
            "max-batch-tokens": 64,
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
        return QueueLimits(lease=self.scale.lease)

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
        return "quire:1:{s0}:" + name

    def state_of_request(self, call_id: str, field: str) -> str:
        """A field of a request's hash: `att` deaths, `ep` claims, `n` tokens, `own`, `st`."""
        reply = self.ask("HGET", self.key(f"r:{call_id}.0"), field)
        return "" if reply is None else str(reply)

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
        draw: random.Random,
        *,
        max_tokens: int = 40,
        temperature: float | None = None,
        hook: int | None = None,
    ) -> dict[str, Any]:
        """A streamed completion of a prompt like no other; with `hook` it trips that hook."""
        prompt = [draw.randrange(60) for _ in range(12)]
        if hook is not None:
            prompt += [*TRIGGER, hook]
        return {
            "model": self.model.name,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": draw.choice([0.0, 0.8]) if temperature is None else temperature,
            "seed": draw.randrange(2**31),
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }

    def arm(self, action: str | float, *, keep: bool = False) -> int:
        """Makes an engine act when it computes the prompt of a body with this hook's number."""
        number = next(self._hook_numbers) % 90
        hook = {"tokens": [*TRIGGER, number], "action": action, "keep": keep}
        path = self.hooks / f"{number}.json"
        path.with_suffix(".tmp").write_text(json.dumps(hook))
        path.with_suffix(".tmp").rename(path)
        return number

    def happened(self, hook: int) -> list[int]:
        """The ids of the processes in which a hook acted."""
        with suppress(FileNotFoundError):
            return [int(line) for line in (self.hooks / f"{hook}.happened").read_text().split()]
        return []


def write_model_of_oracle(tiny: TinyModel, folder: Path) -> Path:
    """Tokenizer and card of a tiny model, with a context as long as the oracle's."""
    tiny.write_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder


def expected_tokens(body: dict[str, Any]) -> list[int]:
    """What the oracle answers to a body, from the body alone."""
    request = GenerationRequest(
        id="",
        prompt_ids=tuple(body["prompt"]),
        sampling=SamplingParams(seed=body["seed"], temperature=body["temperature"]),
        max_tokens=body["max_tokens"],
        ignore_eos=True,
    )
    return oracle_answer(request)


def _trimmed(replicas: Sequence[Replica], number: int) -> list[Replica]:
    """The first that run; the others are ended."""
    up = [replica for replica in replicas if replica.is_up]
    for replica in up[number:]:
        replica.kill()
    return up[:number]


def _flags(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]
