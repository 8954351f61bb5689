"""Classifiers of whole texts: a new head on any encoder or decoder, trained with the network."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from model.config import ModelConfig, Pooling, Problem
from model.text.encoder_tokenizer import EncoderTokenizer
from model.training import TrainingError
from model.training.data import TokenBatch, column, in_order, padded, read_rows
from model.training.folder import Base, as_stored, write_model, write_vocabulary
from model.training.loop import Recipe
from model.training.network import build_network, states
from model.transformer import Transformer

MAX_LABELS = 1000
_SEPARATOR = "|"  # of several labels in a cell of a CSV file


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Texts and what is to be learned of them: classes, sets of labels as 0 and 1, or a number."""

    texts: list[str]
    targets: list[int] | list[list[float]]
    labels: tuple[str, ...]
    problem: Problem

    def groups(self) -> list[object]:
        """What a hold-out takes equal shares of: each class."""
        single = self.problem is Problem.SINGLE_LABEL
        return list(self.targets) if single else [0] * len(self.texts)


def read_labelled(path: Path, *, text: str, label: str, problem: Problem | None) -> Labelled:
    """Reads two columns. problem: None: lists are several labels, numbers with a fraction are to
    be predicted as such, and all else are classes. Raises TrainingError.
    """
    rows = read_rows(path)
    texts = [str(value) for value in column(rows, text, file=path.name)]
    values = column(rows, label, file=path.name)
    chosen = problem or _problem_of(values)
    if chosen is Problem.REGRESSION:
        numbers = [[_number(value, row, path.name)] for row, value in enumerate(values, start=1)]
        return Labelled(texts=texts, targets=numbers, labels=(label,), problem=chosen)
    sets = [_labels_of(value, several=chosen is Problem.MULTI_LABEL) for value in values]
    labels = tuple(sorted({each for found in sets for each in found}))
    if not 2 <= len(labels) <= MAX_LABELS:
        raise TrainingError(
            f"{path.name}: {label!r} must have from 2 to {MAX_LABELS} labels, not {len(labels)}"
        )
    if chosen is Problem.SINGLE_LABEL:
        classes = [labels.index(found[0]) for found in sets]
        return Labelled(texts=texts, targets=classes, labels=labels, problem=chosen)
    marks = [[float(each in found) for each in labels] for found in sets]
    return Labelled(texts=texts, targets=marks, labels=labels, problem=chosen)


def _problem_of(values: Sequence[Any]) -> Problem:
    if any(isinstance(value, list) for value in values):
        return Problem.MULTI_LABEL
    if all("." in str(value) and _is_number(value) for value in values):
        return Problem.REGRESSION
    return Problem.SINGLE_LABEL


def _is_number(value: object) -> bool:
    try:
        return bool(np.isfinite(float(str(value))))
    except ValueError:
        return False


def _number(value: object, row: int, file: str) -> float:
    if not _is_number(value):
        raise TrainingError(f"{file}: row {row}: the label must be a finite number")
    return float(str(value))


def _labels_of(value: object, *, several: bool) -> list[str]:
    if isinstance(value, list):
        return [str(each) for each in value]
    parts = str(value).split(_SEPARATOR) if several else [str(value)]
    return [part.strip() for part in parts if part.strip() or not several]


def classifier_fields(base: Base, data: Labelled) -> dict[str, Any]:
    """config.json of the base with a new head."""
    ends = base.fields.get("eos_token_id") or 0
    ends = ends[0] if isinstance(ends, list) else ends
    padding = base.fields.get("pad_token_id")
    return {
        **base.fields,
        "architectures": [f"{base.class_prefix}ForSequenceClassification"],
        "id2label": {str(index): name for index, name in enumerate(data.labels)},
        "label2id": {name: index for index, name in enumerate(data.labels)},
        "problem_type": str(data.problem),
        "pad_token_id": ends if padding is None else padding,
    }


def with_head(base: Base, fields: Mapping[str, Any], *, seed: int) -> Transformer:
    """The base's network and a classifier whose weights are random and small."""
    config = base.family.configure(fields)
    with torch.device("meta"):
        shapes = Transformer(_without_lm_head(config)).state_dict()
    generator = torch.Generator().manual_seed(seed)
    weights = {name: tensor for name, tensor in base.weights.items() if name in shapes}
    for name, shape in shapes.items():
        if name.startswith("classifier."):
            weights[name] = _initial(name, shape.shape, generator)
    return build_network(_without_lm_head(config), weights)


def _initial(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) > 1:
        return torch.empty(shape).normal_(std=0.02, generator=generator)
    return torch.full(shape, float(name.endswith("norm.weight")))


def _without_lm_head(config: ModelConfig) -> ModelConfig:
    return replace(config, tied_head=True)


