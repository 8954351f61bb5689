"""Prefixes: digests of the beginnings of prompts, by which the prefix cache finds blocks, and the
few of them by which requests find engines.

A digest covers all tokens up to the end of its block, the tenant and the numeric class. It is a
chain of BLAKE2b-256, so that not even a forged collision can expose the KV of other tokens. The
queue gets *names*, the first 64 bits in hex: they only choose an engine.

    blocks of a prompt   1 2 . 4 . . . 8 . . . . . . . 16 . . . . . .
    an engine announces  powers of two, the end of the prompt, the end of the answer
    a request names      its last blocks, and powers of two from a quarter of the prompt on

So a chat finds the engine of its last turn, and a long common beginning one of its holders.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

MAX_BLOCKS = 512
"""Blocks of a prompt that are hashed to find an engine."""
LAST_BLOCKS = 32
"""Prefixes that end with each of the last blocks of a prompt are named."""
WORTH = 4
"""A prefix is named if it is at least one part in so many of the prompt."""
_DIGEST_BYTES = 32
_NAME_BYTES = 8


def chain_root(*salts: str) -> bytes:
    """The start of a chain of digests; chains with different salts never share a block."""
    root = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for salt in salts:
        encoded = salt.encode("utf-8", "surrogatepass")
        root.update(len(encoded).to_bytes(8, "little"))
        root.update(encoded)
    return root.digest()


def chain_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a full block whose predecessor (or root) has the digest `parent`."""
    return hashlib.blake2b(
        parent + array("q", tokens).tobytes(), digest_size=_DIGEST_BYTES
    ).digest()


def name_of(digest: bytes) -> str:
    """The name of a prefix in the queue."""
    return digest[:_NAME_BYTES].hex()


def is_announced(num_blocks: int) -> bool:
    """Whether engines announce every prefix of this length: powers of two, at most `MAX_BLOCKS`."""
    return num_blocks <= MAX_BLOCKS and num_blocks & (num_blocks - 1) == 0


def source_blocks(root: bytes, count: int) -> list[bytes]:
    """Digests of the blocks of a source, all of which `root` covers."""
    parent = chain_digest(root, ())  # no block of a text is empty: its digests are others
    return [chain_digest(parent, (index,)) for index in range(count)]


def source_prefix(source: Sequence[int], *, tenant: str, numeric_class: str) -> tuple[str, ...]:
    """The name of a source, which is found whole or not at all."""
    root = chain_digest(chain_root(tenant, numeric_class), source)
    return (name_of(source_blocks(root, 1)[0]),)


def prompt_prefixes(
    tokens: Sequence[int], *, tenant: str, numeric_class: str, block_size: int
) -> tuple[str, ...]:
    """Names of the prefixes of a prompt that are worth finding an engine for, longest first.

    At most `LAST_BLOCKS` and two more. Without the last token, whose logits are always computed.
    """
    num_blocks = min((len(tokens) - 1) // block_size, MAX_BLOCKS)
    digest, names = chain_root(tenant, numeric_class), list[str]()
    for end in range(1, num_blocks + 1):
        digest = chain_digest(digest, tokens[(end - 1) * block_size : end * block_size])
        if WORTH * end >= num_blocks and (end > num_blocks - LAST_BLOCKS or is_announced(end)):
            names.append(name_of(digest))
    return tuple(reversed(names))
