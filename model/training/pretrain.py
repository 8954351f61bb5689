"""Pre-training: a new Llama-like decoder and a byte-level BPE vocabulary, from plain text."""

from __future__ import annotations

import glob
import hashlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.config import ModelConfig
from model.families import family_of
from model.training import TrainingError
from model.training.data import TokenBatch
from model.training.folder import as_stored, write_json, write_model
from model.training.loop import Recipe
from model.training.network import token_losses
from model.transformer import Transformer

END = "<|endoftext|>"  # between documents; the answer of the model ends with it, too
_MAX_EVALUATED = 64  # batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A configuration file: the network's sizes, and how it is trained."""

    vocab_size: int = 2048
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 2
    intermediate_size: int = 512
    context: int = 256  # tokens
    holdout: float = 0.05  # share of the text, at its end, that is validated with
    recipe: Recipe = field(
        default_factory=lambda: Recipe(steps=1000, learning_rate=2e-3, weight_decay=0.1)
    )

    @property
    def config_json(self) -> dict[str, Any]:
        """The fields of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.hidden_size // max(1, self.num_heads),
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
        }


def model_config(plan: Plan) -> ModelConfig:
    """The network of a plan. Raises TrainingError for sizes that cannot be one."""
    try:
        return family_of("llama").configure(plan.config_json)
    except ValueError as error:
        raise TrainingError(f"configuration: {error}") from None


def read_plan(path: Path | None) -> Plan:
    """Reads a TOML file of two tables, `model` and `training`. Raises TrainingError."""
    try:
        tables = {} if path is None else tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"configuration: {error.strerror or 'cannot be read'}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainingError(f"configuration: {error}") from None
    plan = Plan()
    sizes = {each.name: getattr(plan, each.name) for each in fields(Plan)}
    steps = {each.name: getattr(sizes["recipe"], each.name) for each in fields(Recipe)}
    del sizes["recipe"]
    known = {"model": sizes, "training": steps}
    for table, values in tables.items():
        if table not in known or not isinstance(values, dict):
            raise TrainingError("configuration: the tables are [model] and [training]")
        for name, value in values.items():
            if name not in known[table]:
                names = ", ".join(known[table])
                raise TrainingError(f"configuration: [{table}] has no {name!r}, but {names}")
            kind = type(known[table][name])
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise TrainingError(f"configuration: {name} must be of type {kind.__name__}")
            known[table][name] = kind(value)
    plan = Plan(recipe=Recipe(**known["training"]), **known["model"])
    if not 0 < plan.holdout < 1:
        raise TrainingError("configuration: holdout must be above 0 and below 1")
    if not len(_alphabet()) < plan.vocab_size <= 2**16:
        raise TrainingError(
            f"configuration: vocab_size must be from {len(_alphabet()) + 1} to 65536"
        )
    if plan.context < 2:
        raise TrainingError("configuration: context must be at least 2")
    model_config(plan)
    return plan


def read_documents(pattern: str) -> list[str]:
    """The texts of a file, of a folder's files, or of those that a pattern matches, by name."""
    path = Path(pattern)
    found = sorted(path.rglob("*")) if path.is_dir() else map(Path, sorted(glob.glob(pattern)))  # noqa: PTH207 - the pattern may be absolute
    documents = []
    for file in found:
        if not file.is_file():
            continue
        try:
            documents.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise TrainingError(f"{file.name}: not UTF-8") from None
        except OSError as error:
            raise TrainingError(f"{file.name}: {error.strerror or 'cannot be read'}") from None
    if not any(documents):
        raise TrainingError("--data matches no text")
    return documents


def train_vocabulary(documents: Sequence[str], size: int) -> Tokenizer:
    """A byte-level BPE: any text can be encoded, and decoding gives it back. Each digit is a token
    of its own, so that a model need not learn how numbers are cut.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, *, context: int) -> None:
    """Writes the vocabulary of a new model."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    write_json(folder / "tokenizer_config.json", {**settings, "model_max_length": context})


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


class Corpus:
    """Documents as one row of tokens, of which batches are windows. A task of `loop`."""

    def __init__(self, documents: Sequence[str], tokenizer: Tokenizer, plan: Plan) -> None:
        """Raises TrainingError for too short a text."""
        end = tokenizer.token_to_id(END)
        encoded = tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)
        tokens = np.concatenate([np.array([*each.ids, end], np.int64) for each in encoded])
        cut = int(len(tokens) * (1 - plan.holdout))
        self._width = plan.context + 1
        self._train, self._held = tokens[:cut], tokens[cut:]
        if min(len(self._train), len(self._held)) < self._width:
            raise TrainingError(
                f"the text has {len(tokens)} tokens, which is too few for a context of"
                f" {plan.context} and a holdout of {plan.holdout}"
            )
        self._plan = plan
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()[:12]
        sizes = "-".join(str(size) for size in plan.config_json.values())
        self.name = f"pretrain-{digest}-{hashlib.sha256(sizes.encode()).hexdigest()[:12]}"
        held_bytes = len(tokenizer.decode(self._held.tolist()).encode())
        self.tokens_per_byte = len(self._held) / max(1, held_bytes)

    def batches(self, first: int) -> Iterator[TokenBatch]:
        recipe, number = self._plan.recipe, first
        while True:
            random = np.random.default_rng([recipe.seed, number])
            starts = random.integers(0, len(self._train) - self._width + 1, recipe.batch)
            yield self._windows(self._train, starts.tolist())
            number += 1

    def loss(self, network: Transformer, batch: TokenBatch) -> torch.Tensor:
        return token_losses(network, batch.tokens_NT, batch.targets)

    def evaluate(self, network: Transformer) -> Mapping[str, float]:
        """Loss in nats per token, over windows of the held-out text that do not overlap."""
        size = self._plan.recipe.batch
        starts = range(0, len(self._held) - self._width + 1, self._width - 1)
        chosen = list(starts)[: size * _MAX_EVALUATED]
        device = next(network.parameters()).device
        total = torch.zeros((), device=device)
        terms = 0
        for at in range(0, len(chosen), size):
            batch = self._windows(self._held, chosen[at : at + size])
            total += self.loss(network, batch.to(device))
            terms += batch.count
        return {"loss": float(total) / terms}

    def _windows(
        self, tokens: np.ndarray[Any, np.dtype[np.int64]], starts: list[int]
    ) -> TokenBatch:
        rows = torch.from_numpy(np.stack([tokens[at : at + self._width] for at in starts]))
        scored = torch.ones_like(rows, dtype=torch.bool)
        scored[:, 0] = False
        lengths = torch.full((len(rows),), self._width - 1)
        return TokenBatch(tokens_NT=rows, lengths_N=lengths, targets=scored)


def write_pretrained(folder: Path, network: Transformer, tokenizer: Tokenizer, plan: Plan) -> None:
    """Writes a folder that `quire serve` and `transformers` load."""
    write_tokenizer(folder, tokenizer, context=plan.context)
    family = family_of("llama")
    tensors = as_stored(family, network.config, network.state_dict())
    write_model(folder, fields=plan.config_json, tensors=tensors, vocabulary=None)
