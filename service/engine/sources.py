"""Sources of encoder-decoders: their blocks, the names of these, and their columns of a batch.

The encoder reads a source in both directions, so each block depends on the whole of it, and so do
the keys and values of the decoder's tokens. All digests begin with the source: a block is found for
the same source alone, and a source is found whole or not at all.

    digests   chain_root - source --+-- source's block 0, 1, ...
                                    +-- first block of the decoder's text - second - ...
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import numpy as np

from model.batch import SourceBatch
from service.engine.blocks import BlockAllocator
from service.engine.sequence import Sequence, Source
from service.errors import BadRequest
from service.messages import GenerationRequest
from service.prefixes import chain_digest, chain_root, source_blocks


def source_of(
    request: GenerationRequest, numeric_class: str, allocator: BlockAllocator
) -> Source | None:
    """The source of a request, if it has one."""
    if not request.source:
        return None
    tokens = request.prompt_ids[: request.source]
    root = chain_digest(chain_root(request.tenant, numeric_class), tokens)
    digests = source_blocks(root, allocator.blocks_for(len(tokens)))
    return Source(tokens=tokens, root=root, digests=digests)


def publish(allocator: BlockAllocator, source: Source) -> None:
    """Lets others find the blocks of an encoded source, the last of which need not be full."""
    for block, digest in zip(source.blocks, source.digests, strict=True):
        allocator.publish(block, digest)


def slots_of_text(request: GenerationRequest) -> int:
    """KV slots that a request can come to need beside its source's: the last token's KV is never
    stored.
    """
    return request.max_total_tokens - request.source - 1


def check_fits(
    request: GenerationRequest, allocator: BlockAllocator, *, max_model_len: int
) -> None:
    """Raises BadRequest for a request that this engine can never serve."""
    if len(request.prompt_ids) <= request.source:
        raise BadRequest("the prompt must have at least 1 token", code="empty_prompt")
    if request.max_tokens < 1:
        raise BadRequest("max_tokens must be at least 1", code="integer_below_min_value")
    num_blocks = allocator.num_blocks - allocator.blocks_for(request.source)
    slots = num_blocks * allocator.block_size
    longest = max(request.max_total_tokens - request.source, request.source)
    if longest > max_model_len or slots_of_text(request) > slots:
        raise BadRequest(
            f"prompt and max_tokens exceed {min(max_model_len, max(0, slots) + 1)} tokens",
            code="context_length_exceeded",
        )


def take_blocks(
    allocator: BlockAllocator,
    sequence: Sequence,
    digests: list[bytes],
    *,
    num_slots: int,
    cached: bool,
) -> int | None:
    """Takes the blocks of a sequence: those of its source, and its own for `num_slots` slots.

    Returns how many of its own were found by their digests; None if there are not enough blocks,
    and then nothing is taken. cached: whether a source is looked for in the prefix cache.
    """
    source = sequence.source
    count = 0 if source is None else len(source.digests)
    found = [] if source is None or not cached else allocator.find(source.digests)
    encoded = len(found) == count
    own = allocator.find(digests) if encoded else []
    shared = [*found, *own] if encoded else []
    total = count + allocator.blocks_for(num_slots)
    table = allocator.take(total - len(shared), shared=shared)
    if table is None:
        return None
    if source is not None:
        source.blocks, source.encoded = table[:count], encoded
    sequence.blocks = table[count:]
    return len(own)


def source_columns(sequences: Iterable[Sequence]) -> SourceBatch | None:
    """What a step needs of its sequences' sources; None for a decoder."""
    sources = [sequence.source for sequence in sequences if sequence.source is not None]
    if not sources:
        return None
    table = np.zeros((len(sources), max(len(source.blocks) for source in sources)), np.int32)
    for row, source in zip(table, sources, strict=True):
        row[: len(source.blocks)] = source.blocks
    new = [source for source in sources if not source.encoded]
    return SourceBatch(
        lens_S=np.array([len(source.tokens) for source in sources], np.int32),
        table_SB=table,
        is_new_S=np.array([not source.encoded for source in sources], np.bool_),
        tokens_U=np.fromiter(chain.from_iterable(source.tokens for source in new), np.int32),
    )
