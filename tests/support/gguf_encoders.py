"""Writes models that embed as GGUF files, as llama.cpp's converter does: by `gguf`'s names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

NORMAL, CONTROL = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
BLANK = "\u2581"
ARCHITECTURES = {
    "bert": gguf.MODEL_ARCH.BERT,
    "nomic_bert": gguf.MODEL_ARCH.NOMIC_BERT,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
UNNEEDED = ("pooler.", "cls.", "embeddings.position_ids")  # the converter drops them


def write_encoder(
    folder: Path,
    path: Path,
    *,
    storage: str = "F32",
    pooling: int | None = 1,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the model of a folder. Matrices of layers are stored in `storage`.

    `extra`: metadata in place of, or besides, what the converter writes; None: without an entry.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    name = gguf.MODEL_ARCH_NAMES[architecture]
    writer = gguf.GGUFWriter(str(path), name)
    entries: dict[str, Any] = {
        f"{name}.block_count": config["num_hidden_layers"],
        f"{name}.context_length": config["max_position_embeddings"],
        f"{name}.embedding_length": config["hidden_size"],
        f"{name}.feed_forward_length": config["intermediate_size"],
        f"{name}.attention.head_count": config["num_attention_heads"],
        f"{name}.pooling_type": pooling,
    }
    if architecture is gguf.MODEL_ARCH.QWEN3:
        entries |= {
            f"{name}.attention.head_count_kv": config["num_key_value_heads"],
            f"{name}.attention.key_length": config["head_dim"],
            f"{name}.attention.value_length": config["head_dim"],
            f"{name}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        }
        _add_byte_level(folder, entries)
    else:
        entries |= {
            f"{name}.attention.layer_norm_epsilon": config["layer_norm_eps"],
            f"{name}.attention.causal": False,
            "tokenizer.ggml.token_type_count": config["type_vocab_size"],
        }
        _add_wordpiece(folder, entries)
    if architecture is not gguf.MODEL_ARCH.BERT:
        entries[f"{name}.rope.freq_base"] = config["rope_parameters"]["rope_theta"]
    _add_entries(writer, entries | dict(extra or {}))
    _add_tensors(writer, folder, architecture, config["num_hidden_layers"], storage)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_entries(writer: gguf.GGUFWriter, entries: dict[str, Any]) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in entries.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            add.get(type(value), writer.add_string)(key, value)


def _add_byte_level(folder: Path, entries: dict[str, Any]) -> None:
    """With Qwen's splitting; the post-processor ends each text with its one special token."""
    body = json.loads((folder / "tokenizer.json").read_text())
    special = {each["id"] for each in body["added_tokens"] if each["special"]}
    vocabulary = sorted(body["model"]["vocab"].items(), key=lambda item: item[1])
    ((_, end),) = body["post_processor"]["special_tokens"].items()
    entries |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [text for text, _ in vocabulary],
        "tokenizer.ggml.token_type": [
            int(CONTROL if id_ in special else NORMAL) for _, id_ in vocabulary
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in body["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": end["ids"][0],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
    }


def _add_wordpiece(folder: Path, entries: dict[str, Any]) -> None:
    body = json.loads((folder / "tokenizer.json").read_text())
    special = {each["id"] for each in body["added_tokens"] if each["special"]}
    texts: list[str] = []
    kinds: list[int] = []
    for text, id_ in sorted(body["model"]["vocab"].items(), key=lambda item: item[1]):
        assert id_ == len(texts)
        kinds.append(int(CONTROL if id_ in special else NORMAL))
        texts.append(text if id_ in special else _with_phantom_blank(text))
    ids = {text: id_ for text, id_ in body["model"]["vocab"].items() if id_ in special}
    entries |= {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "jina-v2-en",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": ids["[UNK]"],
        "tokenizer.ggml.seperator_token_id": ids["[SEP]"],
        "tokenizer.ggml.padding_token_id": ids["[PAD]"],
        "tokenizer.ggml.cls_token_id": ids["[CLS]"],
    }


def _with_phantom_blank(text: str) -> str:
    return text[2:] if text.startswith("##") else BLANK + text


def _add_tensors(
    writer: gguf.GGUFWriter, folder: Path, architecture: gguf.MODEL_ARCH, layers: int, storage: str
) -> None:
    names = gguf.get_tensor_name_map(architecture, layers)
    kind = gguf.GGMLQuantizationType[storage]
    for theirs, array in load_file(folder / "model.safetensors").items():
        name = theirs.removeprefix("bert.").removeprefix("nomic_bert.")
        if architecture is gguf.MODEL_ARCH.QWEN3:
            name = f"model.{name}"
        if name.startswith(UNNEEDED):
            continue
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert ours is not None, theirs
        is_matrix = ours.startswith("blk.") and array.ndim == 2
        if is_matrix and storage != "F32":
            stored = gguf.quants.quantize(array.astype(np.float32), kind)
            writer.add_tensor(ours, stored, raw_dtype=kind)
        else:
            writer.add_tensor(ours, array.astype(np.float32))
