"""Token counts of an answer, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.api.generation.deltas import ChoiceReader
from service.api.generation.manifest import Manifest


def usage(manifest: Manifest, readers: Sequence[ChoiceReader]) -> dict[str, Any]:
    """Counts so far. A prompt counts once, however many choices it has; of cached tokens the least
    that any of its choices found, because the others may have found what the first one computed.
    """
    cached = 0
    for first in range(0, len(readers), manifest.width):
        ends = [reader.end for reader in readers[first : first + manifest.width]]
        cached += min(end.cached_tokens if end is not None else 0 for end in ends)
    completion = sum(reader.count for reader in readers)
    return {
        "prompt_tokens": manifest.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": manifest.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
