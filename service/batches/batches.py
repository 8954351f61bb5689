"""Batches as facts: objects of a storage that are written once and never changed.

    batches/<tenant>/<id>/batch.json               what was asked for; exists first
                          lines-<n>-<time>         it was checked and has n lines; time in ms
                          part-<k>-<done>-<failed> answers of the lines k * PART_LINES and after
                          cancel-<time>            a client cancelled it
                          end.json                 how it ended; then the parts are removed
    open/<tenant>~<id>                             it has no end yet

The state of a batch is the union of its facts, so two replicas that run the same batch for a while,
because the lease between them was lost, cannot undo each other's work: of facts with the same
meaning, the first name in order counts.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import IO
from urllib.parse import unquote

import orjson

from service.batches.files import StoredFile, add, data_path, find
from service.batches.storage import Storage, Tree, folder_of
from service.decoding import decode
from service.errors import NotFound, RateLimited
from service.messages import Allowance

PART_LINES = 64
MAX_KEPT = 1000
"""Batches per tenant; the oldest that have ended are forgotten when more are created."""
DONE, FAILED = b"+", b"-"
"""First byte of a row of a part: whether it belongs to the output or to the error file."""

_ID = re.compile(r"batch_[0-9a-f]{32}")
_LINES = re.compile(r"lines-([0-9]+)-([0-9]+)")
_PART = re.compile(r"part-([0-9]+)-([0-9]+)-([0-9]+)")
_CANCEL = re.compile(r"cancel-([0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What was asked for. Times are in Unix seconds."""

    id: str
    tenant: str
    endpoint: str
    input_file: str
    window: str  # the completion window, as it was given
    created: int
    expires: int
    allowance: Allowance | None = None  # of the key that created it
    metadata: dict[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InputError:
    """An error of the input file; see `lines.LineError`."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEnd:
    """How a batch ended."""

    status: str  # completed, failed, expired or cancelled
    at: int
    total: int = 0
    done: int = 0
    failed: int = 0
    output_file: str | None = None
    error_file: str | None = None
    errors: tuple[InputError, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchState:
    """A batch and the union of its facts."""

    batch: Batch
    total: int | None = None  # lines; None: not checked yet
    started: int | None = None
    parts: Mapping[int, str] = field(default_factory=dict)  # number -> name
    cancelled: int | None = None
    end: BatchEnd | None = None

    @property
    def num_parts(self) -> int:
        return -(-(self.total or 0) // PART_LINES)

    @property
    def missing(self) -> Sequence[int]:
        """Numbers of the parts without answers."""
        return [number for number in range(self.num_parts) if number not in self.parts]

    @property
    def counts(self) -> tuple[int, int, int]:
        """(all lines, answered ones, failed ones)"""
        if self.end is not None:
            return self.end.total, self.end.done, self.end.failed
        names = [_PART.fullmatch(name) for name in self.parts.values()]
        done, failed = (sum(int(name[i]) for name in names if name) for i in (2, 3))
        return self.total or 0, done, failed

    @property
    def status(self) -> str:
        """In OpenAI's words."""
        if self.end is not None:
            return self.end.status
        if self.cancelled is not None:
            return "cancelling"
        if self.total is None:
            return "validating"
        return "in_progress" if self.missing else "finalizing"


def new_id() -> str:
    """32 hex digits that sort by time."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


class Batches:
    """The batches in a storage. `tenant` owns them: another one's do not exist for it."""

    def __init__(self, storage: Storage, *, max_open: int) -> None:
        self._storage = storage
        self._max_open = max_open

    async def create(self, batch: Batch) -> BatchState:
        """Raises NotFound if there is no such input file, RateLimited over the limit."""

        def write(tree: Tree) -> BatchState:
            find(tree, batch.tenant, batch.input_file)
            marker = f"open/{folder_of(batch.tenant)}~{batch.id}"
            tree.write(f"{_folder(batch.tenant, batch.id)}/batch.json", _json(batch))
            tree.write(marker, b"")
            own = [id_ for tenant, id_ in _open(tree) if tenant == batch.tenant]
            if len(own) > self._max_open:
                tree.remove(marker)
                tree.remove(_folder(batch.tenant, batch.id))
                raise RateLimited(
                    f"you may have at most {self._max_open} batches that have not ended",
                    retry_after=60.0,
                )
            _forget_oldest(tree, batch.tenant, keep=own)
            return BatchState(batch=batch)

        return await self._storage.run(batch.tenant, write)

    async def get(self, tenant: str, batch_id: str) -> BatchState:
        """Raises NotFound."""
        return await self._storage.run(tenant, lambda tree: read_state(tree, tenant, batch_id))

    async def list(
        self, tenant: str, *, after: str | None, limit: int
    ) -> tuple[Sequence[BatchState], bool]:
        """Those that were created before `after`, newest first; and whether there are more."""

        def read(tree: Tree) -> tuple[Sequence[BatchState], bool]:
            ids = sorted(_ids(tree, tenant), reverse=True)
            found = [id_ for id_ in ids if after is None or id_ < after]
            states = []
            for batch_id in found[:limit]:
                try:
                    states.append(read_state(tree, tenant, batch_id))
                except NotFound:  # it is being created, or was forgotten meanwhile
                    continue
            return states, len(found) > limit

        return await self._storage.run(tenant, read)

    async def cancel(self, tenant: str, batch_id: str) -> BatchState:
        """Has no effect on one that has ended. Raises NotFound."""

        def write(tree: Tree) -> BatchState:
            state = read_state(tree, tenant, batch_id)
            if state.end is None and state.cancelled is None:
                name = f"cancel-{int(time.time())}"
                tree.write(f"{_folder(tenant, batch_id)}/{name}", b"")
                state = read_state(tree, tenant, batch_id)
            return state

        return await self._storage.run(tenant, write)

    async def uses(self, tenant: str, file_id: str) -> bool:
        """Whether a file is the input of a batch that has not ended."""

        def look(tree: Tree) -> bool:
            own = [id_ for owner, id_ in _open(tree) if owner == tenant]
            found = (tree.read(f"{_folder(tenant, id_)}/batch.json") for id_ in own)
            return any(decode(Batch, data).input_file == file_id for data in found if data)

        return await self._storage.run(tenant, look)

    async def open(self) -> Sequence[tuple[str, str]]:
        """(tenant, id) of all batches that have not ended, oldest first."""
        return await self._storage.run("", _open)


def read_state(tree: Tree, tenant: str, batch_id: str) -> BatchState:
    """Raises NotFound."""
    folder = _folder(tenant, batch_id)
    data = tree.read(f"{folder}/batch.json") if _ID.fullmatch(batch_id) else None
    if data is None:
        raise NotFound("there is no such batch", code="batch_not_found")
    names = sorted(tree.sizes(folder))
    lines = next(filter(None, map(_LINES.fullmatch, names)), None)
    cancel = next(filter(None, map(_CANCEL.fullmatch, names)), None)
    parts: dict[int, str] = {}
    for found in filter(None, map(_PART.fullmatch, names)):
        parts.setdefault(int(found[1]), found[0])
    end = tree.read(f"{folder}/end.json")
    return BatchState(
        batch=decode(Batch, data),
        total=None if lines is None else int(lines[1]),
        started=None if lines is None else int(lines[2]),
        parts=parts,
        cancelled=None if cancel is None else int(cancel[1]),
        end=None if end is None else decode(BatchEnd, end),
    )


def write_total(tree: Tree, batch: Batch, total: int) -> None:
    """Records that the input was checked."""
    name = f"lines-{total}-{int(time.time())}"
    tree.write(f"{_folder(batch.tenant, batch.id)}/{name}", b"")


def write_part(tree: Tree, batch: Batch, number: int, rows: Sequence[tuple[bytes, bytes]]) -> None:
    """Records the rows (DONE or FAILED, JSON) of a part's lines, in order."""
    failed = sum(kind == FAILED for kind, _ in rows)
    name = f"part-{number:06d}-{len(rows) - failed}-{failed}"
    data = b"".join(b"%s%s\n" % row for row in rows)
    tree.write(f"{_folder(batch.tenant, batch.id)}/{name}", data)


def write_end(
    tree: Tree, batch: Batch, *, status: str, errors: Iterable[InputError] = ()
) -> BatchState:
    """Ends a batch, whose parts are complete unless it failed; writes its files. Has no effect on
    one that has ended. A file without lines is not written.
    """
    state = read_state(tree, batch.tenant, batch.id)
    if state.end is None:
        output, error = _write_files(tree, state)
        total, done, failed = state.counts
        end = BatchEnd(
            status=status,
            at=int(time.time()),
            total=total,
            done=done,
            failed=failed,
            output_file=output,
            error_file=error,
            errors=tuple(errors),
        )
        tree.write(f"{_folder(batch.tenant, batch.id)}/end.json", _json(end))
    for name in state.parts.values():
        tree.remove(f"{_folder(batch.tenant, batch.id)}/{name}")
    tree.remove(f"open/{folder_of(batch.tenant)}~{batch.id}")
    return read_state(tree, batch.tenant, batch.id)


def _write_files(tree: Tree, state: BatchState) -> tuple[str | None, str | None]:
    """The output and the error file, in the order of the lines. Their ids follow from the batch's:
    another replica that ends it, too, writes the same.
    """
    batch = state.batch
    base = "file-" + batch.id.removeprefix("batch_")
    _, done, failed = state.counts
    wanted = {DONE: (done, f"{base}-output"), FAILED: (failed, f"{base}-error")}
    ids = {kind: file_id for kind, (count, file_id) in wanted.items() if count}
    with ExitStack() as stack:
        targets: dict[bytes, IO[bytes]] = {
            kind: stack.enter_context(tree.writing(data_path(batch.tenant, file_id)))
            for kind, file_id in ids.items()
        }
        for row in _rows(tree, state):
            targets[row[:1]].write(row[1:])
    for file_id in ids.values():
        add(
            tree,
            batch.tenant,
            StoredFile(
                id=file_id,
                name=f"{batch.id}_{file_id.rpartition('-')[2]}.jsonl",
                purpose="batch_output",
                num_bytes=tree.size(data_path(batch.tenant, file_id)) or 0,
                created=int(time.time()),
            ),
        )
    return ids.get(DONE), ids.get(FAILED)


def _rows(tree: Tree, state: BatchState) -> Iterator[bytes]:
    folder = _folder(state.batch.tenant, state.batch.id)
    for number in sorted(state.parts):
        data = tree.read(f"{folder}/{state.parts[number]}")
        if data is None:
            raise FileNotFoundError(f"part {number} of a batch")
        yield from data.splitlines(keepends=True)


def _forget_oldest(tree: Tree, tenant: str, *, keep: Sequence[str]) -> None:
    ids = sorted(_ids(tree, tenant))
    for batch_id in [id_ for id_ in ids[: max(0, len(ids) - MAX_KEPT)] if id_ not in keep]:
        tree.remove(_folder(tenant, batch_id))


def _ids(tree: Tree, tenant: str) -> list[str]:
    return [name for name in tree.sizes(f"batches/{folder_of(tenant)}") if _ID.fullmatch(name)]


def _open(tree: Tree) -> list[tuple[str, str]]:
    markers = [name.rpartition("~") for name in tree.sizes("open")]
    found = [(unquote(folder.removeprefix("t-")), id_) for folder, _, id_ in markers]
    return sorted(found, key=lambda batch: batch[1])


def _folder(tenant: str, batch_id: str) -> str:
    return f"batches/{folder_of(tenant)}/{batch_id}"


def _json(value: Batch | BatchEnd) -> bytes:
    return orjson.dumps(asdict(value))
