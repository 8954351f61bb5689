"""The files that API replicas of an oracle cluster need: tokenizer and configuration."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.tiny_model import TinyModel


def write_model_of_oracle(tiny: TinyModel, folder: Path) -> Path:
    """Writes the files of a tiny model with the context length of the oracle."""
    tiny.write_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder
