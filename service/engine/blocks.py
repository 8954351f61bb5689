"""BlockAllocator: which KV blocks are in use. Ints and digests; tensors are in `model.kvcache`.

A block is `block_size` consecutive KV slots. Its states:

        take                    publish                     release (last table)
    BLANK ----> HELD, private ----------> HELD, findable -----------------------> CACHED
      ^           |                            ^                                 |      |
      |           | release                    +------------ take (prefix hit) --+      |
      +-----------+                                                                     |
      +----------------------- evicted, the least recently released first --------------+

The block table of a sequence, whose last block is never shared:

    tokens  0 ............. num_computed .... num_tokens
    blocks  [ full, findable ][ full ][ partly filled ]
              shared by digest  private until published

Digests are those of `service.prefixes`.

Invariants (`check_integrity`): blank, cached and held blocks are disjoint and together all; the
reference count of a block is the number of tables that hold it; a digest names one block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockAllocator:
    """Allocates blocks and shares full ones by digest. Not thread-safe."""

    def __init__(self, num_blocks: int, *, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError("num_blocks and block_size must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 is taken first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._digests: dict[int, bytes] = {}  # findable block -> digest
        self._found: dict[bytes, int] = {}  # and back

    @property
    def num_free(self) -> int:
        """Blank and cached blocks."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks with content for the prefix cache."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks in some table."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def is_findable(self, digest: bytes) -> bool:
        """Whether some block has this digest. May be called by any thread."""
        return digest in self._found

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks of the longest prefix of `digests` that is stored. They are not taken yet."""
        blocks: list[int] = []
        for digest in digests:
            block = self._found.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def look_up(self, digests: Iterable[bytes]) -> list[int | None]:
        """The block of each digest, or None. They are not taken yet."""
        return [self._found.get(digest) for digest in digests]

    def take(self, num_new: int, *, shared: Sequence[int] = ()) -> list[int] | None:
        """Takes the `shared` blocks (from `find`) and `num_new` blank ones; returns their table.

        Returns None and changes nothing if there are not enough.
        """
        revived = sum(1 for block in shared if not self._references[block])
        if num_new > self.num_free - revived:
            return None
        for block in shared:
            self._cached.pop(block, None)
            self._references[block] += 1
        return [*shared, *(self._take_blank() for _ in range(num_new))]

    def publish(self, block: int, digest: bytes) -> None:
        """Makes a held, full and computed block findable, unless its digest has a block already."""
        if digest not in self._found and block not in self._digests:
            self._found[digest] = block
            self._digests[block] = digest

    def release(self, table: Sequence[int]) -> None:
        """Releases a whole table, its tail first: prefixes, which many share, are evicted last."""
        for block in reversed(table):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._digests:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises RuntimeError if an invariant is violated; `tables` are all tables in use."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counts[block] += 1
        held = {block for block in range(self.num_blocks) if counts[block]}
        blank, cached = set(self._blank), set(self._cached)
        if counts != self._references:
            raise RuntimeError("reference counts differ from the tables")
        if len(self._blank) != len(blank) or blank & cached or held & (blank | cached):
            raise RuntimeError("a block is in two states")
        if len(blank) + len(cached) + len(held) != self.num_blocks:
            raise RuntimeError("a block is lost")
        if self._found != {digest: block for block, digest in self._digests.items()}:
            raise RuntimeError("digests and blocks do not map to one another")
        if blank & self._digests.keys() or cached - self._digests.keys():
            raise RuntimeError("a blank block has a digest, or a cached block has none")

    def _take_blank(self) -> int:
        """Takes a block for new content. The caller has checked that there is one."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._found[self._digests.pop(block)]
        self._references[block] = 1
        return block
