"""BlockTables: the block tables of sequences, from admission to release.

    columns   0 .. sinks | dropped .............. | window, and what is computed next |
    blocks    held         released                 held

Without compression of the cache nothing is dropped: a sequence has the blocks of all its tokens.
With it (`Retention`), a sequence has blocks for what later queries read and for its next step, so
it may be longer than the pool. A dropped column keeps a number in the table; it is not read. Under
`anchors` the table begins with what is dropped, and a second one has the anchors in their order;
prefixes are not shared, since they are no longer whole blocks of the text.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from dataclasses import dataclass

from model.compression import SINKS, Anchors, Compression, Window
from service.engine.adapters import Adapters
from service.engine.blocks import BlockAllocator
from service.engine.held import HeldPrefixes
from service.engine.sequence import Sequence, Source
from service.prefixes import chain_digest, chain_root, is_announced, source_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which columns a sequence needs. `chunk`: the most tokens of a sequence in a step."""

    compression: Compression | None
    block_size: int
    chunk: int
    anchor_ids: frozenset[int] = frozenset()

    def reach(self, num_tokens: int, *, computed: int) -> int:
        """Leading tokens that have a slot in the next step, if they are not dropped."""
        return num_tokens if self.compression is None else min(num_tokens, computed + self.chunk)

    def anchor_blocks(self, sequence: Sequence, *, reach: int) -> int:
        """Blocks of the anchors among the first `reach` tokens."""
        if not isinstance(self.compression, Anchors):
            return 0
        return -(-bisect_left(sequence.scan(self.anchor_ids), reach) // self.block_size)

    def dropped(self, sequence: Sequence) -> range:
        """Columns that no query from the first that is not computed on reads."""
        if isinstance(self.compression, Anchors):
            number = bisect_left(sequence.scan(self.anchor_ids), sequence.num_computed)
            start = sequence.anchors[number - 1] + 1 if number else 0
            return range(start // self.block_size)
        return self.outside(sequence.num_computed)

    def outside(self, computed: int) -> range:
        """Columns outside of the window of a query at position `computed`."""
        if not isinstance(self.compression, Window):
            return range(0)
        sinks = -(-SINKS // self.block_size)
        return range(sinks, max(sinks, self.compression.first(computed) // self.block_size))

    def most_slots(self, num_slots: int) -> int:
        """KV slots that a sequence holds at most, if it needs `num_slots` without compression."""
        if self.compression is None:
            return num_slots
        return self.compression.most_slots(num_slots, block_size=self.block_size, chunk=self.chunk)


class BlockTables:
    """Takes and releases the blocks of sequences; finds and publishes prefixes."""

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        retention: Retention,
        adapters: Adapters,
        prefix_cache: bool,
    ) -> None:
        self.held = HeldPrefixes(allocator)
        self._allocator = allocator
        self._retention = retention
        self._adapters = adapters
        self._prefix_cache = prefix_cache and not isinstance(retention.compression, Anchors)

    def longest(self, source: int) -> int:
        """Tokens of prompt and output that the pool has room for beside a source of so many tokens:
        the last one's KV is not kept.
        """
        retention, allocator = self._retention, self._allocator
        free = max(0, allocator.num_blocks - allocator.blocks_for(source))
        slots = free * allocator.block_size
        if retention.compression is None:
            return slots + 1
        most = retention.compression.longest_text(
            slots, block_size=retention.block_size, chunk=retention.chunk
        )
        return sys.maxsize if most is None else most + 1

    def most_slots(self, sequence: Sequence) -> int:
        """KV slots that a sequence can come to hold: the last token's KV is never stored.

        Under `anchors` no bound is known before the text is: they are those that it holds now for
        each token that is computed, times its tokens. If it then holds more, others wait, or are
        preempted.
        """
        most = self._retention.most_slots(sequence.max_total_tokens - 1)
        if not (isinstance(self._retention.compression, Anchors) and sequence.num_computed):
            return most
        held = sequence.num_held * self._allocator.block_size
        return min(most, held * sequence.max_total_tokens // sequence.num_computed)

    def blocks_to_begin(self, sequence: Sequence) -> int:
        """Blocks that a sequence takes at admission if it finds no prefix."""
        own = self._allocator.blocks_for(self._reach_to_begin(sequence, computed=0))
        return own + self._allocator.blocks_for(sequence.request.source)

    def open(self, sequence: Sequence) -> bool:
        """Takes the block table of a sequence to admit, as far as possible from the prefix cache.

        A hit never covers the last token: its logits are needed, and the cache has none. Returns
        False and changes nothing if blocks are short.
        """
        size = self._allocator.block_size
        source, read = sequence.source, self._found_source(sequence)
        num_findable = 0 if sequence.scores_prompt else (sequence.num_tokens - 1) // size
        if source is not None and not read:
            num_findable = 0  # what is computed from the source is found only together with it
        found = self._found(self._digests(sequence, num_findable))
        dropped = self._retention.outside(len(found) * size)
        shared = [*found[: dropped.start], *found[dropped.stop :]] if dropped else found
        reach = self._reach_to_begin(sequence, computed=len(found) * size)
        num_new = self._allocator.blocks_for(reach) - len(found)
        num_source = 0 if read else self._allocator.blocks_for(sequence.request.source)
        num_anchors = self._retention.anchor_blocks(sequence, reach=reach)
        num_fresh = num_source + num_new + num_anchors
        table = self._allocator.take(num_fresh, shared=[*read, *shared])
        if table is None:
            return False
        fresh = table[len(read) + len(shared) :]
        if source is not None:
            source.blocks, source.encoded = read or fresh[:num_source], bool(read)
        own = fresh[num_source:]
        sequence.blocks = [*found, *own[:num_new]]
        sequence.anchor_blocks = own[num_new:]
        sequence.dropped = dropped
        sequence.num_published = len(found)
        sequence.num_computed = len(found) * size
        return True

    def short(self, running: list[Sequence]) -> list[Sequence]:
        """The running sequences that lack blocks for their next step; drops what none reads."""
        if self._retention.compression is None:
            size = self._allocator.block_size
            return [s for s in running if s.num_tokens > size * len(s.blocks) and s.num_remaining]
        for sequence in running:
            self._drop_unread(sequence)
        return [s for s in running if any(self._missing(s)) and s.num_remaining]

    def extend(self, sequence: Sequence) -> bool:
        """Adds what a running sequence lacks. Returns False if blocks are short."""
        columns, anchors = self._missing(sequence)
        fresh = self._allocator.take(columns + anchors)
        if fresh is None:
            return False
        sequence.blocks += fresh[:columns]
        sequence.anchor_blocks += fresh[columns:]
        return True

    def _missing(self, sequence: Sequence) -> tuple[int, int]:
        """Blocks of its tokens and of its anchors that a sequence lacks for its next step."""
        retention = self._retention
        reach = retention.reach(sequence.num_tokens, computed=sequence.num_computed)
        columns = self._allocator.blocks_for(reach) - len(sequence.blocks)
        anchors = retention.anchor_blocks(sequence, reach=reach) - len(sequence.anchor_blocks)
        return max(0, columns), max(0, anchors)

    def _drop_unread(self, sequence: Sequence) -> None:
        """Releases the blocks that no later step of a running sequence reads."""
        before, after = sequence.dropped, self._retention.dropped(sequence)
        first = max(before.stop, after.start)
        if after.stop > first:
            self._allocator.release(sequence.blocks[first : after.stop])
            sequence.dropped = after

    def publish(self, sequence: Sequence) -> None:
        """Makes its full blocks findable, once they are computed."""
        num_full = sequence.num_computed // self._allocator.block_size
        digests = self._digests(sequence, num_full)
        prompt_end = (sequence.num_prompt - 1) // self._allocator.block_size
        for index in range(sequence.num_published, len(digests)):
            if index in sequence.dropped:
                continue
            self._allocator.publish(sequence.blocks[index], digests[index])
            if is_announced(index + 1) or index + 1 == prompt_end:
                self.held.note(digests[index])
        sequence.num_published = num_full

    def publish_source(self, sequence: Sequence, source: Source) -> None:
        """Lets others find the blocks of an encoded source, the last of which need not be full."""
        if not self._prefix_cache or not source.encoded:
            return
        digests = self._source_digests(sequence)
        for block, digest in zip(source.blocks, digests, strict=True):
            self._allocator.publish(block, digest)
        self.held.note(digests[0])

    def close(self, sequence: Sequence) -> None:
        """Releases a table."""
        if sequence.digests and sequence.num_published:
            self.held.note(sequence.digests[sequence.num_published - 1])
        self._allocator.release(sequence.held_blocks)
        sequence.blocks = []
        sequence.anchor_blocks = []
        sequence.dropped = range(0)
        if sequence.source is not None:
            sequence.source.blocks, sequence.source.encoded = [], False

    def _reach_to_begin(self, sequence: Sequence, *, computed: int) -> int:
        """Tokens and a first block of output, if it can need them."""
        tokens = min(
            sequence.num_tokens + self._allocator.block_size, sequence.max_total_tokens - 1
        )
        return self._retention.reach(tokens, computed=computed)

    def _found(self, digests: list[bytes]) -> list[int]:
        """Blocks of the longest prefix that is stored as far as later queries read it; a column
        that they do not read has any number. They are not taken yet.
        """
        if self._retention.compression is None:
            return self._allocator.find(digests)
        blocks = self._allocator.look_up(digests)
        run = 0  # stored blocks up to and with this column
        best = 0
        sinks = self._retention.outside(0).start
        for column, block in enumerate(blocks):
            run = 0 if block is None else run + 1
            length = column + 1
            dropped = self._retention.outside(length * self._allocator.block_size)
            if run >= length - dropped.stop and (run == length or None not in blocks[:sinks]):
                best = length
        return [0 if block is None else block for block in blocks[:best]]

    def _found_source(self, sequence: Sequence) -> list[int]:
        """The blocks of its source, which is found whole or not at all. Not taken yet."""
        if sequence.source is None or not self._prefix_cache:
            return []
        digests = self._source_digests(sequence)
        found = self._allocator.find(digests)
        return found if len(found) == len(digests) else []

    def _source_digests(self, sequence: Sequence) -> list[bytes]:
        """An encoder reads in both directions: each block depends on the whole source."""
        count = self._allocator.blocks_for(sequence.request.source)
        return source_blocks(self._root(sequence), count)

    def _digests(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """Digests of its first full blocks, hashed once and kept."""
        if not self._prefix_cache:
            return []
        size, digests = self._allocator.block_size, sequence.digests
        for index in range(len(digests), num_blocks):
            parent = digests[-1] if digests else self._root(sequence)
            digests.append(chain_digest(parent, sequence.tokens[index * size : (index + 1) * size]))
        return digests[:num_blocks]

    def _root(self, sequence: Sequence) -> bytes:
        root = chain_root(sequence.tenant, self._adapters.class_of(sequence.request))
        source = sequence.source
        return root if source is None else chain_digest(root, source.tokens)
