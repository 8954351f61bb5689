"""The banner: what an operator reads when the server is ready."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from model.text.tokenizer import Tokenizer
from service.banner import engine_rows, print_banner
from service.messages import ModelCard
from service.settings import Settings
from service.startup import Loaded
from tests.support.fakes import OracleRunner


def shown(tiny_tokenizer: Tokenizer, *, exact: bool = True, **fields: Any) -> str:
    runner = OracleRunner(num_blocks=99)
    runner.exact = exact
    loaded = Loaded(
        path=Path("/secret/place/tiny.gguf"),
        runner=runner,
        tokenizer=tiny_tokenizer,
        card=ModelCard(
            id="tiny",
            max_model_len=64,
            vocab_size=97,
            created=0,
            numeric_class="native-int8-v1-abc",
        ),
        seconds=1.25,
        **{"fallback_reason": "", **fields},
    )
    out = io.StringIO()
    console = Console(file=out, width=80)
    rows = engine_rows([loaded])
    print_banner(console, Settings(), rows, version="0.0.1")
    return out.getvalue()


def test_it_names_model_class_and_memory_and_no_path(tiny_tokenizer: Tokenizer) -> None:
    text = shown(tiny_tokenizer)
    for part in ("(tiny.gguf), up to 64 tokens", "native-int8-v1-abc", "99 blocks of 4 tokens"):
        assert part in text
    assert "/secret" not in text
    assert "fallback" not in text
    assert "within rounding" not in text


@pytest.mark.parametrize("reason", ["native: no C++ compiler", "native: GPT-2 has LayerNorm"])
def test_the_reason_why_a_faster_runner_is_not_used_is_shown(
    tiny_tokenizer: Tokenizer, reason: str
) -> None:
    text = shown(tiny_tokenizer, exact=False, fallback_reason=reason)
    assert f"fallback reason {reason}" in text
    assert "native-int8-v1-abc (within rounding)" in text
