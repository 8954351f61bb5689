"""llm-comply: conformance of the three dialects to their schemas and their behaviour.

Its own requests, with a seed: it asks at temperature 1, and a small model may come to no end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llm_comply
import pytest
from conftest import small_server
from llm_comply.cli import _SPEC_FILES as SPEC_FILES
from llm_comply.config import ComplianceConfig
from llm_comply.result import TestStatus as Status
from llm_comply.runner import TestRunner as Runner
from llm_comply.schema import SpecLoader
from llm_comply.test_case import TestCase as Case
from llm_comply.tests import get_tests

CLIENT = "llm-comply"
SPECS = Path(llm_comply.__file__).parent / "specs"
IMAGES = "the model reads no images"
REASONS = {
    "chat-image-input": IMAGES,
    "anth-image-input": IMAGES,
    "image-input": IMAGES,
    "error-handling": "the schema of Open Responses requires no model, and one is served",
}
REASON = {"chat-reasoning-summary", "anth-thinking-display"}  # need a model that does
ADVISORY = {"compact-response"}  # 404 is an answer, with warnings
SEED = {"seed": 1}


def cases() -> list[Any]:
    """All of its tests of the dialects that Quire has."""
    return [
        pytest.param(dialect, case, id=case.id, marks=marks(case))
        for dialect in ("openai-chat", "open-responses", "anthropic")
        for case in get_tests(dialect)
    ]


def marks(case: Case) -> Any:
    reason = REASONS.get(case.id)
    return [pytest.mark.xfail(reason=reason, strict=True)] if reason else []


@pytest.fixture(scope="session")
def thinker(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program = Path(str(pytestconfig.getoption("--quire")))
    with small_server("thinker", program, tmp_path_factory.mktemp("thinker")) as server:
        yield server


@pytest.mark.filterwarnings("ignore:jsonschema.RefResolver")
@pytest.mark.proves(CLIENT)
@pytest.mark.parametrize(("dialect", "case"), cases())
def test_it_complies(request: pytest.FixtureRequest, dialect: str, case: Case) -> None:
    server = request.getfixturevalue("thinker" if case.id in REASON else "server")
    config = ComplianceConfig(
        base_url=server.openai_url, api_key="none", model=server.model, timeout=240, verbose=True
    )
    schemas = SpecLoader(str(SPECS / SPEC_FILES[dialect]))
    seeded = replace(case, skip_reason=None, build_request=lambda c: case.build_request(c) | SEED)
    result = Runner(config, [seeded], schemas).run_one(seeded)
    assert result.status is Status.PASSED, (result.errors, result.response)
    if case.id not in ADVISORY:
        assert not result.warnings, (result.warnings, result.response)
