"""What the API replicas of an oracle cluster need of a model: a tokenizer and a card."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import TinyModel


def write_model_of_oracle(tiny: TinyModel, folder: Path) -> Path:
    """Tokenizer and card of a tiny model, with a context as long as the oracle's."""
    tiny.write_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder
