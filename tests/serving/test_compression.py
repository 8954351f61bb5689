"""Compressed KV caches from the command line: a chat beyond the model's context, and anchors."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from service.__main__ import app
from service.errors import StartupError
from service.settings import load_settings
from tests.conftest import serving
from tests.support.tiny_model import TinyModel
from tests.support.waiting import PATIENCE

SERVED = ("--runner", "torch", "--dtype", "float32", "--kv-memory", "12MiB", "--threads", "1")


@pytest.mark.slow
async def test_a_text_beyond_the_models_context_is_continued(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """The model has 128 positions; prompt and answer have more, and a repetition is the same."""
    base = tiny_model.write_folder(tmp_path / "tiny")
    options = ("--model", f"tiny={base}", "--kv-compression", "window:64", *SERVED)
    asked = {
        "model": "tiny", "prompt": "the quick brown fox " * 60, "max_tokens": 100,
        "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    with serving(*options, log=tmp_path / "log") as url:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            (listed,) = (await client.get("/v1/models")).json()["data"]
            assert listed["max_model_len"] == 2**17
            assert "window64" in listed["numeric_class"]
            replies = [await client.post("/v1/completions", json=asked) for _ in range(2)]
    assert [reply.status_code for reply in replies] == [200, 200], replies[0].text
    first, second = (reply.json() for reply in replies)
    assert first["usage"]["prompt_tokens"] > 128
    assert first["usage"]["completion_tokens"] == 100
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert first["choices"][0]["text"] == second["choices"][0]["text"]


@pytest.mark.slow
async def test_a_model_tuned_with_anchors_is_served_with_them(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    base, data = tiny_model.write_folder(tmp_path / "tiny"), tmp_path / "rows.jsonl"
    row = {"prompt": "the quick. brown", "completion": " fox. jumps over"}
    data.write_text((json.dumps(row) + "\n") * 8)
    words = ["tune", "generate", "--model", str(base), "--data", str(data), "--anchors"]
    words += ["--out", str(tmp_path / "tuned"), "--holdout", "0", "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, "--threads", "1"])
    assert result.exit_code == 0, result.exception
    options = ("--model", f"tiny={tmp_path / 'tuned'}", "--kv-compression", "anchors", *SERVED)
    asked = {"model": "tiny", "prompt": "the quick. brown fox. " * 4, "max_tokens": 8}
    with serving(*options, log=tmp_path / "log") as url:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            reply = await client.post("/v1/completions", json=asked | {"ignore_eos": True})
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] == 8


def test_an_unknown_policy_is_one_line() -> None:
    with pytest.raises(StartupError, match="kv_compression must be none, window:<tokens>"):
        load_settings({"kv_compression": "half"}, environ={})
