"""Training data: rows of files, padded batches of tokens, and the order in which they come.

The order is a pure function of the seed, so that a resumed run reads what it had left to read.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.training import TrainingError

Row = dict[str, Any]
_SORTED = 16  # batches whose texts are sorted by length together, which saves padding


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV, JSONL or Parquet file, by column. Raises TrainingError."""
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise TrainingError(f"{path.name}: data must be .csv, .tsv, .jsonl or .parquet")
    try:
        rows = reader(path)
    except OSError as error:
        raise TrainingError(f"{path.name}: {error.strerror or 'cannot be read'}") from None
    except UnicodeDecodeError:
        raise TrainingError(f"{path.name}: not UTF-8") from None
    if not rows:
        raise TrainingError(f"{path.name}: no rows")
    return rows


def column(rows: Sequence[Row], name: str, *, file: str) -> list[Any]:
    """One column of all rows. Raises TrainingError that names the columns, or the row."""
    if name not in rows[0]:
        raise TrainingError(f"{file}: no column {name!r}; it has {', '.join(map(str, rows[0]))}")
    for number, row in enumerate(rows, start=1):
        if row.get(name) is None:
            raise TrainingError(f"{file}: row {number} has no {name!r}")
    return [row[name] for row in rows]


def _csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        return list(csv.DictReader(file, delimiter=delimiter))


def _jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise TrainingError(f"{path.name}: line {number} is not a JSON object")
        rows.append(row)
    return rows


def _parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise TrainingError(f"{path.name}: Parquet needs pyarrow: pip install pyarrow") from None
    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except ArrowException:
        raise TrainingError(f"{path.name}: not a Parquet file") from None
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Texts of one batch, padded on the right, and what is to be learned of them."""

    tokens_NT: torch.Tensor  # int64; padding is 0
    lengths_N: torch.Tensor
    # Of a language model: the tokens to predict, bool [N, T]. Of a classifier: classes [N], or
    # scores [N, L].
    targets: torch.Tensor
    sources_NU: torch.Tensor | None = None  # of an encoder-decoder, padded in the same way
    source_lengths_N: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """Terms of the loss."""
        return int(self.targets.sum()) if self.targets.dtype is torch.bool else len(self.targets)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.lengths_N.sum())

    def to(self, device: torch.device) -> TokenBatch:
        """The same on a device."""
        return TokenBatch(
            tokens_NT=self.tokens_NT.to(device),
            lengths_N=self.lengths_N.to(device),
            targets=self.targets.to(device),
            sources_NU=None if self.sources_NU is None else self.sources_NU.to(device),
            source_lengths_N=None
            if self.source_lengths_N is None
            else self.source_lengths_N.to(device),
        )


def padded(texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N, T] padded on the right by 0, and lengths [N]."""
    lengths = torch.tensor([len(text) for text in texts])
    tokens = torch.zeros(len(texts), max(1, int(lengths.max())), dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text, dtype=torch.int64)
    return tokens, lengths


@lru_cache(maxsize=2)
def epoch_order(
    lengths: tuple[int, ...], *, batch: int, seed: int, epoch: int
) -> tuple[tuple[int, ...], ...]:
    """The examples of each batch of an epoch: shuffled, with texts of like length together."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths)).tolist()
    batches: list[tuple[int, ...]] = []
    for start in range(0, len(order), batch * _SORTED):
        group = sorted(order[start : start + batch * _SORTED], key=lambda index: lengths[index])
        batches += [tuple(group[at : at + batch]) for at in range(0, len(group), batch)]
    return tuple(batches[index] for index in random.permutation(len(batches)).tolist())


def in_order(
    lengths: tuple[int, ...], *, batch: int, seed: int, first: int
) -> Iterator[tuple[int, ...]]:
    """The examples of batch number `first` and all later ones, without an end."""
    per_epoch = -(-len(lengths) // batch)
    number = first
    while True:
        epoch, index = divmod(number, per_epoch)
        yield epoch_order(lengths, batch=batch, seed=seed, epoch=epoch)[index]
        number += 1


def hold_out(groups: Sequence[object], *, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits examples in two, in each group by the same share: (to train with, to validate with).

    A group of one example is trained with. Raises TrainingError if nothing remains for either.
    """
    random = np.random.default_rng([seed, 1])
    by_group: dict[object, list[int]] = {}
    for index, group in enumerate(groups):
        by_group.setdefault(group, []).append(index)
    held: set[int] = set()
    for members in by_group.values():
        shuffled = random.permutation(members).tolist()
        size = min(max(round(len(members) * share), int(share > 0)), len(members) - 1)
        held.update(shuffled[:size])
    rest = [index for index in range(len(groups)) if index not in held]
    if not rest or (share > 0 and not held):
        raise TrainingError("too few rows to hold some out; give more, or --holdout 0")
    return rest, sorted(held)
