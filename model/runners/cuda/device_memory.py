"""How much of a device the KV pool may have: what is free, less what steps need, less a margin."""

from __future__ import annotations

GIB = 1024**3
MARGIN = GIB  # recorded graphs, fragmentation, the driver's own


def check_weights_fit(needed: int, free: int | None) -> None:
    """Raises ValueError, with both sizes, where the weights alone do not fit."""
    if free is not None and needed + MARGIN > free:
        raise ValueError(
            f"the weights need {needed / GIB:.1f} GiB and the device has {free / GIB:.1f} GiB "
            "free: take a smaller model or dtype, or share it among GPUs with tensor_parallel"
        )


def blocks_that_fit(
    *, free: int | None, work: int, block_bytes: int, wanted: int | None, share: float | None
) -> int:
    """Blocks of the pool. Raises ValueError where a pool of that size would not leave room.

    `free`: bytes after the weights are loaded (None: not measured). `work`: bytes that the largest
    step needs. `wanted`: bytes for the pool, unless `share` of what is left may be taken.
    """
    room = None if free is None else free - work - MARGIN
    if room is not None and room < block_bytes:
        raise ValueError(
            f"no memory is left for a KV pool: {_gib(free)} GiB are free beside the weights, the "
            f"largest step needs {_gib(work)}, and {_gib(MARGIN)} are kept as a margin: lower "
            "max_batch_tokens or max_sequences, or take a smaller model"
        )
    if share is not None and room is not None:
        return int(room * share) // block_bytes
    if wanted is None or wanted < block_bytes:
        raise ValueError(f"kv_memory must be at least {block_bytes} bytes, which is one block")
    if room is not None and wanted > room:
        raise ValueError(
            f"kv_memory is {_gib(wanted)} GiB and at most {_gib(room)} GiB fit on the device"
        )
    return wanted // block_bytes


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / GIB:.2f}"
