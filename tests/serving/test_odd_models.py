"""Engines over odd files: split models, and embeddings that differ in size from the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from model.native.library import NativeLibrary
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer
from service.engine.plan import EngineConfig
from service.messages import End, Event, FinishReason, GenerationRequest, SamplingParams, Tokens
from service.setting_types import ModelSource
from service.settings import Settings
from service.startup import Loaded, load_engine
from tests.support.tiny_model import TinyModel

pytestmark = pytest.mark.slow


def answer(loaded: Loaded, request: GenerationRequest) -> tuple[list[int], str, End]:
    """The ids of an answer, its text, and how it ended."""
    ids: list[int] = []
    text: list[str] = []
    ends: list[End] = []

    def deliver(events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event.record, Tokens):
                ids.extend(event.record.ids)
                text.append(event.record.text)
            else:
                ends.append(event.record)

    loop = EngineLoop(
        loaded.runner,
        config=EngineConfig(max_batch_tokens=64, max_sequences=4),
        token_bytes=loaded.tokenizer.token_bytes,
        eos_ids=loaded.tokenizer.eos_ids,
        deliver=deliver,
        observer=Observer(),
    )
    loop.add(Work(request=request))
    while loop.step():
        pass
    (end,) = ends
    return ids, "".join(text), end


def load(path: Path, runner: str) -> Loaded:
    settings = Settings(runner=runner, device="cpu", threads=1, kv_memory=4 * 1024**2)
    return load_engine(settings, ModelSource(str(path)), path)


@pytest.mark.parametrize("runner", ["torch", "native"])
@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_an_id_without_a_token_is_an_empty_text(
    tiny_model: TinyModel, tmp_path: Path, runner: str, form: str
) -> None:
    """GGUF: the engine looked the id up in a shorter table, and died of an IndexError."""
    model = tiny_model.with_rows(tiny_model.vocab_size + 7)
    is_gguf = form == "gguf"
    path = model.write_gguf(tmp_path / "x.gguf") if is_gguf else model.write_folder(tmp_path / "x")
    loaded = load(path, runner)
    last = model.rows - 1
    sampling = SamplingParams(seed=0, temperature=0.0, logit_bias=((last, 100.0),))
    request = GenerationRequest(id="r", prompt_ids=(5, last), max_tokens=3, sampling=sampling)
    assert answer(loaded, request) == (
        [last] * 3,
        "",
        End(count=3, reason=FinishReason.LENGTH),
    )
    loaded.runner.close()


@pytest.mark.parametrize("runner", ["torch", "native"])
def test_ends_of_an_answer_without_a_row(
    tiny_model: TinyModel, tmp_path: Path, runner: str
) -> None:
    """min_tokens forbids the ends by their rows; <|im_end|> and <|im_start|> have none here."""
    loaded = load(tiny_model.with_rows(2).write_gguf(tmp_path / "x.gguf"), runner)
    sampling = SamplingParams(seed=0, temperature=0.0)
    request = GenerationRequest(
        id="r", prompt_ids=(1,), max_tokens=4, min_tokens=3, sampling=sampling
    )
    ids, _, end = answer(loaded, request)
    assert ids[:3] == [1, 1, 1]
    assert end.error is None
    loaded.runner.close()


def test_a_split_model_is_served_under_its_own_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    whole = load(tiny_model.write_gguf(tmp_path / "tiny.gguf"), "torch")
    (tmp_path / "split").mkdir()
    tiny_model.write_gguf(tmp_path / "split" / "tiny.gguf", split=6)
    split = load(tmp_path / "split" / "tiny-00003-of-00004.gguf", "torch")
    assert split.card.id == whole.card.id == "tiny"
    request = GenerationRequest(
        id="r",
        prompt_ids=(5, 6, 7),
        max_tokens=5,
        sampling=SamplingParams(seed=0, temperature=0.0),
    )
    assert answer(split, request) == answer(whole, request)


@pytest.mark.parametrize(("queue", "bits"), [("memory://", 4), ("redis://127.0.0.1/0", 8)])
def test_the_bits_of_a_file_are_kept_if_no_other_cpu_continues_answers(
    default_model: Path, monkeypatch: pytest.MonkeyPatch, queue: str, bits: int
) -> None:
    """On a CPU that is faster with 4; loading does not connect to the queue."""
    monkeypatch.setattr(
        "model.runners.native.FOUR_BIT_VARIANTS", frozenset(NativeLibrary().variants)
    )
    settings = Settings(queue=queue, device="cpu", threads=1, kv_memory=4 * 1024**2)
    loaded = load_engine(settings, ModelSource(str(default_model)), default_model)
    assert loaded.runner.numeric_class.startswith(f"native-int{bits}-")
    loaded.runner.close()