def read_tokens(base: Base, texts: Sequence[str], *, context: int) -> list[tuple[int, ...]]:
    """The tokens of texts as they are read when served, cut to the context. Raises TrainingError
    for a text without tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(Path(folder), base.files)
        tokenizer = EncoderTokenizer.from_path(Path(folder), max_tokens=context)
        try:
            found = tokenizer.encode_batch(texts, truncate_to=context)
        except (ValueError, UnicodeEncodeError) as error:
            raise TrainingError(f"the texts cannot be tokenised: {error}") from None
    for row, encoding in enumerate(found, start=1):
        if not encoding.ids:
            raise TrainingError(f"row {row} has an empty text")
    return [encoding.ids for encoding in found]


class Classification:
    """Texts and labels in an order that the seed decides. A task of `loop`."""

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        data: Labelled,
        *,
        train: Sequence[int],
        held: Sequence[int],
        recipe: Recipe,
        name: str,
    ) -> None:
        kind = torch.int64 if data.problem is Problem.SINGLE_LABEL else torch.float32
        self._texts, self._data, self._recipe = texts, data, recipe
        self._targets = torch.tensor(data.targets, dtype=kind)
        self._train, self._held = train, held
        self._lengths = tuple(len(texts[index]) for index in train)
        content = repr([texts, data.targets, data.labels, held])
        self.name = f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    def batches(self, first: int) -> Iterator[TokenBatch]:
        recipe = self._recipe
        order = in_order(self._lengths, batch=recipe.batch, seed=recipe.seed, first=first)
        return (self._batch([self._train[at] for at in indices]) for indices in order)

    def loss(self, network: Transformer, batch: TokenBatch) -> torch.Tensor:
        logits = text_logits(network, batch.tokens_NT, batch.lengths_N)
        return self._losses(logits, batch.targets)

    def _losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed over texts; of several labels, their mean."""
        if self._data.problem is Problem.SINGLE_LABEL:
            return functional.cross_entropy(logits, targets, reduction="sum")
        if self._data.problem is Problem.REGRESSION:
            return functional.mse_loss(logits, targets, reduction="sum")
        each = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return each.mean(dim=-1).sum()

    def evaluate(self, network: Transformer) -> Mapping[str, float]:
        """The loss and measures of the held-out texts."""
        return self.judge(network)[0] if self._held else {}

    def judge(self, network: Transformer) -> tuple[Mapping[str, float], list[list[int]]]:
        """The same, and how often texts of each class (rows) were taken for each (columns)."""
        logits, targets = self._predictions(network)
        loss = float(self._losses(logits, targets)) / len(logits)
        found = {"loss": loss, **measures(logits, targets, self._data.problem)}
        if self._data.problem is not Problem.SINGLE_LABEL:
            return found, []
        counts = Counter(zip(targets.tolist(), logits.argmax(dim=-1).tolist(), strict=True))
        classes = range(len(self._data.labels))
        return found, [[counts[true, given] for given in classes] for true in classes]

    @torch.no_grad()
    def _predictions(self, network: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, L] and targets of the held-out texts, in their order."""
        device = network.embed.weight.device
        by_length = sorted(self._held, key=lambda index: len(self._texts[index]))
        found = []
        size = self._recipe.batch
        for start in range(0, len(by_length), size):
            batch = self._batch(by_length[start : start + size]).to(device)
            found.append(text_logits(network, batch.tokens_NT, batch.lengths_N).cpu())
        return torch.cat(found), self._targets[torch.tensor(by_length)]

    def _batch(self, indices: Sequence[int]) -> TokenBatch:
        tokens_NT, lengths_N = padded([self._texts[index] for index in indices])
        targets = self._targets[torch.tensor(indices)]
        return TokenBatch(tokens_NT=tokens_NT, lengths_N=lengths_N, targets=targets)


def text_logits(
    network: Transformer, tokens_NT: torch.Tensor, lengths_N: torch.Tensor
) -> torch.Tensor:
    """The classifier's logits of texts that are padded on the right, [N, L] in float32."""
    head = network.config.classifier
    if head is None or network.classifier is None:
        raise TrainingError("the model has no classifier")
    states_NTC = network.norm(states(network, tokens_NT, lengths_N))
    if head.pooling is Pooling.MEAN:
        real_NT1 = torch.arange(tokens_NT.shape[1], device=tokens_NT.device) < lengths_N[:, None]
        summed = (states_NTC.float() * real_NT1[..., None]).sum(dim=1)
        pooled_NC = (summed / lengths_N[:, None]).to(states_NTC.dtype)
    else:
        last = lengths_N - 1 if head.pooling is Pooling.LAST else torch.zeros_like(lengths_N)
        pooled_NC = states_NTC[torch.arange(len(last), device=last.device), last]
    logits: torch.Tensor = network.classifier(pooled_NC)
    return logits.float()


def measures(logits: torch.Tensor, targets: torch.Tensor, problem: Problem) -> dict[str, float]:
    """Accuracy and F1 (the mean over classes; of several labels, over all marks), or for numbers
    the mean absolute error and the correlation.
    """
    if problem is Problem.REGRESSION:
        error = float((logits - targets).abs().mean())
        pair = np.corrcoef(logits[:, 0].numpy(), targets[:, 0].numpy())
        return {"mean error": error, "correlation": float(np.nan_to_num(pair[0, 1]))}
    if problem is Problem.MULTI_LABEL:
        marks, wanted = logits > 0, targets > 0.5
        exact = float((marks == wanted).all(dim=-1).float().mean())
        return {"accuracy": exact, "f1": _f1(marks.flatten(), wanted.flatten())}
    chosen = logits.argmax(dim=-1)
    classes = sorted({*chosen.tolist(), *targets.tolist()})
    scores = [_f1(chosen == each, targets == each) for each in classes]
    accuracy = float((chosen == targets).float().mean())
    return {"accuracy": accuracy, "f1": sum(scores) / len(scores)}


def _f1(chosen: torch.Tensor, wanted: torch.Tensor) -> float:
    both = int((chosen & wanted).sum())
    return 2 * both / max(1, int(chosen.sum()) + int(wanted.sum()))


def write_classifier(
    folder: Path, network: Transformer, base: Base, fields: Mapping[str, Any]
) -> None:
    """Writes a folder that `quire serve` and `transformers` load."""
    tensors = as_stored(base.family, network.config, network.state_dict())
    write_model(folder, fields=fields, tensors=tensors, vocabulary=base.files)
