"""The overlay `redis-cluster`: its commands and scripts make a cluster that the queue can use."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError

from service.queues import open_queue
from service.queues.contract import QueueLimits
from tests.deploy.conftest import PASSWORD
from tests.deploy.manifests import DEPLOY, containers, get, render
from tests.queues.builders import be_patient, finish, make_engine, make_submission
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.slow
SERVERS = 6


class Node:
    """A pod of the StatefulSet as a process, on an address of its own, with the pod's options."""

    def __init__(self, number: int, port: int, folder: Path) -> None:
        self.address, self.port = f"127.0.77.{number + 1}", port
        self.folder = folder / str(number)
        self.folder.mkdir()
        redis = get(render("redis-cluster"), "StatefulSet", "quire-redis")
        server, init = containers(redis)
        environment = os.environ | {"REDIS_PASSWORD": PASSWORD}
        acl = str(self.folder / "users.acl")
        assert init["command"][:2] == ["sh", "/etc/redis/render-acl.sh"]
        script = ["sh", str(DEPLOY / "redis" / "render-acl.sh"), acl, *init["command"][3:]]
        subprocess.run(script, env=environment, check=True)
        configuration = self.folder / "redis.conf"
        text = (DEPLOY / "redis" / "redis.conf").read_text()
        configuration.write_text(text.replace("\ndir /data\n", f"\ndir {self.folder}\n"))
        known = {
            "/etc/redis/redis.conf": str(configuration),
            "/run/redis/users.acl": acl, "/data/nodes.conf": "nodes.conf",
            "$(POD_IP)": self.address, "$(REDIS_PASSWORD)": PASSWORD,
        }  # fmt: skip
        command = [known.get(word, word) for word in server["command"]]
        command += ["--bind", self.address, "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def info(self, user: str, *command: str) -> dict[str, str]:
        """The reply of a command as name -> value; empty while the server does not answer."""
        with contextlib.suppress(RedisError, OSError), self._client(user) as client:
            reply: Any = client.execute_command(*command)
            if isinstance(reply, bytes):
                lines = reply.decode().split()
                reply = dict(line.split(":", 1) for line in lines if ":" in line)
            return dict(reply)
        return {}

    def _client(self, user: str) -> Redis:
        return Redis(host=self.address, port=self.port, username=user, password=PASSWORD)


def until(condition: Any, what: str) -> None:
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends, what
        time.sleep(0.05)


def free_port(count: int) -> int:
    """A port that is free at every address, as is that of the cluster's bus: 10000 more."""
    draw = random.Random(os.getpid())
    while True:
        port = draw.randrange(20_000, 30_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for number in range(count):
                for each in (port, port + 10_000):
                    probe = stack.enter_context(socket.socket())
                    probe.bind((f"127.0.77.{number + 1}", each))
            return port


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    """Servers that form a cluster, made by the script that an operator runs."""
    port, made = free_port(SERVERS), list[Node]()
    try:
        made += [Node(number, port, tmp_path) for number in range(SERVERS)]
        for node in made:
            until(lambda node=node: node.info("cluster", "INFO"), f"{node.address} answers")
        names = tmp_path / "getent"  # the name service of a cluster
        names.write_text('#!/bin/sh\nname=${2%%.*}\necho "127.0.77.$((${name##*-} + 1)) $2"\n')
        names.chmod(0o755)
        environment = os.environ | {"REDIS_PASSWORD": PASSWORD, "REDIS_PORT": str(port)}
        environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
        script = ["sh", str(DEPLOY / "redis" / "create-cluster.sh"), str(SERVERS), "quire-redis"]
        done = subprocess.run(
            script, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stdout + done.stderr
        yield made
    finally:
        for node in made:
            node.process.kill()
            node.process.wait()


async def test_the_overlays_servers_form_a_cluster(
    nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each primary gets its replica by the replicas' own user, and answers go through the queue."""
    for node in nodes:
        until(
            lambda node=node: node.info("cluster", "CLUSTER", "INFO").get("cluster_state") == "ok",
            f"{node.address} is part of the cluster",
        )

    def replicas_copy() -> bool:
        found = [node.info("quire", "INFO") for node in nodes]
        links = [info["master_link_status"] for info in found if info.get("role") == "slave"]
        return links == ["up"] * (SERVERS // 2)

    until(replicas_copy, "each primary has a replica that copies it")
    be_patient(monkeypatch)
    url = f"redis+cluster://quire:{PASSWORD}@{nodes[0].address}:{nodes[0].port}"
    queue = open_queue(url, QueueLimits())
    await queue.open()
    try:
        for number in range(6):  # ids of all shards
            submission = make_submission(identifier=f"s{number}-{number * 9999:04x}")
            assert (await queue.submit(submission)).status == "ok"
        claimed = 0
        while claimed < 6:
            for claim in await queue.claim(make_engine(), limit=6, wait=0.1):
                await finish(queue, claim, length=2)
                claimed += 1
        assert (await queue.depth()).running_requests == 0
    finally:
        await queue.close()
