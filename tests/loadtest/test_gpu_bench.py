"""The GPU benchmark runs end to end in miniature; its exactness check can fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from loadtest.bench.gpu import __main__ as gpu_bench
from loadtest.bench.gpu.__main__ import STAGES, Stage
from loadtest.bench.gpu.background import BackgroundLoad
from loadtest.bench.gpu.bench import Bench
from loadtest.bench.gpu.exactness import NotExact, matrix, measure
from loadtest.bench.gpu.first import KERNEL_TESTS, PYTEST, ROOT
from loadtest.bench.gpu.models import LLAMA31_8B, QWEN3_600M, TINY, Shape
from loadtest.bench.gpu.offline import w1
from model.batch import Batch, StepOutput
from model.runners import RunnerOptions
from model.runners.choose import choose_sizes
from model.runners.exactness import ExactnessCheck
from service.settings import Settings

TRIAL = ExactnessCheck(prompt=9, answer=4, beside=(), chunks=(1, 4))


def test_the_workload_is_nano_vllms() -> None:
    assert (w1().tokens_in, w1().tokens_out) == (142_827, 133_966)


def test_what_a_step_must_read() -> None:
    small, large = Shape("", QWEN3_600M), Shape("", LLAMA31_8B)
    assert small.weight_bytes == pytest.approx(1.19e9, rel=0.01)
    assert small.kv_bytes == 114_688
    assert large.weight_bytes == pytest.approx(15.0e9, rel=0.01)
    assert large.kv_bytes == 131_072


@pytest.mark.kernels
@pytest.mark.timeout(1000)
def test_it_runs_in_miniature(tmp_path: Path) -> None:
    """Every stage in its process; without a GPU the kernels are interpreted."""
    variables = dict(os.environ)
    if not torch.cuda.is_available():
        variables["TRITON_INTERPRET"] = "1"
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "loadtest.bench.gpu", "--smoke", "--out", str(out)]
    command += ["--minutes", "15"]  # more than a GPU needs: a busy machine interprets slowly
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=variables)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(out.read_text())
    assert found["machine"]["cpus"] > 0
    stages = found["stages"]
    assert {name: stage["state"] for name, stage in stages.items()} == dict.fromkeys(STAGES, "done")
    tables = {name: rows for stage in stages.values() for name, rows in stage["tables"].items()}
    for table in (
        "ceilings",
        "kernel: attention",
        "kernel: product",
        "steps",
        "products of full steps",
    ):
        for row in tables[table]:
            for value in row.values():
                assert value is None or isinstance(value, str) or value > 0, row
    by = [
        row["by"]
        for name in ("w1", "long", "engine", "http", "transformers")
        for row in stages[name]["tables"]["W1"]
    ]
    assert by[:4] == ["runner", "runner, 1k/1k", "engine", "HTTP"]
    assert by[4].startswith("transformers")
    (ways,) = stages["exact"]["tables"].values()
    assert {"alone", "chunks of 4", "prefix hit", "recomputed"} <= {row["way"] for row in ways}
    assert all({"1", "3"} < row.keys() for row in ways)
    for table in ("cost of exactness", "launches that overlap"):
        assert [row["batch"] for row in tables[table]] == [2]


def test_stages_run_one_by_one_are_all_kept(tmp_path: Path) -> None:
    """A stage without time is named, and the exit status is 1."""
    out = tmp_path / "deep" / "found.json"
    for name in ("ceilings", "steps"):
        given = ["--smoke", "--only", name, "--minutes", "0", "--out", str(out)]
        assert gpu_bench.main(given) == 1
    stages = json.loads(out.read_text())["stages"]
    assert {name: stage["state"][:8] for name, stage in stages.items()} == {
        "ceilings": "left out",
        "steps": "left out",
    }


@pytest.mark.slow
def test_a_stage_that_hangs_or_fails_does_not_stop_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has no time to import torch; one is unknown in its process."""
    hanging, failing = (
        Stage(function=name, least=0, most=most)
        for name, most in (("ceilings.measure", 0.1), ("nothing.measure", 60))
    )
    monkeypatch.setattr(gpu_bench, "_GRACE", 0.3)
    monkeypatch.setattr(gpu_bench, "STAGES", {"ceilings": hanging, "nothing": failing})
    out = tmp_path / "found.json"
    assert gpu_bench.main(["--smoke", "--only", "ceilings,nothing", "--out", str(out)]) == 1
    stages = json.loads(out.read_text())["stages"]
    assert stages["ceilings"]["state"].startswith("cut off")
    assert stages["nothing"]["state"].startswith("failed: KeyError")


