"""`quire tune` as a process: it trains, stops, resumes, and what it writes is served."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from typer.testing import CliRunner

from service.__main__ import app
from service.errors import StartupError
from tests.conftest import ROOT, default, serving
from tests.support.tiny_model import CORPUS, TinyModel
from tests.support.transformers_answers import greedy_logprobs
from tests.support.waiting import PATIENCE

PLAN = """
[model]
vocab_size = 300
hidden_size = 32
num_layers = 1
num_heads = 2
num_kv_heads = 1
intermediate_size = 32
context = 16
holdout = 0.2
[training]
steps = {steps}
batch = 2
"""

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

NO_THREADS = """
from pathlib import Path
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name], threads
"""
TUNING = (
    """
import sys
from service.__main__ import app
app(sys.argv[1:], standalone_mode=False)
"""
    + NO_THREADS
)


def command(folder: Path, *flags: str, steps: int) -> list[str]:
    (folder / "plan.toml").write_text(PLAN.format(steps=steps))
    (folder / "text.txt").write_text("\n".join(CORPUS) * 20)
    return [
        *(sys.executable, "-m", "service", "tune", "pretrain"),
        *("--config", str(folder / "plan.toml"), "--data", str(folder / "text.txt")),
        *("--out", str(folder / "out"), "--threads", "1", "--device", "cpu", *flags),
    ]


def first_step(process: subprocess.Popen[str]) -> int:
    """The number of the first step that is reported."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            return int(line.split("/")[0].removeprefix("step "))
    raise AssertionError("it ended before its first step")


