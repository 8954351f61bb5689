"""Fixtures of the whole suite: the default model, and a tiny model in both file formats.

Imports nothing large: the process that only hands out tests to others reads this file, too.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from xdist import is_xdist_controller, is_xdist_worker

from tests.support.one_order import one_order
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from model.text.tokenizer import Tokenizer
    from tests.cluster.redis_process import RedisServer
    from tests.support.tiny_model import TinyModel

__all__ = ["one_order"]  # a fixture

ROOT = Path(__file__).parent.parent
MARKERS = frozenset({"slow", "longer", "kernels", "faults"})
UNIT_CASES = 2
"""Fast cases of one function that `make unit` runs; `make test` runs all."""
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A run in a shell's background ignores Ctrl-C, and so would the processes that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """In each process that runs tests: settings of libraries, and no garbage collection of what
    stays until the end. Modules and tests are a million objects: each collection takes long.
    """
    if is_xdist_controller(session):
        return (yield)
    if is_xdist_worker(session):
        atexit.register(os._exit, 0)  # after all else: a second to take modules apart is saved
    else:
        atexit.register(gc.unfreeze)  # extension modules report what is left
    gc.disable()
    _configure_libraries()
    result = yield
    gc.freeze()
    gc.set_threshold(10_000)  # collections at the default of 700 take a tenth of a test's time
    gc.enable()
    return result


def _configure_libraries() -> None:
    import hypothesis
    import torch

    # A slow machine is no fault: by default an example has 0.2 s.
    hypothesis.settings.register_profile(
        "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("patient")
    if not torch.cuda.is_available():
        # Kernels then run in Triton's interpreter, which it decides when it is first imported, by
        # whatever test comes first. Child processes inherit it and, without a GPU, use no kernel.
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Modules of which no test will run are not even imported: what they need takes seconds to."""
    wanted: str = config.getoption("markexpr")
    paths = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    unwanted = [_marks(path) & set(re.findall(r"not (\w+)", wanted)) for path in paths]
    return True if unwanted and all(unwanted) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test begins first: at the end it would keep one core busy and the others idle.

    `make unit` runs UNIT_CASES fast cases of each function; the others become `slow`.
    """
    items.sort(key=lambda item: item.name != "test_mypy_finds_nothing")
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if MARKERS.isdisjoint(mark.name for mark in item.iter_markers()):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for fast in cases.values():
        # In random order, or one of several parameters might keep its first value.
        for item in random.Random(len(fast)).sample(fast, len(fast))[UNIT_CASES:]:
            item.add_marker("slow")


def _marks(path: Path) -> set[str]:
    """Those of a whole module."""
    given = re.search(r"^pytestmark = (\[.*?\]|.*?)$", path.read_text(), re.DOTALL | re.MULTILINE)
    return set(re.findall(r"pytest\.mark\.(\w+)", given[1])) if given else set()


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's file, pulled on first use."""
    from model.checkpoint.fetch import default_cache, resolve

    return resolve("", cache=default_cache())


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that the test may harm."""
    from tests.cluster.redis_process import RedisServer

    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """One tiny model a session; nothing changes it."""
    from tokenizers import pre_tokenizers

    from tests.support.tiny_model import build_tiny_model

    return build_tiny_model(pre_tokenizers.Digits(individual_digits=True))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Its tokenizer, read from its files as any model's is."""
    from service.startup import load_tokenizer

    return load_tokenizer(tiny_model.write_folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def tiny_model_split_by() -> Callable[[str], TinyModel]:
    """Tiny models whose tokenizer.json splits text by a regular expression."""
    from tokenizers import Regex, pre_tokenizers

    from tests.support.tiny_model import build_tiny_model

    return lambda pattern: build_tiny_model(pre_tokenizers.Split(Regex(pattern), "isolated"))


@pytest.fixture(scope="session")
def server_url(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server with the default model, as `make serve` starts it, on free ports."""
    with serving(*default(default_model), log=tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def default(model: Path) -> tuple[str, ...]:
    """The options of a server with the default model."""
    return "--model-name", "smollm2-135m-instruct", "--model", str(model)


@contextlib.contextmanager
def serving(
    *options: str, log: Path, program: Sequence[str] = ("service",), cwd: Path = ROOT
) -> Iterator[str]:
    """The URL of a server that `python -m PROGRAM serve OPTIONS` runs meanwhile."""
    ports = [free_port(), free_port()]
    command = [sys.executable, "-m", *program, "serve", *options]
    command += ["--port", str(ports[0]), "--admin-port", str(ports[1])]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=cwd, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{ports[0]}"
    try:
        wait_until_ready(url, process, log=log)
        yield url
    finally:
        process.terminate()
        assert process.wait(timeout=PATIENCE) == 0, log.read_text()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_ready(url: str) -> bool:
    """The answer of the readiness probe; False without one. Each socket is closed on return: one
    that the garbage collector closes is an error of whatever test runs then.
    """
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=PATIENCE) as reply:
            return bool(reply.status == 200)
    except urllib.error.HTTPError as refusal:
        refusal.close()
    except OSError:
        pass
    return False


def wait_until_ready(url: str, process: subprocess.Popen[bytes], *, log: Path) -> None:
    """Waits for the readiness probe; fails at once where the process ended."""
    ends = time.monotonic() + 4 * PATIENCE
    while time.monotonic() < ends:
        assert process.poll() is None, log.read_text()
        if is_ready(url):
            return
        time.sleep(0.1)
    raise AssertionError(f"not ready in time:\n{log.read_text()}")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of torch wait for one another, and on a busy machine each wait is long."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
