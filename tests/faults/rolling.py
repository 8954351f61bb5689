"""Rolling changes of the model under load: which model answers?

    python -m tests.faults.rolling --changes 200 --seed 1

Two models with other weights, real engines and API replicas over a real redis-server. A change
replaces every engine and every API replica, one by one and in random order, by one of the other
model; clients send requests for both models all the while. Each answer is compared with
that of an undisturbed run of the model that the client asked for: text, `model` and
`system_fingerprint`. A request without an answer must have ended with one of the errors in `CLEAR`.
It exits with 1 if an answer was another model's or an error is not one of those.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from service.bench.sse import DONE, Address, Broken, call
from tests.cluster.processes import ForkServer, Replica, wait_all_ready
from tests.cluster.redis_process import RedisServer
from tests.support.tiny_model import TinyModel, build_tiny_model

PROGRAM = "tests.faults.role_process"
NAMES = ("ebony", "ivory")
ENGINES, APIS, CLIENTS = 2, 2, 4
PROMPTS, TOKENS = 6, 40
TIMEOUT_MS = 2500  # of each request: how long one of the model that left waits for an engine
LEAVING = 0.1  # seconds between removal from the clients' list and SIGTERM
ANSWERS = 6  # of the new model after each change
CLEAR = frozenset({
    "model_not_found",  # the replica has the other model
    "backend_unavailable",  # no engine of the model is left
    "deadline_exceeded",  # none was left for as long as the request waits
    "shutting_down",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reference:
    """What a model answers without faults."""

    texts: tuple[str, ...]  # by prompt
    fingerprint: str


@dataclass
class Tally:
    """What became of the requests."""

    answers: Counter[str] = field(default_factory=Counter)  # by model
    errors: Counter[str] = field(default_factory=Counter)  # by code
    wrong: list[str] = field(default_factory=list)

    @property
    def unclear(self) -> list[str]:
        return [code for code in self.errors if code not in {*CLEAR, "unreachable"}]

    def line(self) -> str:
        return (
            f"right answers {sum(self.answers.values())} {dict(self.answers)}, "
            f"wrong answers {len(self.wrong)}, errors {dict(self.errors)}"
        )


def write_models(folder: Path) -> dict[str, Path]:
    """Two folders that differ in their weights."""
    tiny = build_tiny_model(pre_tokenizers.Digits(individual_digits=True))
    return {
        name: _reweighted(tiny, seed).write_folder(folder / name) for seed, name in enumerate(NAMES)
    }


def _reweighted(tiny: TinyModel, seed: int) -> TinyModel:
    rng = np.random.default_rng(seed)
    weights = {
        name: rng.standard_normal(values.shape, np.float32) for name, values in tiny.weights.items()
    }
    return replace(tiny, weights=weights)


def bodies(seed: int) -> list[dict[str, Any]]:
    """Requests whose answers differ from model to model."""
    rng = random.Random(seed)
    return [
        {
            "prompt": [rng.randrange(3, 250) for _ in range(rng.randint(4, 40))],
            "max_tokens": TOKENS,
            "temperature": 1.0,
            "seed": number,
            "ignore_eos": True,
        }
        for number in range(PROMPTS)
    ]


class Deployment:
    """Engines and API replicas that come and go. `model` is that of replicas that start now."""

    def __init__(self, folder: Path, models: dict[str, Path]) -> None:
        self.models = models
        self.model = NAMES[0]
        self.replicas: dict[str, list[Replica]] = {"engine": [], "api": []}
        self.redis = RedisServer(folder / "redis", options=("--appendonly", "no"))
        self._folder = folder
        self._forks = ForkServer(folder, program=PROGRAM)
        self._numbers = itertools.count()

    def start(self, role: str) -> Replica:
        """Starts a replica without waiting."""
        settings = {
            "queue": f"{self.redis.url}?prefix=rolling&allow_volatile=1",
            "model": str(self.models[self.model]),
            "threads": 1,
            "kv_memory": 4 * 2**20,
            "max_sequences": 4,
            "lease": 2.0,
            "drain_timeout": 10.0,
            "resume_window": 30.0,
        }
        log = self._folder / f"{role}-{next(self._numbers)}.log"
        replica = self._forks.engine(log, {"role": role, "settings": settings})
        self.replicas[role].append(replica)
        return replica

    def addresses(self) -> list[Address]:
        """Where clients may send requests."""
        return [api.address("API") for api in self.replicas["api"] if api.ready()]

    async def change(self, rng: random.Random) -> None:
        """Replaces all replicas, one by one, by ones of the other model."""
        self.model = next(name for name in self.models if name != self.model)
        old = [(role, each) for role, replicas in self.replicas.items() for each in replicas]
        rng.shuffle(old)
        for role, replica in old:
            new = self.start(role)
            await asyncio.to_thread(new.wait_until_ready)
            self.replicas[role].remove(replica)
            await asyncio.sleep(LEAVING)
            replica.terminate()
            code = await asyncio.to_thread(replica.exit_code, seconds=120)
            assert code == 0, replica.log.read_text()

    def close(self) -> None:
        self._forks.close()
        self.redis.close()


async def ask(
    address: Address, body: dict[str, Any], *, timeout_ms: int = 60_000
) -> dict[str, Any]:
    """One answer: `text`, `model` and `fingerprint`; or the `error` code. Raises Broken."""
    headers = {"x-request-timeout-ms": str(timeout_ms)}
    async with call(address, "POST", "/v1/completions", body=body, headers=headers) as reply:
        if reply.status != 200 or not body.get("stream"):
            answer = await reply.json()
            return _read([answer])
        return _read([event.json() async for event in reply.events() if event.data != DONE])


def _read(chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    for chunk in chunks:
        if "error" in chunk:
            return {"error": chunk["error"]["code"]}
    texts = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    if reasons[-1:] != ["length"]:  # cut at its deadline: a part of an answer
        return {"error": "deadline_exceeded" if reasons[-1:] == ["deadline"] else f"{reasons[-1:]}"}
    return {
        "text": "".join(texts),
        "model": chunks[0]["model"],
        "fingerprint": chunks[-1]["system_fingerprint"],
    }


async def undisturbed(deployment: Deployment, requests: Sequence[dict[str, Any]]) -> Reference:
    """The answers of the model that is deployed."""
    (address, *_) = deployment.addresses()
    answers = [await ask(address, body | {"model": deployment.model}) for body in requests]
    assert not any("error" in answer for answer in answers), answers
    (fingerprint,) = {answer["fingerprint"] for answer in answers}
    return Reference(tuple(answer["text"] for answer in answers), fingerprint)


async def client(
    deployment: Deployment,
    references: dict[str, Reference],
    requests: Sequence[dict[str, Any]],
    tally: Tally,
    rng: random.Random,
) -> None:
    """Sends requests one after another, until it is cancelled, and compares the answers."""
    while True:
        number, asked = rng.randrange(len(requests)), rng.choice((*references,))
        body = requests[number] | {"stream": rng.random() < 0.5, "model": asked}
        try:
            answer = await ask(rng.choice(deployment.addresses()), body, timeout_ms=TIMEOUT_MS)
        except Broken:
            answer = {"error": "unreachable"}  # it left before the request arrived
        if "error" in answer:
            tally.errors[answer["error"]] += 1
            await asyncio.sleep(0.02)
            continue
        expected = references[asked]
        right = (asked, expected.texts[number], expected.fingerprint)
        if (answer["model"], answer["text"], answer["fingerprint"]) == right:
            tally.answers[asked] += 1
        else:
            tally.wrong.append(f"asked {asked}, prompt {number}: {answer}")


@asynccontextmanager
async def load(
    deployment: Deployment,
    references: dict[str, Reference],
    requests: Sequence[dict[str, Any]],
    tally: Tally,
    rng: random.Random,
) -> AsyncIterator[None]:
    """Clients in the background; one that fails is an error at the end."""
    seeds = [rng.random() for _ in range(CLIENTS)]
    clients = [
        asyncio.create_task(client(deployment, references, requests, tally, random.Random(seed)))
        for seed in seeds
    ]
    try:
        yield
    finally:
        for each in clients:
            each.cancel()
        ended = await asyncio.gather(*clients, return_exceptions=True)
    assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended


async def roll(deployment: Deployment, *, changes: int, seed: int, notify: Any) -> Tally:
    """Runs the changes. The deployment's Redis runs, its replicas do not."""
    rng, requests, tally = random.Random(seed), bodies(seed), Tally()
    new = [deployment.start(role) for role in ("engine",) * ENGINES + ("api",) * APIS]
    await asyncio.to_thread(wait_all_ready, new)
    references = {}
    for name in NAMES:
        references[name] = await undisturbed(deployment, requests)
        if len(references) < len(NAMES):
            await deployment.change(rng)
    texts = [text for reference in references.values() for text in reference.texts]
    assert len(set(texts)) == len(texts), "an answer does not show its model"
    async with load(deployment, references, requests, tally, rng):
        for number in range(changes):
            await deployment.change(rng)
            wanted = tally.answers[deployment.model] + ANSWERS
            async with asyncio.timeout(240):
                while tally.answers[deployment.model] < wanted:
                    await asyncio.sleep(0.02)
            notify(f"change {number + 1}: {tally.line()}")
    return tally


def run(folder: Path, *, changes: int, seed: int, notify: Any = lambda _text: None) -> Tally:
    """Runs the changes with everything of its own, in a folder."""
    with ExitStack() as stack:
        deployment = Deployment(folder, write_models(folder))
        stack.callback(deployment.close)
        deployment.redis.start()
        return asyncio.run(roll(deployment, changes=changes, seed=seed, notify=notify))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Rolling changes of the model under load.")
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    started = time.monotonic()

    def notify(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - started:6.0f} s: {text}\n")

    with tempfile.TemporaryDirectory(prefix="quire-rolling-") as folder:
        tally = run(Path(folder), changes=options.changes, seed=options.seed, notify=notify)
    print(f"{options.changes} rolling changes: {tally.line()}")  # noqa: T201
    for wrong in tally.wrong[:10]:
        print(wrong)  # noqa: T201
    return 1 if tally.wrong or tally.unclear else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
