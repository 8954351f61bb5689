"""Adapters that `quire tune generate` wrote, served beside their base by `quire serve`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from service.__main__ import app
from service.errors import StartupError
from service.models import load_cards
from service.settings import load_settings
from tests.conftest import serving
from tests.support.tiny_model import TinyModel
from tests.support.transformers_answers import greedy_logprobs
from tests.support.waiting import PATIENCE

ROWS = [
    {"prompt": "the quick", "completion": " lazy lazy dog"},
    {"prompt": "the lazy", "completion": " quick quick fox"},
]
PROMPT, NUM = "the quick brown fox jumps over the lazy dog the quick", 8
TEXT = {"prompt": PROMPT, "max_tokens": NUM}
ASKED = TEXT | {"temperature": 0, "logprobs": 1, "ignore_eos": True}


def tune(model: Path, folder: Path, *, rank: int, seed: int) -> Path:
    """Trains an adapter of a model for some steps; returns what `quire tune generate` wrote."""
    data, out = folder / "rows.jsonl", folder / f"tuned-{seed}"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:seed] * 4))
    words = ["tune", "generate", "--model", str(model), "--data", str(data), "--out", str(out)]
    words += ["--lora-rank", str(rank), "--lora-targets", "all-linear", "--epochs", "3"]
    words += ["--learning-rate", "0.05", "--batch", "2", "--holdout", "0", "--seed", str(seed)]
    words += ["--device", "cpu", "--threads", "1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.exception
    return out


@pytest.fixture(scope="module")
def folders(
    tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A base and two tuned models, each with its adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    base = tiny_model.write_folder(folder / "tiny")
    return base, tune(base, folder, rank=4, seed=1), tune(base, folder, rank=2, seed=2)


@pytest.fixture(scope="module")
def url(
    folders: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A server of the base with both adapters, and of the merged models."""
    base, first, second = folders
    options = ["--model", f"tiny={base}"]
    options += ["--model", f"merged-1={first}", "--model", f"merged-2={second}"]
    options += ["--adapter", f"lora-1={first / 'adapter'}"]
    options += ["--adapter", f"lora-2@tiny={second / 'adapter'}", "--model-alias", "a=lora-1"]
    options += ["--runner", "torch", "--dtype", "float32", "--kv-memory", "12MiB"]
    with serving(*options, log=tmp_path_factory.mktemp("server") / "log") as found:
        yield found


async def answer(client: httpx.AsyncClient, model: str) -> tuple[str, list[float]]:
    reply = await client.post("/v1/completions", json=ASKED | {"model": model})
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    return choice["text"], choice["logprobs"]["token_logprobs"]


@pytest.mark.slow
async def test_each_adapter_answers_as_its_merged_model(
    url: str, folders: tuple[Path, Path, Path]
) -> None:
    """And as transformers does with the merged weights: alone and in a batch with the others, and
    again from the prefix cache, which is warm.
    """
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
        models = ["tiny", "lora-1", "lora-2"]
        alone = {model: await answer(client, model) for model in models}
        assert len({text for text, _ in alone.values()}) == 3
        asked = [draw for _ in range(4) for draw in models]
        together = await asyncio.gather(*(answer(client, model) for model in asked))
        for number in (1, 2):
            text, logprobs = await answer(client, f"merged-{number}")
            theirs = greedy_logprobs(folders[number], PROMPT, NUM)
            assert logprobs == pytest.approx(theirs, abs=1e-3)
            found = [
                got for name, got in zip(asked, together, strict=True) if name == f"lora-{number}"
            ]
            for other, others in (alone[f"lora-{number}"], *found):
                assert other == text
                assert others == pytest.approx(logprobs, abs=1e-3)
        for name, got in zip(asked, together, strict=True):
            assert got[0] == alone[name][0]
        assert (await answer(client, "a"))[0] == alone["lora-1"][0]


@pytest.mark.slow
async def test_adapters_are_listed_as_models(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
        listed = {each["id"]: each for each in (await client.get("/v1/models")).json()["data"]}
        assert {"tiny", "lora-1", "lora-2", "merged-1", "merged-2", "a"} == listed.keys()
        assert listed["tiny"]["parent"] is None
        assert listed["lora-1"]["parent"] == listed["lora-2"]["parent"] == "tiny"
        assert listed["a"]["root"] == "lora-1"
        classes = {listed[name]["numeric_class"] for name in ("tiny", "lora-1", "lora-2")}
        assert len(classes) == 3
        stream = await client.post("/v1/completions", json=ASKED | {"model": "lora-1"})
        assert stream.json()["model"] == "lora-1"
        assert stream.json()["system_fingerprint"] == listed["lora-1"]["numeric_class"]
        for name in ("lora-3", "lora-1@tiny"):
            refused = await client.post("/v1/completions", json=ASKED | {"model": name})
            assert refused.status_code == 404
            assert refused.json()["error"]["code"] == "model_not_found"
        body = {"model": "lora-1", "prompt": "the"}
        attention = await client.post("/v1/attention", json=body)
        assert attention.status_code == 404


def refused(**flags: Any) -> str:
    """Why a replica with these settings does not start."""
    with pytest.raises(StartupError) as error:
        load_cards(load_settings(flags, environ={}), console=Console(quiet=True))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.slow
def test_what_cannot_be_served_is_refused_in_one_line(folders: tuple[Path, Path, Path]) -> None:
    base, first, _ = folders
    model, adapter = f"tiny={base}", f"{first / 'adapter'}"
    cases = {
        f"a={base}": "adapter a: tiny: adapter_config.json: No such file",
        f"a@other={adapter}": "adapter a: no model is named other",
        f"tiny={adapter}": "2 models have the name tiny",
        f"a={adapter}-none": "adapter a: adapter-none: adapter_config.json: No such file",
        adapter: "must be name=path or name@model=path",
        f"={adapter}": "must be name=path or name@model=path",
        f"a@={adapter}": "must be name=path or name@model=path",
    }
    for text, message in cases.items():
        assert message in refused(model=model, adapter=text), text


@pytest.mark.slow
def test_a_replica_without_a_runner_knows_the_adapters(folders: tuple[Path, Path, Path]) -> None:
    base, first, second = folders
    flags = {"model": f"tiny={base}"}
    flags["adapter"] = f"a={first / 'adapter'},b={second / 'adapter'}"
    (files,) = load_cards(load_settings(flags, environ={}), console=Console(quiet=True))
    assert [card.id for card in files.adapters] == ["a", "b"]
    assert len({card.key for card in (files.card, *files.adapters)}) == 3
