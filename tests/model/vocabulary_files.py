"""Writes vocabularies into GGUF files, as llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def add_vocabulary(
    writer: gguf.GGUFWriter,
    tokens: Sequence[tuple[str, int]],
    *,
    kind: str = "gpt2",
    pre: str = "qwen2",
    scores: Sequence[float] | None = None,
    merges: Sequence[str] = (),
    **settings: int | bool,
) -> None:
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([type_ for _, type_ in tokens])
    if scores is not None:
        writer.add_token_scores(list(scores))
    if merges:
        writer.add_token_merges(list(merges))
    for name, value in settings.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"tokenizer.ggml.{name}", value)


def vocabulary_file(path: Path, tokens: Sequence[tuple[str, int]], **settings: Any) -> Path:
    """A GGUF file with a vocabulary and no tensors."""
    writer = gguf.GGUFWriter(str(path), "llama")
    add_vocabulary(writer, tokens, **settings)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
