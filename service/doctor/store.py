"""The stores: do they keep answers and files, and how fast does the queue's reply?"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from service.batches.storage import Tree, failures
from service.doctor import Finding, Level
from service.errors import StartupError
from service.jobs import files_url
from service.settings import Settings

if TYPE_CHECKING:
    from service.queues.redis.inspection import ServerState

SLOW = 0.002
"""Seconds: each token waits for one write."""
NEARLY_FULL = 0.8


def check_queue(settings: Settings) -> Iterator[Finding]:
    """One finding per server."""
    if urlsplit(settings.queue).scheme == "memory":
        yield Finding(
            "queue",
            "memory: answers end with the process",
            Level.NOTE,
            "for answers that survive it: --queue redis://HOST/0",
        )
        return
    from service.queues.redis.inspection import inspect

    try:
        states = asyncio.run(inspect(settings.queue))
    except StartupError as error:
        yield Finding("queue", str(error), Level.BAD, "correct --queue")
        return
    for number, state in enumerate(states, start=1):
        subject = "queue" if len(states) == 1 else f"queue, shard {number}"
        if state.fault:
            yield Finding(subject, "cannot be used", Level.BAD, state.fault)
            continue
        sync = f"synced: {state.fsync}" if state.fsync else "how it is synced is not shown"
        file = f"append-only file, {sync}" if state.append_only else "no append-only file"
        level, advice = _judged(state)
        yield Finding(
            subject,
            f"Redis or Valkey {state.version}, {file}, {state.latency * 1000:.1f} ms per write",
            level,
            advice,
        )


def check_files(settings: Settings) -> Finding:
    """Whether files and batches can be stored: writes an object and removes it."""
    url, name = files_url(settings), f"probe-{secrets.token_hex(8)}"
    scheme = urlsplit(url).scheme or "a folder"
    try:
        tree = Tree(url)
        tree.write(name, b"")
        kept = tree.remove(name)
    except failures() as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        if isinstance(error, ImportError):
            reason = "a package for this kind of URL is missing, such as s3fs for s3"
        advice = "uploads are refused with 503; name a folder or a bucket for them: --files"
        return Finding("files", f"{scheme}: {reason}", Level.NOTE, advice)
    if not kept:
        advice = "what is written must be readable at once, by all API replicas"
        return Finding("files", f"{scheme}: loses what is written", Level.BAD, advice)
    return Finding("files", f"{scheme}: can be written")


def _judged(state: ServerState) -> tuple[Level, str]:
    if not state.can_save:
        return Level.BAD, "it cannot write its append-only file: is its disk full?"
    if state.max_memory and state.used_memory > NEARLY_FULL * state.max_memory:
        share = state.used_memory / state.max_memory
        return (
            Level.NOTE,
            f"{share:.0%} of its maxmemory is used: it refuses requests when it is full",
        )
    if not state.append_only:
        return Level.NOTE, "its restart loses answers: set appendonly yes"
    if state.fsync == "no":
        return Level.NOTE, "the machine's crash may lose many seconds: set appendfsync everysec"
    if state.latency > SLOW:
        return Level.NOTE, "each token waits for a write: run it nearer, in the same zone"
    return Level.OK, ""