def test_a_long_stage_leaves_others_their_least_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first commands once might have ended with the exactness matrix, and no step measured."""
    given: dict[str, float] = {}

    def run(name: str, *, seconds: float, **_: Any) -> gpu_bench.Found:
        given[name] = seconds
        return gpu_bench.Found(state="done")

    stages = {
        name: Stage(function="", least=least, most=most)
        for name, least, most in (("a", 10, 300), ("b", 20, 25), ("c", 30, 999))
    }
    monkeypatch.setattr(gpu_bench, "STAGES", stages)
    monkeypatch.setattr(gpu_bench, "_run", run)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    out = str(tmp_path / "found.json")
    assert gpu_bench.main(["--smoke", "--only", "a,b,c", "--minutes", "2", "--out", out]) == 0
    assert given == {"a": 50, "b": 25, "c": 100}  # 100 s, and no stage took any of it
    assert gpu_bench.main(["--smoke", "--only", "a,b,c", "--minutes", "1", "--out", out]) == 0
    assert given == {"a": 10, "b": 20, "c": 40}


def test_an_unknown_stage_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_bench.main(["--only", "steps,nothing"])
    assert "no such stage: nothing" in capsys.readouterr().err


class Counting:
    """A runner whose tokens depend on the sequence or, if it breaks, on the batch size too."""

    def __init__(self, *, breaks_at: int = 10**9) -> None:
        self.config = TINY
        self.block_size, self.num_blocks = 4, 400
        self.numeric_class, self.exact = "counting", True
        self.sizes: list[int] = []
        self._breaks_at = breaks_at

    def run(self, batch: Batch) -> StepOutput:
        batch.check(block_size=4, num_blocks=self.num_blocks, vocab_size=TINY.vocab_size)
        self.sizes.append(batch.num_sequences)
        rows = batch.sample_rows_R
        counts = batch.positions_T[rows] + batch.tokens_T[rows]
        tokens = (counts + (batch.num_sequences >= self._breaks_at)) % TINY.vocab_size
        tops = np.repeat(tokens[:, None], batch.sampling.num_top, axis=1)
        none = np.zeros(0, np.float32)
        return StepOutput(
            tokens_R=tokens.astype(np.int32),
            logprobs_R=counts.astype(np.float32),
            top_ids_RN=tops,
            top_logprobs_RN=tops.astype(np.float32),
            score_logprobs_Q=none,
            score_top_ids_QN=np.zeros((0, 0), np.int32),
            score_top_logprobs_QN=none[None],
        )

    def warm_up(self) -> None: ...

    def close(self) -> None: ...


class GivenBench(Bench):
    """A bench with a given runner."""

    given: Any = None

    def runner(self, *args: Any, **options: Any) -> Any:
        return self.given

    def release(self, runner: Any) -> None: ...


def bench(folder: Path, device: str = "cpu") -> GivenBench:
    return GivenBench(
        smoke=True,
        device=torch.device(device),
        out=folder / "tables.json",
        deadline=time.monotonic() + 100,
    )


def test_background_load_is_in_every_step_but_the_first(tmp_path: Path) -> None:
    runner = Counting()
    assert matrix(bench(tmp_path), runner, "counting", TRIAL, (1, 2, 6)) == []
    assert set(runner.sizes) == {1, 2, 6}
    first_of_six = runner.sizes.index(6)
    assert runner.sizes[first_of_six - TRIAL.answer : first_of_six] == [1] * TRIAL.answer
    assert set(runner.sizes[first_of_six:]) == {6}


def test_what_is_not_exact_is_named_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = Counting(breaks_at=6)
    broken = matrix(bench(tmp_path), runner, "counting", TRIAL, (1, 2, 6))
    assert "counting, 9 tokens, chunks of 4, batch size 6" in broken
    assert all(name.endswith("batch size 6") for name in broken)
    (rows,) = json.loads((tmp_path / "tables.json").read_text()).values()
    assert {"way": "prefix hit", "1": True, "2": True, "6": False} in rows
    assert "NO" in capsys.readouterr().out
    believing = bench(tmp_path, device="cuda")
    believing.given = Counting(breaks_at=3)
    with pytest.raises(NotExact, match="tiny, 9 tokens, recomputed, batch size 3"):
        measure(believing)


def test_background_load_has_its_own_blocks() -> None:
    """Its sequences grow, end and begin anew, and none ever comes near the blocks of the others."""
    runner = Counting()
    background = BackgroundLoad(runner, others=5, alone=0, room=16)
    seen = []
    for _ in range(40):
        joined = background._join(_one_row(), front=2)
        seen.append(joined.context_lens_S[[0, 1, 3, 4, 5]].tolist())
        assert joined.block_table_SB[[0, 1, 3, 4, 5]].min() >= runner.num_blocks - 5 * 4
        assert joined.batch_slots_S.tolist() == [2, 3, 0, 4, 5, 6]
        assert background.run(_one_row()).tokens_R.tolist() == [3 + 7]
    lengths = np.array(seen)
    assert lengths.min() == 1
    assert 1 < lengths.max() <= 16
    assert len({tuple(row) for row in lengths.T.tolist()}) == 5


def _one_row() -> Batch:
    from tests.support.builders import Piece as Sequence
    from tests.support.builders import make_batch

    return make_batch([Sequence(tokens=[0, 0, 0, 7], blocks=[1], seat=0)])


WITHOUT = r"""
import sys
from importlib import import_module

ALLOWED = {"torch", "triton", "numpy", "tokenizers", "pytest"}
OURS = %r

