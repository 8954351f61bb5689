"""Fine-tuning of decoders: what is learned, and that `transformers` computes what is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.text.tokenizer import Tokenizer
from model.training import TrainingError
from model.training.folder import as_stored, open_base, write_model
from model.training.generate import (
    Answers,
    Example,
    open_decoder,
    read_examples,
    write_tuned,
)
from model.training.loop import Recipe, Training
from model.training.lowrank import LowRank, add_adapters
from model.training.network import build_network
from model.training.ranks import Ranks
from model.transformer import Transformer
from tests.model.training_models import tiny_base
from tests.support.tiny_model import TinyModel

CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "the quick"},
            {"role": "assistant", "content": "brown fox"},
            {"role": "user", "content": "jumps"},
            {"role": "assistant", "content": "over the dog"},
        ]
    },
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_and_their_ends_are_learned(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """And nothing else: prompts, roles and the openings of turns are given."""
    file = write_rows(tmp_path / "chats.jsonl", CHATS)
    first, second = read_examples(file, tiny_tokenizer, context=128)
    texts = [
        [
            tiny_tokenizer.decode(example.tokens[span.start : span.stop], skip_special=False)
            for span in example.answers
        ]
        for example in (first, second)
    ]
    assert [[text.strip() for text in row] for row in texts] == [
        ["brown fox<|im_end|>", "over the dog<|im_end|>"],
        ["you<|im_end|>"],
    ]
    messages = CHATS[0]["messages"]
    prompt = tiny_tokenizer.apply_chat_template(messages[:4])
    assert first.tokens[: first.answers[1].start] == prompt, "as it is rendered when served"


def test_completions_are_learned_with_their_end(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "the quick", "completion": " brown"}])
    (example,) = read_examples(file, tiny_tokenizer, context=128)
    (span,) = example.answers
    assert tiny_tokenizer.decode(example.tokens[: span.start]) == "the quick"
    answer = example.tokens[span.start : span.stop]
    assert tiny_tokenizer.decode(answer) == " brown"
    assert answer[-1] in tiny_tokenizer.eos_ids


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "row 2: a row has messages, or a prompt and a completion"),
        ({"messages": "a"}, "row 2: messages must be a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "row 2: messages have no answer"),
        ({"prompt": "the " * 90, "completion": "a"}, "row 2: no answer within 64 tokens"),
        ({"prompt": "\ud800", "completion": "a"}, "row 2"),
    ],
    ids=str,
)
def test_rows_that_are_refused(
    row: dict[str, Any], message: str, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "a.jsonl", [CHATS[1], row])
    with pytest.raises(TrainingError, match=message):
        read_examples(file, tiny_tokenizer, context=64)


def test_encoders_generate_nothing(tmp_path: Path) -> None:
    base = tiny_base("bert")
    tensors = as_stored(base.family, base.config, base.weights)
    write_model(tmp_path, fields=base.fields, tensors=tensors, vocabulary=None)
    with pytest.raises(TrainingError, match="tune classify"):
        open_decoder(tmp_path)


def tuned(path: Path, out: Path, lowrank: LowRank | None, chats: Path) -> list[Example]:
    """Tunes a model for a few steps and writes it; returns what it learned."""
    base = open_base(path)
    examples = read_examples(chats, base.tokenizer, context=128)
    recipe = Recipe(steps=5, batch=2, learning_rate=1e-2)
    network = build_network(base.config, base.weights)
    if lowrank is not None:
        add_adapters(network, base, lowrank, seed=0)
    task = Answers(examples, [], recipe, name="chats")
    training = Training(network, task, recipe, ranks=Ranks(torch.device("cpu")))
    training.run(out, report=lambda _: None, stop=lambda: False)
    write_tuned(out, network, base, lowrank, name="tiny")
    return examples


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("lowrank", [None, LowRank(rank=2)], ids=["full", "adapters"])
@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_transformers_computes_what_is_served(
    source: str, lowrank: LowRank | None, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Log probabilities within 1e-3 and the same tokens, of a model that was tuned."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = (
        tiny_model.write_folder(tmp_path / "tiny")
        if source == "folder"
        else tiny_model.write_gguf(tmp_path / "tiny.gguf")
    )
    if source == "folder":  # as transformers reads them: names, not descriptions
        names = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
        (path / "tokenizer_config.json").write_text(json.dumps(names))
    out = tmp_path / "out"
    examples = tuned(path, out, lowrank, write_rows(tmp_path / "chats.jsonl", CHATS))
    ours = open_base(out)
    before = open_base(path)
    network = Transformer(ours.config)
    network.load_state_dict(ours.weights)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = torch.tensor(examples[0].tokens)
    with torch.no_grad():
        given = network(tokens).log_softmax(-1)
        expected = theirs(tokens[None]).logits[0].log_softmax(-1)
        untuned = build_network(before.config, before.weights)(tokens).log_softmax(-1)
    assert (given - expected).abs().max() < 1e-3
    assert (given - untuned).abs().max() > 0.1

    tokenizer = AutoTokenizer.from_pretrained(out)
    for text in ("the quick brown fox", "a 123\n  of ünknown 文字"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == ours.tokenizer.encode(text, add_bos=False)
        assert ids == before.tokenizer.encode(text, add_bos=False)
    messages = CHATS[0]["messages"]
    rendered = tokenizer.apply_chat_template(messages, return_dict=False)
    assert rendered == ours.tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert ours.tokenizer.eos_ids == before.tokenizer.eos_ids
    assert (out / "adapter" / "adapter_config.json").exists() == (lowrank is not None)
