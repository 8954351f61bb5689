"""A rolling change of the model under load: no answer is the other model's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.rolling import ANSWERS, run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

CHANGES = 6


def test_rolling_changes_of_the_model(tmp_path: Path) -> None:
    tally = run(tmp_path, changes=CHANGES, seed=1)
    assert tally.wrong == []
    assert tally.unclear == []
    assert sum(tally.answers.values()) >= ANSWERS * CHANGES
    assert tally.errors["model_not_found"], "no request met a replica of the other model"
