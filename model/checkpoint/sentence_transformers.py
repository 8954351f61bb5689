"""How a folder's states become an embedding: the files that sentence-transformers writes.

modules.json lists the parts (a transformer, a pooling, a normalisation), 1_Pooling/config.json has
the pooling, sentence_bert_config.json the longest input, config_sentence_transformers.json the
prompts. Without them a folder has the library's own defaults. A GGUF file states its pooling
itself, and the files beside it do not count. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from model.checkpoint import CheckpointError, find_gguf
from model.checkpoint.gguf_parts import read_headers
from model.checkpoint.json_file import read_json
from model.config import Pooling

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_LENGTH_FILES = ("sentence_bert_config.json", "sentence_roberta_config.json")
_MODES = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_lasttoken": Pooling.LAST,
    "pooling_mode_max_tokens": None,
    "pooling_mode_mean_sqrt_len_tokens": None,
    "pooling_mode_weightedmean_tokens": None,
}
_NAMES = {"cls": Pooling.CLS, "mean": Pooling.MEAN, "lasttoken": Pooling.LAST}


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceSettings:
    """What the files contain; None: they are silent."""

    pooling: Pooling | None = None
    normalised: bool | None = None
    max_tokens: int | None = None
    similarity: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)  # name -> text before each input
    default_prompt: str | None = None  # a name


def read_settings(path: Path) -> SentenceSettings:
    """Of a file or folder. Raises CheckpointError for what is malformed or not supported."""
    gguf = find_gguf(path)
    if gguf is not None:
        from model.checkpoint.gguf_encoder import settings_of

        return settings_of(read_headers(gguf))
    folder = path if path.is_dir() else path.parent
    parts = _modules(folder)
    kinds = [kind for kind, _ in parts]
    poolings = [path for kind, path in parts if kind == "Pooling"]
    if len(poolings) > 1 or kinds[:1] not in ([], ["Transformer"]):
        raise CheckpointError(f"{MODULES}: must list one Transformer, then one Pooling")
    settings = _optional(folder / SETTINGS)
    prompts = settings.get("prompts") or {}
    default = settings.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise CheckpointError(f"{SETTINGS}: prompts must be an object of texts")
    if default is not None and default not in prompts:
        raise CheckpointError(f"{SETTINGS}: default_prompt_name must be one of the prompts")
    similarity = settings.get("similarity_fn_name")
    if similarity not in (None, *SIMILARITIES):
        raise CheckpointError(
            f"{SETTINGS}: similarity_fn_name must be one of {', '.join(SIMILARITIES)}"
        )
    return SentenceSettings(
        pooling=_pooling(folder / poolings[0]) if poolings else None,
        normalised="Normalize" in kinds if parts else None,
        max_tokens=_longest(folder),
        similarity=similarity,
        prompts=prompts,
        default_prompt=default,
    )


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Kind and folder of each part, in order."""
    path = folder / MODULES
    if not path.exists():
        return []
    found = []
    for part in read_json_list(path):
        kind = str(part.get("type", "")).rpartition(".")[2]
        place = part.get("path", "")
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise CheckpointError(
                f"{MODULES}: {kind[:40]!r} is not supported; Transformer, Pooling, Normalize are"
            )
        inside = isinstance(place, str) and ".." not in PurePosixPath(place).parts
        if not inside or PurePosixPath(place).is_absolute():
            raise CheckpointError(f"{MODULES}: names a folder outside its own")
        found.append((kind, place))
    return found


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """Reads a JSON list of objects. Raises CheckpointError."""
    value = read_json(path, kind=list)
    if not all(isinstance(item, dict) for item in value):
        raise CheckpointError(f"{path.name}: must be a list of objects")
    return value


def _pooling(folder: Path) -> Pooling:
    config = read_json(folder / "config.json")
    chosen: list[Pooling | None] = [mode for name, mode in _MODES.items() if config.get(name)]
    stated = config.get("pooling_mode")
    if stated is not None:
        chosen = [_NAMES.get(str(stated))]
    if len(chosen) != 1 or chosen[0] is None:
        raise CheckpointError("Pooling: one of the modes mean, cls and lasttoken is supported")
    if config.get("include_prompt") is False:
        raise CheckpointError("Pooling: include_prompt must be true")
    return chosen[0]


def _longest(folder: Path) -> int | None:
    for name in _LENGTH_FILES:
        longest = _optional(folder / name).get("max_seq_length")
        if longest is not None:
            if type(longest) is not int or longest < 1:
                raise CheckpointError(f"{name}: max_seq_length must be a whole number from 1")
            return longest
    return None


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
