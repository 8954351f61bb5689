"""Reads the model that training starts from, and writes folders that `transformers` loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from model.checkpoint import CheckpointError, configure, find_gguf, open_checkpoint, open_model
from model.checkpoint.gguf_parts import read_headers
from model.checkpoint.gguf_vocabulary import from_gguf
from model.checkpoint.stored import stored_tensors
from model.checkpoint.vocabulary import Vocabulary
from model.config import ModelConfig
from model.families import Family
from model.text.tokenizer import Tokenizer
from model.training import TrainingError
from model.weights import to_tensor

Tensors = Mapping[str, torch.Tensor]

WEIGHTS = "model.safetensors"
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.txt",
)
_CLASSES = {
    "bert": "Bert",
    "distilbert": "DistilBert",
    "gpt2": "GPT2",
    "llama": "Llama",
    "mistral": "Mistral",
    "modernbert": "ModernBert",
    "nomic_bert": "NomicBert",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "roberta": "Roberta",
    "smollm3": "SmolLM3",
    "xlm-roberta": "XLMRoberta",
}
"""`model_type` -> the beginning of its classes' names in transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that training starts from."""

    fields: Mapping[str, Any]  # of config.json
    family: Family
    config: ModelConfig
    weights: dict[str, torch.Tensor]  # canonical names, fused, float32
    dtype: torch.dtype  # in which the matrices are stored
    files: Path  # a folder or GGUF file with the vocabulary
    digest: str

    @property
    def tokenizer(self) -> Tokenizer:
        """Reads the vocabulary."""
        return Tokenizer.from_checkpoint(self.files)

    @property
    def class_prefix(self) -> str:
        """The beginning of the names of its classes in transformers."""
        return _CLASSES[str(self.fields["model_type"])]


def open_base(path: Path, *, headless: bool = False) -> Base:
    """Reads a model into float32; `headless` as in `open_model`. Raises CheckpointError."""
    checkpoint = open_checkpoint(path)
    family, _ = configure(checkpoint)
    opened = open_model(path, headless=headless)
    if opened.config.encoder is not None:
        raise TrainingError("an encoder-decoder cannot be tuned further: tune seq2seq trains one")
    weights = {name: to_tensor(array) for name, array in opened.weights.items()}
    return Base(
        fields=dict(checkpoint.config),
        family=family,
        config=opened.config,
        weights={name: tensor.float() for name, tensor in weights.items()},
        dtype=weights["embed.weight"].dtype,
        files=checkpoint.tokenizer,
        digest=opened.digest,
    )


def as_stored(family: Family, config: ModelConfig, weights: Tensors) -> dict[str, torch.Tensor]:
    """The network's tensors under the names, and in the layout, of the family's checkpoints."""
    found = {}
    for each in stored_tensors(family, config):
        tensor = weights[each.fused][each.start : each.stop]
        found[each.name] = (tensor.T if each.transposed else tensor).contiguous().clone()
    return found


def write_model(
    folder: Path,
    *,
    fields: Mapping[str, Any],
    tensors: Tensors,
    vocabulary: Path | None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes config.json, the weights and, from a folder or GGUF file, the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().to(dtype) for name, tensor in tensors.items()}
    part = folder / f".{WEIGHTS}.part"
    save_file(stored, part, metadata={"format": "pt"})
    part.replace(folder / WEIGHTS)
    if vocabulary is not None:
        fields = {**fields, **write_vocabulary(folder, vocabulary)}
    kind = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**fields, "dtype": kind, "torch_dtype": kind})


def write_vocabulary(folder: Path, source: Path) -> dict[str, Any]:
    """Copies or converts a vocabulary; returns what config.json has to state about it."""
    gguf = find_gguf(source)
    if gguf is not None:
        return _write_converted(folder, from_gguf(read_headers(gguf)))
    for name in _TEXT_FILES:
        if (source / name).exists() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)
    return {}


def _write_converted(folder: Path, vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json of a GGUF file's vocabulary, in which special tokens are marked as such."""
    body = json.loads(vocabulary.first.to_str())
    model = body["model"]
    specials = {text: special.id for text, special in vocabulary.specials.items()}
    unknown = model["vocab"].pop(model["unk_token"], None)  # bytes without a token: loading's own
    model["unk_token"] = next((text for text, id_ in specials.items() if id_ == unknown), None)
    model["vocab"] |= specials
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    marked = [
        {"id": id_, "content": text, **flags, "special": True} for text, id_ in specials.items()
    ]
    body["added_tokens"] = sorted([*body["added_tokens"], *marked], key=lambda token: token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(body, ensure_ascii=False), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        **vocabulary.names,
    }
    write_json(folder / "tokenizer_config.json", settings)
    if vocabulary.chat_template is not None:
        (folder / "chat_template.jinja").write_text(vocabulary.chat_template, encoding="utf-8")
    ends = sorted(vocabulary.eos_ids)
    return {"bos_token_id": vocabulary.bos_id, "eos_token_id": ends[0] if ends[1:] == [] else ends}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object, readable and in the order given."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_output(folder: Path, *, resume: bool) -> None:
    """Raises CheckpointError for a folder that has other files, unless training is resumed."""
    if not resume and folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder.name} is not empty: choose a new folder, or --resume")
