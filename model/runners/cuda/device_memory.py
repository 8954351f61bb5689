"""How many KV blocks fit on a device: free memory, less what steps need, less a margin."""

from __future__ import annotations

GIB = 1024**3
MARGIN = GIB  # CUDA graphs, fragmentation, the driver's own


def check_weights_fit(needed: int, free: int | None) -> None:
    """Raises ValueError, with both sizes, if the weights alone do not fit."""
    if free is not None and needed + MARGIN > free:
        raise ValueError(
            f"the weights need {needed / GIB:.1f} GiB and the device has {free / GIB:.1f} GiB "
            "free: use a smaller model or dtype, or several GPUs with tensor_parallel"
        )


def blocks_that_fit(
    *, free: int | None, work: int, block_bytes: int, wanted: int | None, share: float | None
) -> int:
    """Blocks of the pool. Raises ValueError if a pool of that size would not leave room for steps.

    `free`: bytes free after the weights are loaded (None: unknown). `work`: bytes that the largest
    step needs. `wanted`: bytes for the pool, unless it takes a `share` of what is left.
    """
    room = None if free is None else free - work - MARGIN
    if room is not None and room < block_bytes:
        raise ValueError(
            f"no memory is left for a KV pool: {_gib(free)} GiB are free after the weights, the "
            f"largest step needs {_gib(work)}, and {_gib(MARGIN)} are kept as a margin: lower "
            "max_batch_tokens or max_sequences, or use a smaller model"
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
