"""Reads the JSON files of a checkpoint, of bounded size, with errors that name the file alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, overload

from model.checkpoint import CheckpointError

MAX_JSON_BYTES = 64 * 1024**2  # config.json has kilobytes, the largest tokenizers 40 megabytes


@overload
def read_json(path: Path) -> dict[str, Any]: ...
@overload
def read_json(path: Path, *, kind: type[list[Any]]) -> list[Any]: ...
def read_json(path: Path, *, kind: type[Any] = dict) -> Any:
    """Reads a JSON object, or a value of another kind. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        value = json.loads(text) if len(text) <= MAX_JSON_BYTES else None
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror or 'cannot be read'}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path.name}: not JSON") from None
    if not isinstance(value, kind):
        named = "object" if kind is dict else "list"
        raise CheckpointError(f"{path.name}: not a JSON {named} of at most {MAX_JSON_BYTES} bytes")
    return value
