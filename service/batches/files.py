"""Files of tenants: the input of batches, and what batches write.

    files/<tenant>/<id>.data    the content
    files/<tenant>/<id>.json    the rest; without it there is no such file

Limits are checked after the write, too: each replica counts what it wrote, so uploads at several of
them cannot exceed a limit together.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import IO

import orjson

from service.batches.storage import Storage, Tree, copy, folder_of
from service.decoding import decode
from service.errors import NotFound, RateLimited

_ID = re.compile(r"file-[0-9a-f]{32}(-output|-error)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLimits:
    """Per tenant, except `max_bytes`, which is of one file."""

    max_bytes: int = 200 * 2**20
    max_files: int = 1000
    max_total_bytes: int = 2 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """What is known of a file besides its content."""

    id: str
    name: str
    purpose: str
    num_bytes: int
    created: int  # Unix seconds

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self))


class Files:
    """The files in a storage. `tenant` owns them: another one's do not exist for it."""

    def __init__(self, storage: Storage, limits: FileLimits) -> None:
        self._storage = storage
        self.limits = limits

    async def ensure_room(self, tenant: str, size: int = 0) -> None:
        """Raises RateLimited if one more file of this size would exceed a limit."""

        def check(tree: Tree) -> None:
            self._check(tree, tenant, more=1, size=size)

        await self._storage.run(tenant, check)

    async def create(
        self, tenant: str, file_id: str, content: IO[bytes], *, name: str, purpose: str
    ) -> StoredFile:
        """Stores a new file. Raises RateLimited."""

        def write(tree: Tree) -> StoredFile:
            size = content.seek(0, 2)
            content.seek(0)
            with tree.writing(data_path(tenant, file_id)) as target:
                copy(content, target)
            file = StoredFile(
                id=file_id, name=name, purpose=purpose, num_bytes=size, created=int(time.time())
            )
            add(tree, tenant, file)
            try:
                self._check(tree, tenant)
            except RateLimited:
                _remove(tree, tenant, file_id)
                raise
            return file

        return await self._storage.run(tenant, write)

    async def list(self, tenant: str) -> Sequence[StoredFile]:
        """All files, oldest first."""

        def read(tree: Tree) -> Sequence[StoredFile]:
            found = (_read(tree, tenant, file_id) for file_id in _ids(tree, tenant))
            return sorted((f for f in found if f is not None), key=lambda f: (f.created, f.id))

        return await self._storage.run(tenant, read)

    async def get(self, tenant: str, file_id: str) -> StoredFile:
        """Raises NotFound."""
        return await self._storage.run(tenant, lambda tree: find(tree, tenant, file_id))

    async def content(self, tenant: str, file_id: str, start: int, end: int) -> bytes:
        """A part of its bytes. Raises NotFound."""

        def read(tree: Tree) -> bytes:
            data = tree.read(data_path(tenant, file_id), start, end)
            if data is None:
                raise _unknown()
            return data

        return await self._storage.run(tenant, read)

    async def delete(self, tenant: str, file_id: str) -> None:
        """Raises NotFound."""

        def remove(tree: Tree) -> None:
            find(tree, tenant, file_id)
            _remove(tree, tenant, file_id)

        await self._storage.run(tenant, remove)

    def _check(self, tree: Tree, tenant: str, *, more: int = 0, size: int = 0) -> None:
        sizes = tree.sizes(f"files/{folder_of(tenant)}")
        limits = self.limits
        if sum(name.endswith(".json") for name in sizes) + more > limits.max_files:
            raise _over(f"you may have at most {limits.max_files} files; delete some")
        if sum(sizes.values()) + size > limits.max_total_bytes:
            message = f"your files may have at most {limits.max_total_bytes} bytes; delete some"
            raise _over(message)


def add(tree: Tree, tenant: str, file: StoredFile) -> None:
    """Makes a file exist, whose content is there already."""
    tree.write(f"files/{folder_of(tenant)}/{file.id}.json", file.to_json())


def data_path(tenant: str, file_id: str) -> str:
    """Of the content."""
    return f"files/{folder_of(tenant)}/{file_id}.data"


def find(tree: Tree, tenant: str, file_id: str) -> StoredFile:
    """Raises NotFound."""
    found = _read(tree, tenant, file_id) if _ID.fullmatch(file_id) else None
    if found is None:
        raise _unknown()
    return found


def _read(tree: Tree, tenant: str, file_id: str) -> StoredFile | None:
    data = tree.read(f"files/{folder_of(tenant)}/{file_id}.json")
    return None if data is None else decode(StoredFile, data)


def _ids(tree: Tree, tenant: str) -> list[str]:
    names = tree.sizes(f"files/{folder_of(tenant)}")
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def _remove(tree: Tree, tenant: str, file_id: str) -> None:
    for kind in ("json", "data"):  # without the first it does not exist any more
        tree.remove(f"files/{folder_of(tenant)}/{file_id}.{kind}")


def _unknown() -> NotFound:
    return NotFound("there is no such file", code="file_not_found")


def _over(message: str) -> RateLimited:
    return RateLimited(message, code="storage_full", retryable=False)
