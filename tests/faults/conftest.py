"""Fixtures of the fault tests: one cluster for the session, healed and emptied before each test."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, Timings
from tests.cluster.processes import ForkServer
from tests.faults.oracle_model import write_model_of_oracle
from tests.support.tiny_model import TinyModel


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=100, help="engine kills of the long fault test")


@pytest.fixture(scope="session")
def folder_of_model(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model files of API replicas."""
    return write_model_of_oracle(tiny_model, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    fork_server = ForkServer(tmp_path_factory.mktemp("fork_server"))
    yield fork_server
    fork_server.close()


@pytest.fixture(scope="session")
def session_cluster(
    fork_server: ForkServer, folder_of_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    cluster = Cluster(
        tmp_path_factory.mktemp("cluster"),
        folder_of_model,
        fork_server=fork_server,
        timings=Timings(),
    )
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def cluster(session_cluster: Cluster) -> Cluster:
    """Two engines, two API replicas, an empty Redis."""
    session_cluster.reset()
    return session_cluster


@pytest.fixture
def own_cluster(
    fork_server: ForkServer, folder_of_model: Path, tmp_path: Path
) -> Iterator[Callable[..., Cluster]]:
    """Starts a cluster for one test; arguments: sizes and the fields of Timings."""
    made: list[Cluster] = []

    def make(
        *, num_engines: int = 2, num_apis: int = 1, max_sequences: int = 16, **times: float
    ) -> Cluster:
        cluster = Cluster(
            tmp_path / f"cluster-{len(made)}",
            folder_of_model,
            fork_server=fork_server,
            timings=Timings(**times),
            num_engines=num_engines,
            num_apis=num_apis,
            max_sequences=max_sequences,
        )
        made.append(cluster)
        cluster.start()
        return cluster

    yield make
    for cluster in made:
        cluster.close()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers that are the same in every run of a test."""
    return random.Random(request.node.nodeid)