class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in OURS - ALLOWED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing)
"""


def dependencies() -> set[str]:
    """Import names of all packages that the project names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[^A-Za-z0-9_-]", line)[0] for lines in groups for line in lines}
    return {name.replace("-", "_").lower() for name in names} | {"pydantic_core"}


@pytest.mark.slow
def test_the_gpu_stages_need_no_package_of_the_service() -> None:
    """A machine with a GPU has torch, Triton, NumPy and tokenizers; nothing can be installed there.

    Every stage but those that start the service is imported there, and so are the kernels' tests.
    """
    stages = {stage.function.split(".")[0] for stage in STAGES.values()} | {"__main__"}
    names = [f"loadtest.bench.gpu.{name}" for name in sorted(stages)]
    names += ["tests.support.one_order", *(f"tests.model.test_{name}" for name in KERNEL_TESTS)]
    program = WITHOUT % dependencies() + f"[import_module(name) for name in {names!r}]"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    failing = subprocess.run(
        [sys.executable, "-c", WITHOUT % dependencies() + "import service.bench.client"],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert "No module named 'pydantic'" in failing.stderr


def packages_of(names: Sequence[str]) -> set[str]:
    """Normalised names of installed packages and of all that they require."""
    found: set[str] = set()
    open_names = list(names)
    while open_names:
        requirement = open_names.pop()
        name = normalised(re.split(r"[^A-Za-z0-9._-]", requirement)[0])
        if name in found or "extra ==" in requirement:
            continue
        try:
            open_names += requires(name) or []
        except PackageNotFoundError:  # for another system
            continue
        found.add(name)
    return found


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
def test_the_service_needs_no_package_but_the_listed_wheels() -> None:
    """Beside those that the head of the list names. All others are missing in the process."""
    text = (ROOT / "loadtest/bench/gpu/wheels.txt").read_text()
    given = ("torch", "triton", "numpy", "transformers", "rich", "typer", "httpx", "uvloop")
    head = " ".join(line for line in text.splitlines() if line.startswith("#"))
    assert all(name in head for name in given if name != "numpy")
    wheels = {line for line in text.splitlines() if not line.startswith("#")}
    present = packages_of([*given, "prometheus-client"]) | wheels
    owners = packages_distributions()
    missing = {top for top, names in owners.items() if not present & {*map(normalised, names)}}
    missing -= {"model", "service", "loadtest", "tests"}
    assert {"pytest", "playwright", "locust"} <= missing
    names = ["service.__main__", "service.roles", "service.app", "service.worker"]
    names += ["service.engine.loop", "service.bench.client", "loadtest.bench.gpu.http"]
    program = WITHOUT % missing + f"[import_module(name) for name in {names!r}]"
    run = subprocess.run(
        [sys.executable, "-c", program.replace("OURS - ALLOWED", "OURS")],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    required = {normalised(re.split(r"[^A-Za-z0-9._-]", line)[0]) for line in dependencies}
    assert required <= present


@pytest.mark.slow
def test_the_kernels_tests_run_without_the_suites_fixtures() -> None:
    """As the stage starts them: a test with the fixture `one_order`, and no conftest."""
    name = "test_the_size_of_a_split_shows_in_the_bits"
    path = ROOT / "tests/model/test_kernels_attention.py"
    run = subprocess.run(
        [*PYTEST, str(path), "-k", name], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert "1 passed" in run.stdout, run.stdout + run.stderr


def test_both_commands_name_stages_that_exist_and_each_is_in_one() -> None:
    named = []
    for script in ("gpu_first.sh", "gpu_second.sh"):
        text = (ROOT / "loadtest/bench/gpu" / script).read_text()
        for stages in re.findall(r"(?:stages=|--only )([a-z0-9]+(?:,[a-z0-9]+)+)", text):
            named += stages.split(",")
    assert set(named) == STAGES.keys() - {"products"}
    assert len(named) == len(set(named))


def test_the_measured_step_is_the_products_default(tmp_path: Path) -> None:
    sizes = choose_sizes(
        RunnerOptions(), runner="cuda", kv_memory=None, memory_share=0.9,
        max_batch_tokens=None, max_sequences=None,
    )  # fmt: skip
    real = replace(bench(tmp_path), smoke=False)
    assert (sizes.max_batch_tokens, sizes.max_sequences) == (real.budget, max(real.batches))
    assert Settings.model_fields["block_size"].default == RunnerOptions().block_size


def test_manifests_leave_the_measured_sizes_as_they_are() -> None:
    """Steps of other sizes have been measured by nothing, and those above 2048 have no graphs."""
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    variables = compose["services"]["engine-gpu"]["environment"]
    assert variables["QUIRE_MAX_BATCH_TOKENS"] == "${MAX_BATCH_TOKENS:-}"
    assert variables["QUIRE_MAX_SEQUENCES"] == "${MAX_SEQUENCES:-}"
    overlay = (ROOT / "deploy/kubernetes/overlays/gpu/settings.env").read_text()
    assert not re.findall("BLOCK_SIZE|MAX_BATCH_TOKENS|MAX_SEQUENCES", overlay)
