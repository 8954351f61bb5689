"""Storage: a folder or a bucket, by fsspec. Objects appear whole or not at all.

Work on it blocks, so it runs in threads in which tenants take turns.
"""

from __future__ import annotations

import logging
import posixpath
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from typing import IO, Any, TypeVar
from urllib.parse import quote

from service.errors import Unavailable
from service.fair_pool import FairPool

T = TypeVar("T")

log = logging.getLogger(__name__)

THREADS = 4
COPY_BYTES = 2**20
# Errors of the clients of buckets that fsspec's filesystems raise as they are.
_CLIENTS = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "google.auth.exceptions": ("GoogleAuthError",),
}


def failures() -> tuple[type[Exception], ...]:
    """What work on a storage may raise; ImportError: fsspec needs a package for the URL's protocol.
    Of clients, those that are imported by now.
    """
    clients = (
        getattr(sys.modules[module], name)
        for module, names in _CLIENTS.items()
        if module in sys.modules
        for name in names
    )
    return OSError, ImportError, ValueError, *clients


def folder_of(tenant: str) -> str:
    """A tenant's name as the name of a folder."""
    return "t-" + quote(tenant, safe="")


class Tree:
    """The objects below one URL, by relative paths. Every method may raise `failures()`."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs  # in a thread of the storage, not when a process starts

        # Another replica may have changed a folder since it was listed.
        options = {} if "://" not in url else {"use_listings_cache": False}
        self._fs, root = url_to_fs(url, **options)
        self._root = root.rstrip("/")
        self._is_local = "file" in self._protocols

    @property
    def _protocols(self) -> tuple[str, ...]:
        names = self._fs.protocol
        return (names,) if isinstance(names, str) else tuple(names)

    def sizes(self, folder: str) -> dict[str, int]:
        """Name -> size in bytes of what is directly in a folder; empty if there is none."""
        try:
            entries = self._fs.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return {}
        found = {posixpath.basename(e["name"].rstrip("/")): int(e["size"] or 0) for e in entries}
        return {name: size for name, size in found.items() if not name.endswith(".tmp")}

    def read(self, path: str, start: int | None = None, end: int | None = None) -> bytes | None:
        """Its bytes from `start` to `end`; None if it does not exist."""
        try:
            data: bytes = self._fs.cat_file(self._path(path), start=start, end=end)
        except FileNotFoundError:
            return None
        return data

    def size(self, path: str) -> int | None:
        """In bytes; None if it does not exist."""
        try:
            return int(self._fs.info(self._path(path))["size"])
        except FileNotFoundError:
            return None

    def write(self, path: str, data: bytes) -> None:
        """Creates or replaces an object."""
        if self._is_local:
            with self.writing(path) as file:
                file.write(data)
        else:
            self._fs.pipe_file(self._target(path), data)  # in one call of the bucket

    @contextmanager
    def writing(self, path: str) -> Iterator[IO[bytes]]:
        """A file that becomes the object when the block ends without an error."""
        target = self._target(path)
        if not self._is_local:
            with _upload(self._fs.open(target, "wb")) as file:
                yield file
            return
        temporary = f"{target}.{secrets.token_hex(6)}.tmp"
        try:
            with self._fs.open(temporary, "wb") as file:
                yield file
            self._fs.mv(temporary, target)
        finally:
            with suppress(OSError):  # it exists only after an error
                self._fs.rm_file(temporary)

    def remove(self, path: str) -> bool:
        """Removes an object or a folder; returns whether it was there."""
        try:
            self._fs.rm(self._path(path), recursive=True)
        except FileNotFoundError:
            return False
        return True

    def _target(self, path: str) -> str:
        """The path of an object that is to be written; its folder exists, if there are folders."""
        target = self._path(path)
        self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
        return target

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"


@contextmanager
def _upload(file: Any) -> Iterator[IO[bytes]]:  # noqa: ANN401 - fsspec has no types
    """An object of a bucket, which exists when the upload is complete. Aborts it after an error."""
    with ExitStack() as stack:
        stack.callback(_abort, file)
        yield file
        stack.pop_all()
    file.close()


def _abort(file: Any) -> None:  # noqa: ANN401 - fsspec has no types
    from fsspec.spec import AbstractBufferedFile

    if isinstance(file, AbstractBufferedFile):
        file.discard()
        file.closed = True  # closing it would complete the upload


class Storage:
    """A tree that is opened when it is first needed, and the threads that work on it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._pool = FairPool("the file storage", threads=THREADS)

    @cached_property
    def _tree(self) -> Tree:
        return Tree(self._url)

    async def run(self, tenant: str, work: Callable[[Tree], T]) -> T:
        """The result of `work`, in a thread at the tenant's turn. Raises Unavailable if the storage
        fails.
        """
        return await self._pool.run(tenant, partial(self._run, work))

    def _run(self, work: Callable[[Tree], T]) -> T:
        try:
            return work(self._tree)
        except failures() as error:
            log.warning("the storage of files fails: %s: %s", type(error).__name__, error)
            raise Unavailable(
                "the storage of files and batches is unavailable",
                code="storage_unavailable",
                retry_after=2.0,
            ) from error

    def close(self) -> None:
        """Cancels waiting work."""
        self._pool.close()


def copy(source: IO[bytes], target: IO[Any]) -> None:
    """Copies all bytes from the current position on."""
    while block := source.read(COPY_BYTES):
        target.write(block)
