"""The start of a server: what it loads, and what it does not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.mapped import mapped_by_server
from tests.support.tiny_model import TinyModel

pytestmark = pytest.mark.slow


def test_a_server_with_the_native_runner_does_not_load_torch(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Seconds of every start and hundreds of megabytes. Seen in what the process has mapped."""
    serve = [sys.executable, "-m", "service", "serve"]
    mapped = mapped_by_server(serve, tiny_model, tmp_path, cwd=ROOT)
    assert "libquire" in mapped
    assert "libtorch" not in mapped
