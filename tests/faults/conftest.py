"""Fixtures of the fault tests: one cluster for the session, healed and emptied before each test."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, Scale
from tests.cluster.processes import Forge
from tests.conftest import TinyModel
from tests.faults.oracle_model import write_model_of_oracle


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=100, help="engine kills of the long fault test")


@pytest.fixture(scope="session")
def folder_of_model(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the API replicas of an oracle cluster need of a model."""
    return write_model_of_oracle(tiny_model, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    forge = Forge(tmp_path_factory.mktemp("forge"))
    yield forge
    forge.close()


@pytest.fixture(scope="session")
def session_cluster(
    forge: Forge, folder_of_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    cluster = Cluster(
        tmp_path_factory.mktemp("cluster"), folder_of_model, forge=forge, scale=Scale()
    )
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def cluster(session_cluster: Cluster) -> Cluster:
    """Two engines, two API replicas, nothing stored."""
    session_cluster.begin()
    return session_cluster


@pytest.fixture
def own_cluster(
    forge: Forge, folder_of_model: Path, tmp_path: Path
) -> Iterator[Callable[..., Cluster]]:
    """Makes a cluster of the test's own; the arguments are those of Scale and the sizes."""
    made: list[Cluster] = []

    def make(
        *, num_engines: int = 2, num_apis: int = 1, seats: int = 16, **times: float
    ) -> Cluster:
        cluster = Cluster(
            tmp_path / f"cluster-{len(made)}",
            folder_of_model,
            forge=forge,
            scale=Scale(**times),
            num_engines=num_engines,
            num_apis=num_apis,
            seats=seats,
        )
        made.append(cluster)
        cluster.start()
        return cluster

    yield make
    for cluster in made:
        cluster.close()


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers that are the same in every run of a test."""
    return random.Random(request.node.nodeid)
