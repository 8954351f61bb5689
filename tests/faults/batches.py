"""Kills engines, API replicas and Redis at random while batches run, and checks every line.

    python -m tests.faults.batches --lines 20000 --kills 50

Each line must be answered once, in the order of the input, with the oracle's tokens; some are also
compared with the same request online. Prints its progress, then the failures and what was killed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from tokenizers import pre_tokenizers

from service.queues.usage import DAY
from tests.cluster.cluster import Cluster, Timings
from tests.cluster.processes import ForkServer, wait_all_ready
from tests.faults.oracle_model import write_model_of_oracle
from tests.support.tiny_model import build_tiny_model

PATH = "/v1/completions"
ROLES = "tests.faults.role_process"
ONLINE = 20  # lines of a batch that are also sent online
STALLED = 180.0  # seconds without progress, after which a run fails
ENDED = {"completed", "failed", "expired", "cancelled"}


@dataclass
class Tally:
    """Kills and their results."""

    lines: int = 0
    tokens: int = 0  # of the answers, also of those online
    batches: int = 0
    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def line(self) -> str:
        return (
            f"{self.kills.total()} kills {dict(sorted(self.kills.items()))};"
            f" {self.lines} lines of {self.batches} batches in {self.seconds:.0f} s;"
            f" failures: {len(self.failures)}"
        )


class Caller:
    """Calls any replica that answers; repeats calls while none does."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._client = httpx.AsyncClient(timeout=30.0)

    async def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        until = time.monotonic() + STALLED
        while True:
            for host, port in self._cluster.addresses():
                try:
                    url = f"http://{host}:{port}{path}"
                    reply = await self._client.request(method, url, **options)
                except httpx.TransportError:
                    continue
                if reply.status_code < 500:
                    assert reply.status_code < 400, reply.text
                    return reply
            assert time.monotonic() < until, f"no replica answers {method} {path}"
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        await self._client.aclose()


async def run_batches(
    cluster: Cluster,
    rng: random.Random,
    *,
    lines: int,
    kills: int,
    report: Callable[[str], object] = lambda _: None,
) -> Tally:
    """Batches of so many lines until there were so many kills, spread over the progress. `report`
    gets the progress after each kill.
    """
    tally, caller, began = Tally(), Caller(cluster), time.monotonic()
    try:
        while tally.kills.total() < kills:
            bodies = [_body(cluster, rng) for _ in range(lines)]
            batch_id = await _create(caller, bodies)
            wanted = kills - tally.kills.total()
            async for answered in _kill_until_ended(
                cluster, caller, rng, tally, batch_id, lines=lines, kills=wanted
            ):
                seconds = time.monotonic() - began
                report(f"{seconds:.0f} s: {answered} of {lines} lines, {tally.kills.total()} kills")
            await _check(cluster, caller, tally, batch_id, bodies)
            tally.batches, tally.lines = tally.batches + 1, tally.lines + lines
        await _check_usage(cluster, tally)
    finally:
        await caller.close()
    tally.seconds = time.monotonic() - began
    return tally


def _body(cluster: Cluster, rng: random.Random) -> dict[str, Any]:
    body = cluster.body(rng, max_tokens=rng.randint(1, 6))
    return {name: value for name, value in body.items() if name != "stream"}


async def _create(caller: Caller, bodies: Sequence[dict[str, Any]]) -> str:
    content = "\n".join(
        json.dumps({"custom_id": f"{k}", "method": "POST", "url": PATH, "body": body})
        for k, body in enumerate(bodies)
    )
    file = await caller.call(
        "POST", "/v1/files", files={"file": ("in", content)}, data={"purpose": "batch"}
    )
    batch = await caller.call(
        "POST",
        "/v1/batches",
        json={
            "input_file_id": file.json()["id"],
            "endpoint": PATH,
            "completion_window": "24h",
        },
    )
    return str(batch.json()["id"])


