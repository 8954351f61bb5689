"""Classifiers: trained as they are served, on encoders and decoders, and equal to transformers'."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import open_model
from model.checkpoint.sentence_transformers import read_settings
from model.config import Problem
from model.runners.encoding import describe
from model.runners.torch_encoding import TorchEncoder
from model.text.encoder_tokenizer import Encoding
from model.training import TrainingError
from model.training.classify import (
    Classification,
    Labelled,
    classifier_fields,
    measures,
    read_labelled,
    text_logits,
    with_head,
    write_classifier,
)
from model.training.data import padded
from model.training.folder import Base, as_stored, write_model
from model.training.loop import Recipe, StepReport, Training
from model.training.ranks import Ranks
from model.transformer import Transformer
from model.weights import to_tensor
from tests.model.training_models import ENCODERS, FIELDS, tiny_base

NAMES = ("bad", "good", "mixed")
KINDS = [*ENCODERS, *FIELDS]
EMPTY = Labelled(texts=[], targets=[], labels=NAMES, problem=Problem.SINGLE_LABEL)


def random_texts(count: int, *, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 97, int(rng.integers(2, 14))).tolist() for _ in range(count)]


def headed(family: str) -> tuple[Base, dict[str, Any], Transformer]:
    """A random network with a head whose weights are not small."""
    base = tiny_base(family)
    fields = classifier_fields(base, EMPTY)
    network = with_head(base, fields, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("classifier."):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return base, fields, network


def write(folder: Path, base: Base, fields: dict[str, Any], network: Transformer) -> None:
    tensors = as_stored(base.family, network.config, network.state_dict())
    write_model(folder, fields=fields, tensors=tensors, vocabulary=None)


def served(folder: Path, texts: list[list[int]]) -> torch.Tensor:
    """The logits that the encoding runner computes from a folder."""
    opened = open_model(folder, headless=True)
    info = describe(opened.config, read_settings(folder))
    assert info.labels == NAMES
    runner = TorchEncoder(
        opened.config,
        {name: to_tensor(array) for name, array in opened.weights.items()},
        info=info,
        digest=opened.digest,
        dtype="float32",
        device="cpu",
    )
    vectors = runner.encode([Encoding(tuple(text)) for text in texts])
    return torch.from_numpy(np.stack(vectors))


@pytest.mark.parametrize("family", KINDS)
def test_a_trained_batch_has_the_logits_that_are_served(family: str, tmp_path: Path) -> None:
    """Written, read back and encoded one by one: padding in training changes nothing."""
    base, fields, network = headed(family)
    texts = random_texts(5)
    write(tmp_path, base, fields, network)
    with torch.no_grad():
        trained = text_logits(network, *padded(texts))
    assert trained.std() > 0.1
    torch.testing.assert_close(trained, served(tmp_path, texts), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", KINDS)
def test_transformers_classifies_alike(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base, fields, network = headed(family)
    texts = random_texts(4)
    write(tmp_path, base, fields, network)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert theirs.config.id2label == dict(enumerate(NAMES))
    with torch.no_grad():
        expected = torch.cat([theirs.eval()(torch.tensor([text])).logits for text in texts])
        given = text_logits(network, *padded(texts))
    difference = (given.log_softmax(-1) - expected.log_softmax(-1)).abs().max()
    assert difference < 1e-3


def learned(family: str, data: Labelled, texts: list[list[int]], folder: Path) -> dict[str, float]:
    """The measures on the texts that were trained with."""
    base = tiny_base(family)
    network = with_head(base, classifier_fields(base, data), seed=0)
    recipe = Recipe(steps=60, batch=12, learning_rate=5e-3, evaluate_every=60)
    everything = range(len(texts))
    task = Classification(
        texts, data, train=everything, held=everything, recipe=recipe, name=family
    )
    training = Training(network, task, recipe, ranks=Ranks(torch.device("cpu")))
    reports: list[StepReport] = []
    training.run(folder, report=reports.append, stop=lambda: False)
    assert reports[-1].loss < reports[0].loss
    if data.problem is Problem.SINGLE_LABEL:
        _, counts = task.judge(network)
        right = sum(counts[index][index] for index in range(len(counts)))
        assert right / len(texts) == pytest.approx(reports[-1].measures["accuracy"])
    return dict(reports[-1].measures)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("problem", list(Problem))
def test_learns_each_kind_of_label(family: str, problem: Problem, tmp_path: Path) -> None:
    texts = random_texts(24)
    rng = np.random.default_rng(5)
    labels = ("score",) if problem is Problem.REGRESSION else NAMES
    targets: list[int] | list[list[float]] = rng.integers(0, 3, 24).tolist()
    if problem is Problem.REGRESSION:
        targets = rng.normal(size=(24, 1)).tolist()
    if problem is Problem.MULTI_LABEL:
        targets = rng.integers(0, 2, (24, 3)).astype(float).tolist()
    data = Labelled(texts=[""] * 24, targets=targets, labels=labels, problem=problem)
    found = learned(family, data, texts, tmp_path)
    if problem is Problem.REGRESSION:
        assert found["correlation"] > 0.95
    else:
        assert found["accuracy"] > 0.9
        assert found["f1"] > 0.9


def labelled(
    tmp_path: Path, rows: list[dict[str, Any]], problem: Problem | None = None
) -> Labelled:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_labelled(file, text="text", label="label", problem=problem)


def rows(*labels: object) -> list[dict[str, Any]]:
    return [{"text": f"text {index}", "label": label} for index, label in enumerate(labels)]


def test_labels_are_read_as_they_look(tmp_path: Path) -> None:
    single = labelled(tmp_path, rows("b", "a", "b"))
    assert (single.labels, single.targets) == (("a", "b"), [1, 0, 1])
    assert single.problem is Problem.SINGLE_LABEL
    assert labelled(tmp_path, rows(3, 1, 3)).labels == ("1", "3")
    several = labelled(tmp_path, rows(["b", "a"], [], ["a"]))
    assert (several.labels, several.problem) == (("a", "b"), Problem.MULTI_LABEL)
    assert several.targets == [[1, 1], [0, 0], [1, 0]]
    split = labelled(tmp_path, rows("b|a", "", "a"), Problem.MULTI_LABEL)
    assert split.targets == several.targets
    numbers = labelled(tmp_path, rows(0.5, -1.25))
    assert (numbers.targets, numbers.problem) == ([[0.5], [-1.25]], Problem.REGRESSION)
    assert labelled(tmp_path, rows(1, 2), Problem.REGRESSION).targets == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("given", "problem", "message"),
    [
        (rows("a", "a"), None, "from 2 to 1000 labels, not 1"),
        (rows(0.5, "much"), Problem.REGRESSION, "row 2: the label must be a finite number"),
        ([{"text": "a"}], None, "no column 'label'; it has text"),
        (rows("a", None), None, "row 2 has no 'label'"),
    ],
    ids=str,
)
def test_labels_that_are_refused(
    given: list[dict[str, Any]], problem: Problem | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=message):
        labelled(tmp_path, given, problem)


def test_measures_are_those_of_the_definitions() -> None:
    logits = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 2.0, 0], [2.0, 0, 0]])
    found = measures(logits, torch.tensor([0, 1, 0, 0]), Problem.SINGLE_LABEL)
    assert found["accuracy"] == 0.75
    assert found["f1"] == pytest.approx((2 * 2 / 5 + 2 * 1 / 3) / 2)
    marks = torch.tensor([[1.0, 0], [1, 1]])
    found = measures(torch.tensor([[1.0, -1], [1, -1]]), marks, Problem.MULTI_LABEL)
    assert found["accuracy"] == 0.5
    assert found["f1"] == pytest.approx(2 * 2 / 5)
    numbers = torch.tensor([[1.0], [2], [4]])
    found = measures(numbers * 2, numbers, Problem.REGRESSION)
    assert found["mean error"] == pytest.approx(7 / 3)
    assert found["correlation"] == pytest.approx(1)


def test_a_written_classifier_has_its_vocabulary(tmp_path: Path) -> None:
    """Of the folder that it was trained from."""
    base, fields, network = headed("bert")
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    write_classifier(tmp_path / "out", network, replace(base, files=source), fields)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
