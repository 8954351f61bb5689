"""Reads the JSON files of a checkpoint, of bounded size, with errors that name the file alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.checkpoint import CheckpointError

MAX_JSON_BYTES = 64 * 1024**2  # config.json has kilobytes, the largest tokenizers 40 megabytes


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        value = json.loads(text) if len(text) <= MAX_JSON_BYTES else None
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror or 'cannot be read'}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path.name}: not JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: not a JSON object of at most {MAX_JSON_BYTES} bytes")
    return value
