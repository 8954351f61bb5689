"""The soak for a minute: faults happen, every output is correct, nothing is lost or leaks."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from loadtest.load import ROOT

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("model", ["oracle", "real"])
def test_row_40_a_minute_of_it(model: str) -> None:
    command = [sys.executable, "-m", "loadtest.soak", "--minutes", "1", "--model", model]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said
    assert "violations: 0" in ended.stdout
    faults = re.search(r"^faults: \{(.*)\}$", ended.stdout, re.MULTILINE)
    assert faults, said
    happened = sum(map(int, re.findall(r": (\d+)", faults[1])))
    assert happened >= (5 if model == "oracle" else 1), said  # a real engine starts for seconds
    requests = re.search(r"^requests: (\d+) = .*'length': (\d+)", ended.stdout, re.MULTILINE)
    assert requests, said
    assert int(requests[1]) > int(requests[2]) > 50
