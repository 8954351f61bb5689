"""The GPU benchmark runs from end to end in miniature; what judges in it can also say no."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loadtest.bench import gpu_bench
from loadtest.bench.gpu.bench import Bench
from loadtest.bench.gpu.crowd import Crowd
from loadtest.bench.gpu.exactness import NotExact, matrix, measure
from loadtest.bench.gpu.models import LLAMA31_8B, QWEN3_600M, TINY, Shape
from loadtest.bench.gpu.offline import w1
from loadtest.bench.gpu.products import find_orders
from loadtest.bench.gpu_bench import PIECES, Piece
from model.batch import Batch, StepOutput
from model.runners.exactness import ExactnessCheck

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
    """Every piece, each in its process: the kernels interpreted where there is no GPU."""
    variables = dict(os.environ)
    if not torch.cuda.is_available():
        variables["TRITON_INTERPRET"] = "1"
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "loadtest.bench.gpu_bench", "--smoke", "--out", str(out)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=variables)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(out.read_text())
    assert found["machine"]["cpus"] > 0
    pieces = found["pieces"]
    assert {name: piece["state"] for name, piece in pieces.items()} == dict.fromkeys(PIECES, "done")
    tables = {name: rows for piece in pieces.values() for name, rows in piece["tables"].items()}
    for table in ("ceilings", "kernel: attention", "kernel: product", "steps", "products: speed"):
        for row in tables[table]:
            for value in row.values():
                assert value is None or isinstance(value, str) or value > 0, row
    by = [
        row["by"] for name in ("w1", "http", "transformers") for row in pieces[name]["tables"]["W1"]
    ]
    assert by[:3] == ["runner", "engine", "HTTP"]
    assert by[3].startswith("transformers")
    (ways,) = pieces["exact"]["tables"].values()
    assert {"alone", "chunks of 4", "prefix hit", "recomputed"} <= {row["way"] for row in ways}
    assert all({"1", "3"} < row.keys() for row in ways)
    assert all(row["exact"] for row in tables["products: orders of sums"] if row["by"] == "ours")
    assert [row["batch"] for row in tables["cost of exactness"]] == [2]


def test_pieces_run_one_by_one_keep_what_was_found(tmp_path: Path) -> None:
    """And where there is no time for one, it is named, and the end is not a success."""
    out = tmp_path / "deep" / "found.json"
    for name in ("ceilings", "steps"):
        given = ["--smoke", "--only", name, "--minutes", "0", "--out", str(out)]
        assert gpu_bench.main(given) == 1
    pieces = json.loads(out.read_text())["pieces"]
    assert {name: piece["state"][:8] for name, piece in pieces.items()} == {
        "ceilings": "left out",
        "steps": "left out",
    }


@pytest.mark.slow
def test_a_piece_that_hangs_or_fails_takes_no_other_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has no time to even import torch; one is unknown to the process it runs in."""
    hanging, failing = Piece(least=0, most=0.1), Piece(least=0, most=60)
    monkeypatch.setattr(gpu_bench, "_GRACE", 0.3)
    monkeypatch.setattr(gpu_bench, "PIECES", {"ceilings": hanging, "nothing": failing})
    out = tmp_path / "found.json"
    assert gpu_bench.main(["--smoke", "--only", "ceilings,nothing", "--out", str(out)]) == 1
    pieces = json.loads(out.read_text())["pieces"]
    assert pieces["ceilings"]["state"].startswith("cut off")
    assert pieces["nothing"]["state"].startswith("failed: KeyError")


def test_an_unknown_piece_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_bench.main(["--only", "steps,nothing"])
    assert "no such piece: nothing" in capsys.readouterr().err


def small(size: int) -> torch.Tensor:
    """Whole numbers: sums of them are exact in any order."""
    return torch.arange(size * 6).reshape(size, 6).float() % 5 - 2


def test_orders_of_sums_are_told_apart() -> None:
    """A library that adds up otherwise from 17 rows on, from 33 on, or in every second row."""
    sizes = [*range(1, 41), 64, 128]

    def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x.round() @ weight.T

    def two_kinds(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return exact(x, weight) + (17 <= len(x) < 33) * 1e-3

    def uneven(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        odd = (torch.arange(len(x)) // 8 % 2 > 0) & (len(x) > 20)
        return exact(x, weight) + odd[:, None] * 1e-3

    found = find_orders(exact, small(7), sizes)
    assert (found.exact, found.exact_from, str(found)) == (True, 1, "1-128")
    found = find_orders(two_kinds, small(7), sizes)
    assert (found.exact, found.exact_from, str(found)) == (False, 33, "1-16, 33-128 | 17-32")
    found = find_orders(two_kinds, small(7), range(1, 33))
    assert (found.exact, found.exact_from) == (False, 17)
    found = find_orders(uneven, small(7), sizes)
    assert (found.exact, found.exact_from, str(found)) == (False, None, "1-20 | uneven 21-128")


class Counting:
    """A runner that counts what a sequence holds or, broken, what the step holds."""

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
    """A bench whose runner is given, and which believes in a GPU."""

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


def test_a_crowd_is_in_every_step_but_the_first(tmp_path: Path) -> None:
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


def test_a_crowd_lives_in_its_own_blocks() -> None:
    """Its sequences grow, end and begin anew, and none ever comes near the blocks of the others."""
    runner = Counting()
    crowd = Crowd(runner, others=5, alone=0, room=16)
    seen = []
    for _ in range(40):
        joined = crowd._join(_one_row(), front=2)
        seen.append(joined.context_lens_S[[0, 1, 3, 4, 5]].tolist())
        assert joined.block_table_SB[[0, 1, 3, 4, 5]].min() >= runner.num_blocks - 5 * 4
        assert joined.batch_slots_S.tolist() == [2, 3, 0, 4, 5, 6]
        assert crowd.run(_one_row()).tokens_R.tolist() == [3 + 7]
    lengths = np.array(seen)
    assert lengths.min() == 1
    assert 1 < lengths.max() <= 16
    assert len({tuple(row) for row in lengths.T.tolist()}) == 5


def _one_row() -> Batch:
    from tests.support.builders import Piece as Sequence
    from tests.support.builders import make_batch

    return make_batch([Sequence(tokens=[0, 0, 0, 7], blocks=[1], seat=0)])
