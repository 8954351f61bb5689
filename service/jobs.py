"""Where files and batches are, and their limits, by the settings."""

from __future__ import annotations

import hashlib
from pathlib import Path

from service.batches.files import FileLimits
from service.batches.jobs import JobLimits
from service.settings import Settings


def files_url(settings: Settings) -> str:
    """The place of files and batches. By default only processes with one queue share it; a process
    with a queue of its own and no port of its own keeps them in memory.
    """
    url = settings.files
    if url is None:
        name = str(settings.port)
        if not settings.is_embedded:
            name = hashlib.sha256(settings.queue.encode()).hexdigest()[:16]
        elif not settings.port:
            return JobLimits().url
        url = str(settings.cache_dir / "files" / name)
    return url if "://" in url else str(Path(url).expanduser().absolute())


def job_limits(settings: Settings) -> JobLimits:
    """Returns the place and the limits of files and batches."""
    return JobLimits(
        url=files_url(settings),
        files=FileLimits(
            max_bytes=settings.max_file,
            max_files=settings.max_tenant_files,
            max_total_bytes=settings.max_tenant_file_bytes,
        ),
        max_open=settings.max_open_batches,
        window=settings.batch_window,
        max_line_bytes=settings.max_body,
    )
