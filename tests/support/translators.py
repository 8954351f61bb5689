"""A small encoder-decoder that `quire tune seq2seq` trains from dates and numbers."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
from pathlib import Path

from loadtest.dates import pair
from tests.conftest import ROOT


def train_translator(folder: Path) -> Path:
    """A translator of three updates, from pairs of dates and numbers."""
    draw = random.Random(0)
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("source", "target"), *(pair(draw) for _ in range(60))])
    words = [sys.executable, "-m", "service", "tune", "seq2seq", "--out", str(folder / "out")]
    words += ["--data", str(folder / "pairs.csv"), "--steps", "3", "--batch", "8"]
    words += [
        "--context",
        "512",
        "--hidden-size",
        "32",
        "--layers",
        "1",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "exact" in run.stderr
    return folder / "out"
