"""BlockAllocator against a naive model: which tables hold which blocks, and since when."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from service.engine.blocks import BlockAllocator
from service.prefixes import chain_digest, chain_root

NUM_BLOCKS = 6


def digests_of(prefix: str) -> list[bytes]:
    """One block a letter."""
    chain = [chain_root("tenant", "class")]
    for letter in prefix:
        chain.append(chain_digest(chain[-1], [ord(letter)]))
    return chain[1:]


class AllocatorMachine(RuleBasedStateMachine):
    """Tables are strings of letters; the model remembers contents and the order of releases."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(NUM_BLOCKS, block_size=1)
        self.tables: list[tuple[str, list[int]]] = []  # (letters published, blocks)
        self.content: dict[int, str] = {}  # findable block -> its whole prefix
        self.cached: list[int] = []  # free and findable, least recently released first

    @property
    def held(self) -> set[int]:
        return {block for _, table in self.tables for block in table}

    @rule(prompt=st.text("ab", max_size=5), extra=st.integers(0, 3))
    def take_and_publish(self, prompt: str, extra: int) -> None:
        digests = digests_of(prompt)
        shared = self.allocator.find(digests)
        by_content = {prefix: block for block, prefix in self.content.items()}
        known: list[int] = []
        while prompt[: len(known) + 1] in by_content and len(known) < len(prompt):
            known.append(by_content[prompt[: len(known) + 1]])
        assert shared == known
        num_new = len(prompt) - len(shared) + extra
        free_before = NUM_BLOCKS - len(self.held)
        fits = num_new + sum(block not in self.held for block in shared) <= free_before
        table = self.allocator.take(num_new, shared=shared)
        assert (table is not None) == fits
        if table is None:
            assert self.allocator.num_free == free_before
            return
        self.cached = [block for block in self.cached if block not in shared]
        fresh = table[len(shared) :]
        assert not set(fresh) & self.held
        evicted = [block for block in fresh if block in self.content]
        assert evicted == self.cached[: len(evicted)], "the least recently released go first"
        blank = NUM_BLOCKS - len(self.held | set(shared)) - len(self.cached)
        assert len(evicted) == max(0, num_new - blank), "and only when nothing else is left"
        for block in evicted:
            self.cached.remove(block)
            del self.content[block]
        for index in range(len(shared), len(prompt)):
            self.allocator.publish(table[index], digests[index])
            if prompt[: index + 1] not in self.content.values():
                self.content[table[index]] = prompt[: index + 1]
        self.tables.append((prompt, table))

    @rule(data=st.data())
    def release(self, data: Any) -> None:
        if not self.tables:
            return
        _, table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.allocator.release(table)
        for block in reversed(table):
            if block not in self.held and block in self.content:
                self.cached.append(block)

    @invariant()
    def books_agree(self) -> None:
        self.allocator.check_integrity(table for _, table in self.tables)
        assert self.allocator.num_used == len(self.held)
        assert self.allocator.num_free == NUM_BLOCKS - len(self.held)
        assert self.allocator.num_cached == len(self.cached)


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_a_chain_is_freed_from_its_tail() -> None:
    allocator = BlockAllocator(4, block_size=1)
    digests = digests_of("abcd")
    table = allocator.take(4)
    assert table is not None
    for block, digest in zip(table, digests, strict=True):
        allocator.publish(block, digest)
    allocator.release(table)
    for left in (3, 2, 1, 0):
        allocator.take(1)
        assert len(allocator.find(digests)) == left


def test_a_digest_tells_apart_tokens_predecessors_tenants_and_classes() -> None:
    root = chain_root("tenant", "class")
    roots = [root, chain_root("tenant", "clas"), chain_root("tenan", "tclass"), chain_root("t", "")]
    chains = [chain_digest(root, tokens) for tokens in ([1, 2], [2, 1], [1], [513], [1, 2, 0])]
    chains += [chain_digest(other, [1, 2]) for other in (*roots[1:], chains[0])]
    assert len({*roots, *chains}) == len(roots) + len(chains)
    assert all(len(digest) >= 16 for digest in chains)


@pytest.mark.parametrize("broken", ["reference", "lost", "doubled", "unnamed"])
def test_integrity_sees_what_is_broken(broken: str) -> None:
    allocator = BlockAllocator(4, block_size=1)
    table = allocator.take(2)
    assert table is not None
    allocator.publish(table[0], digests_of("a")[0])
    allocator.check_integrity([table])
    if broken == "reference":
        allocator._references[table[0]] += 1
    elif broken == "lost":
        allocator._blank.pop()
    elif broken == "doubled":
        allocator._blank.append(table[1])
    else:
        allocator._digests.clear()
    with pytest.raises(RuntimeError):
        allocator.check_integrity([table])


def test_sizes_below_one_are_refused() -> None:
    for num_blocks, block_size in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            BlockAllocator(num_blocks, block_size=block_size)
