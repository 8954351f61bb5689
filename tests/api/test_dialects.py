"""The table of dialects, and the request that all of them parse into."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import service.api
from service.api import DIALECTS, dialect_of
from service.api.encoding.results import RENDERERS
from service.api.generation.manifest import Endpoint
from service.api.generation.request import PLANNED, sampling_of
from service.api.http.models import SamplingBody
from service.api.openai.schema import CompletionBody
from service.messages import SamplingParams

FOLDER = Path(service.api.__file__).parent


def test_every_endpoint_has_its_dialect_or_has_a_result() -> None:
    assert {*DIALECTS, *RENDERERS, Endpoint.DECISIONS} == set(Endpoint)
    assert not DIALECTS.keys() & RENDERERS.keys()
    assert all(dialect.name is endpoint for endpoint, dialect in DIALECTS.items())


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        ("/v1/messages", Endpoint.MESSAGES),
        ("/v1/messages/count_tokens", Endpoint.MESSAGES),
        ("/v1/messages2", Endpoint.CHAT),
        ("/v1/responses/resp_1/cancel", Endpoint.RESPONSES),
        ("/v1/completions", Endpoint.COMPLETIONS),
        ("/", Endpoint.CHAT),
    ],
)
def test_errors_have_the_form_of_the_path(path: str, endpoint: Endpoint) -> None:
    assert dialect_of(path).name is endpoint


def test_a_field_of_the_body_is_a_sampling_parameter_by_its_name() -> None:
    names = {field.name for field in fields(SamplingParams)} - PLANNED
    assert names <= SamplingBody.model_fields.keys()
    given = {
        "seed": -1, "temperature": 1, "top_k": 3, "top_p": 0.5, "min_p": 0.25,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 2,
        "logit_bias": {"7": 1, "5": -1.5},
    }  # fmt: skip
    assert given.keys() == names
    body = CompletionBody.model_validate({"model": "m", "prompt": "p", **given})
    changed = {"seed": 2**64 - 1, "logit_bias": ((5, -1.5), (7, 1.0))}
    assert sampling_of(body) == SamplingParams(**given | changed)  # type: ignore[arg-type]
    assert type(sampling_of(body).temperature) is float


@pytest.mark.parametrize("top_k", [0, -1, None])
def test_what_is_not_given_has_its_default(top_k: int | None) -> None:
    body = CompletionBody.model_validate({"model": "m", "prompt": "p", "top_k": top_k})
    sampling = sampling_of(body)
    assert sampling == SamplingParams(seed=sampling.seed)
    assert sampling.seed != sampling_of(body).seed


def test_no_part_below_the_dialects_imports_one() -> None:
    dialects = re.compile(r"service\.api\.(openai|anthropic|responses)\b")
    folders = ("http", "generation", "tools", "structured")
    files = [path for folder in folders for path in (FOLDER / folder).glob("*.py")]
    assert len(files) > 30
    assert [path.name for path in files if dialects.search(path.read_text("utf-8"))] == []
