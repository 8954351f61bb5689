"""HeldPrefixes: the prefixes that an engine announces, so that requests with them come to it.

The engine's thread notes them as their blocks become findable; the worker reads which of them still
are. Bounded: of the prefixes that are held, those that were noted last.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from service.engine.blocks import BlockAllocator
from service.prefixes import name_of

MAX_HELD = 1024


class HeldPrefixes:
    """Reads `allocator`, and changes nothing in it."""

    def __init__(self, allocator: BlockAllocator) -> None:
        self._allocator = allocator
        self._lock = threading.Lock()
        self._digests: OrderedDict[bytes, None] = OrderedDict()  # last noted last

    def note(self, digest: bytes) -> None:
        """Announces the prefix that ends with this block."""
        with self._lock:
            self._digests[digest] = None
            self._digests.move_to_end(digest)
            if len(self._digests) > MAX_HELD:
                self._digests.popitem(last=False)

    def names(self) -> frozenset[str]:
        """Names of the prefixes whose last blocks are findable. May be called by any thread."""
        with self._lock:
            for digest in [d for d in self._digests if not self._allocator.is_findable(d)]:
                del self._digests[digest]
            return frozenset(map(name_of, self._digests))
