"""Memory of the process, back to the system. The C library keeps what is freed, to use it again."""

from __future__ import annotations

import ctypes


def return_free_memory() -> None:
    """Returns freed memory to the system: hundreds of megabytes after loading weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others do not
    if trim is not None:
        trim(0)
