"""Memory of the process, back to the system. The C library keeps what is freed, to use it again."""

from __future__ import annotations

import ctypes


def return_free_memory() -> None:
    """Gives back what is kept of loaded weights: hundreds of megabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others do not
    if trim is not None:
        trim(0)