async def _kill_until_ended(
    cluster: Cluster,
    caller: Caller,
    rng: random.Random,
    tally: Tally,
    batch_id: str,
    *,
    lines: int,
    kills: int,
) -> AsyncIterator[int]:
    """Kill k comes when k parts of kills + 1 are answered; yields the answered lines after each.
    Fails if nothing moves for long.
    """
    done, moved = 0, 0
    since = time.monotonic()
    while True:
        state = (await caller.call("GET", f"/v1/batches/{batch_id}")).json()
        if state["status"] in ENDED:
            return
        counts = state["request_counts"]
        answered = counts["completed"] + counts["failed"]
        if answered != moved:
            moved, since = answered, time.monotonic()
        assert time.monotonic() < since + STALLED, f"no progress since {counts}"
        if done < kills and answered >= (done * lines) // (kills + 1):
            done += 1
            await kill_one(cluster, rng, tally)
            yield answered
            since = time.monotonic()
        await asyncio.sleep(rng.random() * 0.1)


async def kill_one(cluster: Cluster, rng: random.Random, tally: Tally) -> None:
    """Kills a process and has it replaced; does not wait for more than that."""
    kind = rng.choice(["engine", "engine", "api", "api", "redis"])
    await asyncio.sleep(rng.random() * 0.5)
    tally.kills[kind] += 1
    if kind == "redis":
        cluster.redis.kill()
        await asyncio.sleep(rng.random() * 2 * cluster.timings.lease)
        await asyncio.to_thread(cluster.redis.start)
        return
    replicas = cluster.engines if kind == "engine" else cluster.apis
    victim = rng.choice([each for each in replicas if each.is_up])
    victim.kill()
    cluster.replace(victim)
    if kind == "api":  # so that one of two is always there, or coming
        await asyncio.to_thread(wait_all_ready, cluster.apis)


async def _check(
    cluster: Cluster,
    caller: Caller,
    tally: Tally,
    batch_id: str,
    bodies: Sequence[dict[str, Any]],
) -> None:
    state = (await caller.call("GET", f"/v1/batches/{batch_id}")).json()
    counts = {"total": len(bodies), "completed": len(bodies), "failed": 0}
    if (state["status"], state["request_counts"]) != ("completed", counts):
        tally.failures.append(f"{batch_id}: {state['status']} {state['request_counts']}")
        return
    reply = await caller.call("GET", f"/v1/files/{state['output_file_id']}/content")
    rows = [json.loads(text) for text in reply.text.splitlines()]
    if [row["custom_id"] for row in rows] != [f"{k}" for k in range(len(bodies))]:
        tally.failures.append(f"{batch_id}: the lines are not those of the input, in order")
        return
    for row, body in zip(rows, bodies, strict=True):
        tally.tokens += body["max_tokens"]
        (choice,) = row["response"]["body"]["choices"]
        expected = list(cluster.expected(body))
        if (choice["token_ids"], choice["finish_reason"]) != (expected, "length"):
            tally.failures.append(f"{batch_id}: line {row['custom_id']} is {choice}")
    for row, body in list(zip(rows, bodies, strict=True))[:: max(1, len(rows) // ONLINE)]:
        tally.tokens += body["max_tokens"]
        online = (await caller.call("POST", PATH, json=body)).json()
        if online["choices"] != row["response"]["body"]["choices"]:
            tally.failures.append(f"{batch_id}: line {row['custom_id']} differs online")


async def _check_usage(cluster: Cluster, tally: Tally) -> None:
    """Each token counts once, whatever was killed."""
    today = int(time.time()) // DAY
    async with cluster.queue() as queue:
        rows = await queue.usage(range(today - 1, today + 2))
    counted = sum(row.generated_tokens for row in rows)
    if counted != tally.tokens:
        tally.failures.append(f"{counted} tokens were counted, {tally.tokens} generated")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Kill everything while batches run.")
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="quire-batches-") as name:
        folder = Path(name)
        (folder / "apis").mkdir()
        tiny = build_tiny_model(pre_tokenizers.Digits(individual_digits=True))
        fork_server, api_forks = ForkServer(folder), ForkServer(folder / "apis", program=ROLES)
        cluster = Cluster(
            folder,
            write_model_of_oracle(tiny, folder / "model"),
            fork_server=fork_server,
            api_forks=api_forks,
            timings=Timings(),
        )
        try:
            cluster.start()
            work = run_batches(
                cluster,
                random.Random(options.seed),
                lines=options.lines,
                kills=options.kills,
                report=partial(print, flush=True),
            )
            tally = asyncio.run(work)
        finally:
            cluster.close()
            fork_server.close()
            api_forks.close()
    sys.stdout.write("\n".join([*tally.failures, tally.line(), ""]))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
