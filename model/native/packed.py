"""Packed weights on disk: a restart reads what an earlier start of the same model computed.

One file per model, kernel and instruction set, in a cache folder:

    one line of JSON   {"key": ..., "ranges": [[bytes, SHA-256], ...]}
    the ranges of the library's weights, end to end

The key names all that the bytes depend on, so an old file is never read, and the digests tell a
damaged one. Weights are read into the library's own memory, not mapped, because only that is in
huge pages. A file appears whole or not at all. The least recently used files are removed. Whatever
fails here only costs the time of computing the weights again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from io import BufferedReader
from pathlib import Path

from model.config import ModelConfig
from model.native import quantize
from model.native.build import remove_stale
from model.native.library import Bytes, NativeModel, Shape

log = logging.getLogger(__name__)

LEAST_STORED = 16 * 1024**2  # bytes: smaller models are packed as fast as they are read
_KEPT = 4  # files in a folder
_FORMAT = 1
_LONGEST_HEAD = 65_536  # bytes
# Fields of Shape that leave the weights as they are.
_OF_RUNS = {
    "block_size", "num_blocks", "max_rows", "wide_cache", "spreads", "threads", "compute_threads",
    "compute_rows", "norm_eps", "windows", "has_rotary", "cosines", "sines",
}  # fmt: skip


class PackedWeights:
    """The file of one model's packed weights in a folder."""

    def __init__(
        self, folder: Path, model: NativeModel, config: ModelConfig, *, digest: str
    ) -> None:
        """`digest`: of the checkpoint."""
        self._model = model
        self._key = _key(model, config, digest)
        self.path = folder / f"{self._key}.weights"

    @property
    def pays(self) -> bool:
        """Whether the model is large enough for reading to be faster than computing."""
        return sum(memory.nbytes for memory in self._model.weights()) >= LEAST_STORED

    def read(self) -> bool:
        """Fills the model's memory; False, and the memory is zero, if there is no valid file."""
        reason = "damaged"
        try:
            with self.path.open("rb") as file:
                valid = self._read(file)
        except FileNotFoundError:
            return False
        except OSError as error:
            valid, reason = False, f"unreadable ({error.strerror})"
        if not valid:
            for memory in self._model.weights():
                memory.fill(0)
            log.warning("packed weights in %s are %s; computing them again", self.path.name, reason)
            return False
        with suppress(OSError):  # of another user
            os.utime(self.path)  # removal goes by this time
        return True

    def write(self) -> None:
        """Stores the model's memory, if the folder can be written and has room."""
        folder, ranges = self.path.parent, self._model.weights()
        num_bytes = sum(memory.nbytes for memory in ranges)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free < 2 * num_bytes:
                log.info("packed weights are not stored: too little room in %s", folder)
                return
            with ThreadPoolExecutor() as pool:
                digests = pool.map(_sha256, ranges)
                sizes = [memory.nbytes for memory in ranges]
                head = {"key": self._key, "ranges": [*zip(sizes, digests, strict=True)]}
            with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as scratch:
                made = Path(scratch) / self.path.name
                with made.open("wb") as file:
                    file.write(json.dumps(head).encode() + b"\n")
                    for memory in ranges:
                        file.write(memory.data)
                made.replace(self.path)
        except OSError as error:
            log.info("packed weights are not stored in %s: %s", folder, error.strerror)
            return
        remove_stale(folder, "*.weights", kept=_KEPT)

    def _read(self, file: BufferedReader) -> bool:
        """Reads and checks every range; False if the file is not what was written."""
        ranges = self._model.weights()
        try:
            head = json.loads(file.readline(_LONGEST_HEAD))
            stated = [(int(size), str(digest)) for size, digest in head["ranges"]]
        except (ValueError, TypeError, KeyError):
            return False
        if head.get("key") != self._key or [size for size, _ in stated] != [
            memory.nbytes for memory in ranges
        ]:
            return False
        offset = file.tell()
        with ThreadPoolExecutor() as pool:
            done = []
            for memory, (size, digest) in zip(ranges, stated, strict=True):
                done.append(pool.submit(_read_range, file.fileno(), memory, offset, digest))
                offset += size
            return all(future.result() for future in done)


def _read_range(number: int, memory: Bytes, offset: int, digest: str) -> bool:
    """Reads one range of a file; returns whether it has that digest. Releases the GIL."""
    done = 0
    while done < memory.nbytes:
        num = os.preadv(number, [memory[done:].data], offset + done)
        if not num:
            return False
        done += num
    return _sha256(memory) == digest


def _sha256(memory: Bytes) -> str:
    return hashlib.sha256(memory.data).hexdigest()


def _key(model: NativeModel, config: ModelConfig, digest: str) -> str:
    """Names everything that the packed weights depend on."""
    shape = {
        field.name: getattr(model.shape, field.name)
        for field in fields(Shape)
        if field.name not in _OF_RUNS
    }
    folder = Path(__file__).parents[1]
    sources = [
        Path(quantize.__file__),
        folder / "weights.py",
        *(folder / "checkpoint").glob("*.py"),
    ]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()
    whole = (_FORMAT, model.library_name, model.variant, shape, config, digest, code)
    return hashlib.sha256(repr(whole).encode()).hexdigest()[:32]
