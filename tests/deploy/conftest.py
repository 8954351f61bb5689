"""Fixtures: the deployed Redis, with its own configuration and access list, as a process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.redis_process import RedisServer
from tests.deploy.manifests import DEPLOY

PASSWORD = "0123456789abcdef"


class DeployedRedis(RedisServer):
    """redis-server over deploy/redis, with the list that its own script wrote.

    Only what differs on this machine is another: folder and port.
    """

    def __init__(self, directory: Path, *, frozen_clock: bool = False) -> None:
        self.acl = directory.with_suffix(".acl")
        options = ("--aclfile", str(self.acl))
        super().__init__(directory, options=options, frozen_clock=frozen_clock)

    @property
    def url(self) -> str:
        return f"redis://quire:{PASSWORD}@127.0.0.1:{self.port}/0"

    def configuration(self) -> Path:
        """deploy/redis/redis.conf, about this machine's folder."""
        text = (DEPLOY / "redis" / "redis.conf").read_text()
        assert "\ndir /data\n" in text
        path = self.directory.with_suffix(".conf")
        path.write_text(text.replace("\ndir /data\n", f"\ndir {self.directory}\n"))
        return path

    def start(self) -> None:
        self.directory.mkdir(parents=True)
        subprocess.run(
            ["sh", str(DEPLOY / "redis" / "render-acl.sh"), str(self.acl)],
            env={"PATH": os.environ["PATH"], "REDIS_PASSWORD": PASSWORD}, check=True,
        )  # fmt: skip
        # As the StatefulSet has it: the file, then its options.
        command = ["redis-server", str(self.configuration()), *self.options]
        command += ["--port", str(self.port), "--bind", "127.0.0.1"]
        env = os.environ | (self._freeze() if self.frozen_clock else {})
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
        for _ in range(2400):
            with contextlib.suppress(OSError):
                if self.ask("PING").startswith("-NOAUTH"):
                    return
            time.sleep(0.025)
        raise RuntimeError("redis-server did not start, or lets anybody in")


@pytest.fixture(scope="session")
def deployed_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeployedRedis]:
    server = DeployedRedis(tmp_path_factory.mktemp("deployed") / "redis")
    server.start()
    yield server
    server.close()