@pytest.mark.slow
def test_an_interrupted_run_is_saved_and_goes_on(tmp_path: Path) -> None:
    """A run without an end in sight, interrupted as soon as it reports a step, twice."""
    steps = []
    for flags in ((), ("--resume",)):
        process = subprocess.Popen(
            command(tmp_path, *flags, steps=10**8), cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        try:
            steps.append(first_step(process))
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        assert process.returncode == 130, rest
        assert "continue with --resume" in rest
    assert steps[0] == 1
    assert steps[1] > 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["training.state"]


@pytest.mark.slow
def test_a_model_from_scratch_is_served_as_transformers_reads_it(tmp_path: Path) -> None:
    run = subprocess.run(
        command(tmp_path, steps=100), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "held-out loss" in run.stderr
    assert "bits per byte" in run.stderr
    options = (*default(tmp_path / "out"), "--runner", "torch", "--dtype", "float32")
    with serving(*options, log=tmp_path / "log") as url:
        body = {
            "model": "smollm2-135m-instruct",
            "prompt": "the quick",
            "max_tokens": 4,
            "ignore_eos": True,
            "temperature": 0,
            "logprobs": 0,
        }
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE).json()
    theirs = greedy_logprobs(tmp_path / "out", "the quick", 4)
    assert max(theirs) > -3, "a uniform guess has -5.7"
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(theirs, abs=1e-3)


@pytest.mark.slow
def test_a_classifier_is_served_as_transformers_reads_it(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    """Of a decoder, with labels by the first word: probabilities of one text and of several."""
    from transformers import AutoModelForSequenceClassification

    model, out = tiny_model.write_folder(tmp_path / "tiny"), tmp_path / "out"
    rows = [f"{word} {rest},{word}" for word in ("quick", "lazy") for rest in CORPUS[1].split()]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows, *rows]))
    words = ["tune", "classify", "--model", str(model), "--data", str(tmp_path / "rows.csv")]
    words += ["--text", "text", "--label", "label", "--out", str(out), "--epochs", "2"]
    words += ["--learning-rate", "0.01", "--batch", "4", "--device", "cpu", "--threads", "1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.exception
    texts = ["quick 3.14159", "lazy 123", "the dog"]
    network = AutoModelForSequenceClassification.from_pretrained(str(out))
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    with torch.no_grad():
        ids = [torch.tensor([tokenizer.encode(text).ids]) for text in texts]
        logits = [network(each).logits[0] for each in ids]
    expected = [each.log_softmax(-1) for each in logits]
    options = ("--model", f"judge={out}", "--dtype", "float32")
    with serving(*options, log=tmp_path / "log") as url:
        body = {"model": "judge", "input": texts}
        served = httpx.post(f"{url}/v1/classify", json=body, timeout=PATIENCE).json()["data"]
        (listed,) = httpx.get(f"{url}/v1/models", timeout=PATIENCE).json()["data"]
    assert listed["endpoints"] == ["/v1/classify"]
    assert sorted(listed["labels"]) == ["lazy", "quick"]
    for found, logprobs in zip(served, expected, strict=True):
        assert found["label"] == network.config.id2label[int(logprobs.argmax())]
        assert np.log(found["probs"]) == pytest.approx(logprobs.tolist(), abs=1e-3)


@pytest.mark.longer
def test_two_processes_learn_what_one_learns(tmp_path: Path, tiny_model: TinyModel) -> None:
    """Data parallelism: each takes half of a step's rows, which have unequal numbers of tokens, and
    the losses of all steps are those of one process within rounding. No thread of the group is
    left when training has ended.
    """
    (tmp_path / "tuning.py").write_text(TUNING)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    model = str(tiny_model.write_folder(tmp_path / "tiny"))
    rows = [{"prompt": "the quick", "completion": " fox" * length} for length in (1, 2, 9, 20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = []
    for processes, start in ((1, ()), (2, LAUNCHER)):
        out = tmp_path / f"by-{processes}"
        words = [sys.executable, *start, str(tmp_path / "tuning.py")]
        words += ["tune", "generate", "--model", model]
        words += ["--data", str(tmp_path / "rows.jsonl"), "--out", str(out), "--device", "cpu"]
        words += ["--batch", str(4 // processes), "--epochs", "5", "--learning-rate", "0.01"]
        words += ["--holdout", "0", "--threads", "1"]
        run = subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        found = dict(re.findall(r"^step (\d)/5: loss ([\d.]+)", run.stderr, re.MULTILINE))
        losses.append([float(found[step]) for step in ("1", "5")])
        assert (out / "model.safetensors").exists()
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0][1] < losses[0][0] / 1.5


LEAVING = (
    """
import torch
from model.training.ranks import join_ranks
ranks = join_ranks("cpu")
tensors = [torch.full((3,), float(ranks.index + 1)) for _ in range(4)]
ranks.sum_all(tensors)
ranks.copy(tensors)
assert all(bool((tensor == 3).all()) for tensor in tensors)
ranks.close()
"""
    + NO_THREADS
)


@pytest.mark.longer
def test_a_process_leaves_its_group_without_threads(tmp_path: Path) -> None:
    """A thread that outlives the group can abort the process when it ends."""
    (tmp_path / "leaving.py").write_text(LEAVING)
    words = [sys.executable, *LAUNCHER, str(tmp_path / "leaving.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_errors_are_one_line(tmp_path: Path, tiny_model: TinyModel) -> None:
    model = str(tiny_model.write_folder(tmp_path / "tiny"))
    (tmp_path / "rows.csv").write_text("text,label\na,x\nb,y\n")
    flags = ["--data", str(tmp_path / "rows.csv"), "--out", str(tmp_path / "out")]
    cases = [
        (["pretrain", "--data", str(tmp_path / "none"), "--out", "x"], "matches no text"),
        (["generate", *flags, "--model", model], "row 1: a row has messages"),
        (["generate", *flags, "--model", str(tmp_path / "absent")], "model not found"),
        (["classify", *flags, "--model", model, "--text", "t", "--label", "label"], "no column"),
        (
            ["classify", *flags, "--model", model, "--text", "text", "--label", "label"],
            "too few rows",
        ),
        (["generate", *flags, "--model", model, "--device", "warp"], "device warp"),
    ]
    for words, message in cases:
        result = CliRunner().invoke(app, ["tune", *words])
        assert isinstance(result.exception, StartupError), (words, result.output, result.exception)
        assert message in str(result.exception)
        assert "\n" not in str(result.exception)


def test_a_folder_with_files_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    (tmp_path / "text.txt").write_text("a text")
    flags = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["tune", "pretrain", *flags])
    assert "not empty" in str(result.exception)
