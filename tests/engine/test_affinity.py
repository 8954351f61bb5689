"""Prefix affinity in a simulated cluster: real queue and engines, chats of several turns, no clock.

Each round all engines claim, in an order drawn from the seed, and do one step; a round is 10 ms of
the simulated time. Engines announce what they hold once per second, as workers do.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from service.engine.blocks import BlockAllocator
from service.engine.held import MAX_HELD, HeldPrefixes
from service.engine.plan import EngineConfig
from service.messages import GenerationRequest, Submission, Tokens, rolling_digest
from service.prefixes import LAST_BLOCKS, chain_digest, chain_root, name_of, prompt_prefixes
from service.queues.contract import EngineInfo, Lease, QueueLimits, Write
from service.queues.memory.queue import MemoryQueue
from tests.engine.harness import Rig, expected, make_request

ROUND = 0.01
ANNOUNCED_EVERY = 100  # rounds
BLOCK_SIZE = 4
TENANT = "public"


@dataclass
class Engine:
    """An engine, and the leases of what it runs."""

    name: str
    rig: Rig
    leases: dict[str, Lease] = field(default_factory=dict)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            id=self.name, numeric_class="oracle", version="1", running=len(self.leases)
        )


@dataclass
class Chat:
    """A user who reads each answer, and writes on after some rounds."""

    name: str
    draw: random.Random
    prompt: list[int]
    turns: int
    due: int = 0  # the round of the next turn
    turn: int = 0
    open: GenerationRequest | None = None

    def next_request(self) -> GenerationRequest:
        self.open = make_request(
            f"{self.name}t{self.turn}.0",
            prompt=self.prompt,
            max_tokens=self.draw.randint(8, 20),
            tenant=TENANT,
            ignore_eos=True,
        )
        return self.open

    def read(self, answer: list[int], now: int) -> None:
        message = [self.draw.randrange(90) for _ in range(self.draw.randint(4, 16))]
        self.prompt, self.open = [*self.prompt, *answer, *message], None
        self.turn += 1
        self.due = now + self.draw.randint(100, 300)

    @property
    def is_over(self) -> bool:
        return self.turn == self.turns


class Cluster:
    """`named`: whether submissions name the prefixes of their prompts."""

    def __init__(self, draw: random.Random, *, engines: int, blocks: int, named: bool) -> None:
        self.draw = draw
        self.named = named
        self.round = 0
        self.queue = MemoryQueue(QueueLimits(), clock=lambda: self.round * ROUND)
        config = EngineConfig(max_batch_tokens=64, max_sequences=64 // engines)
        self.engines = [
            Engine(
                f"e{number}",
                Rig(config, num_blocks=blocks // engines, block_size=BLOCK_SIZE, max_model_len=512),
            )
            for number in range(engines)
        ]
        self.answers: dict[str, tuple[GenerationRequest, list[int]]] = {}
        self.hits = 0

    async def run(self, chats: list[Chat]) -> None:
        by_request = {}
        while not all(chat.is_over for chat in chats):
            for chat in chats:
                if not (chat.is_over or chat.open or chat.due > self.round):
                    request = chat.next_request()
                    by_request[request.id] = chat
                    await self.submit(request)
            for engine in self.draw.sample(self.engines, len(self.engines)):
                for request_id in await self.step(engine):
                    chat = by_request[request_id]
                    assert chat.open is not None
                    answer = engine.rig.transcripts[request_id]
                    self.answers[request_id] = (chat.open, answer.ids)
                    chat.read(answer.ids, self.round)
            self.round += 1
            if self.round % ANNOUNCED_EVERY == 0:
                for engine in self.engines:
                    await self.queue.hold(engine.name, engine.rig.loop.held_prefixes())
            assert self.round < 20_000

    async def submit(self, request: GenerationRequest) -> None:
        prefixes = prompt_prefixes(
            request.prompt_ids, tenant=TENANT, numeric_class="oracle", block_size=BLOCK_SIZE
        )
        submission = Submission(
            id=request.id[:-2],
            tenant=TENANT,
            requests=(request,),
            prefixes=(prefixes,) if self.named else (),
        )
        assert (await self.queue.submit(submission)).status == "ok"

    async def step(self, engine: Engine) -> list[str]:
        """Ids of the requests that ended."""
        rig, leases = engine.rig, engine.leases
        for claim in await self.queue.claim(engine.info, limit=rig.loop.room, wait=0):
            leases[claim.request.id] = claim.lease
            rig.add(claim.request)
        await self.queue.renew(list(leases.values()))
        rig.step()
        ended = [name for name in leases if rig.ended(name)]
        for name in ended:
            answer = rig.transcripts[name]
            assert answer.end is not None
            self.hits += answer.end.cached_tokens
            ids = tuple(answer.ids)
            tokens = Tokens(start=0, ids=ids, text=answer.text, digest=rolling_digest(ids))
            lease = leases.pop(name)
            replies = await self.queue.write([Write(lease, tokens), Write(lease, answer.end)])
            assert [reply.status for reply in replies] == ["ok", "ok"]
        return ended


async def hits(seed: int, *, engines: int, named: bool = True) -> tuple[int, Cluster]:
    """Prompt tokens found in prefix caches by the same chats; all have one beginning."""
    draw = random.Random(seed)
    system = [draw.randrange(90) for _ in range(24)]
    chats = [
        Chat(
            f"c{number}",
            random.Random(f"{seed} {number}"),
            [*system, *(draw.randrange(90) for _ in range(draw.randint(4, 24)))],
            turns=5,
            due=draw.randrange(300),
        )
        for number in range(12)
    ]
    cluster = Cluster(random.Random(seed), engines=engines, blocks=1600, named=named)
    await cluster.run(chats)
    return cluster.hits, cluster


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.longer) for n in (1, 2))])
async def test_four_engines_find_almost_what_one_finds(seed: int) -> None:
    """Without names they find much less, and each answer is the same in all cases."""
    one, alone = await hits(seed, engines=1)
    four, together = await hits(seed, engines=4)
    without, scattered = await hits(seed, engines=4, named=False)
    assert four >= 0.85 * one
    assert without < 0.75 * one
    for cluster in (alone, together, scattered):
        assert len(cluster.answers) == 12 * 5
        for request, ids in cluster.answers.values():
            assert ids == expected(request)[0]
    assert sum(bool(engine.rig.transcripts) for engine in together.engines) > 1


def test_a_prompt_names_its_last_blocks_and_powers_of_two() -> None:
    """As the engine hashes them, the longest first; none without the last token's block."""
    draw = random.Random(5)
    rig = Rig(num_blocks=600, block_size=BLOCK_SIZE, max_model_len=2000)
    for length in (1, 4, 5, 8, 9, 31, 200, 1500):
        prompt = [draw.randrange(90) for _ in range(length)]
        salts = {"tenant": TENANT, "numeric_class": "oracle"}
        names = prompt_prefixes(prompt, block_size=BLOCK_SIZE, **salts)
        blocks = (length - 1) // BLOCK_SIZE
        last = range(max(1, blocks - LAST_BLOCKS + 1), blocks + 1)
        named = {end for end in (*last, *(2**k for k in range(10))) if blocks / 4 <= end <= blocks}
        assert len(names) == len(named)
        # A longer prompt that begins so names it, too, and so does the engine that computed it.
        longer = prompt_prefixes([*prompt, *prompt[:30]], block_size=BLOCK_SIZE, **salts)
        assert not names or names[0] in longer
        rig.run(make_request(f"r{length}", prompt=prompt, tenant=TENANT, max_tokens=2))
        held = rig.loop.held_prefixes()
        assert not names or names[0] in held
        other = prompt_prefixes(prompt, tenant="other", numeric_class="oracle", block_size=4)
        assert not held & set(other), "tenants share nothing"


def test_what_was_evicted_is_not_announced() -> None:
    rig = Rig(num_blocks=16, block_size=BLOCK_SIZE)
    held = []
    for number in range(4):
        prompt = [number + 10] * 40
        rig.run(make_request(f"r{number}", prompt=prompt, tenant=TENANT, max_tokens=2))
        held.append(rig.loop.held_prefixes())
    assert not held[0] & held[-1]
    findable = {name_of(digest) for digest in rig.loop._allocator._found}
    assert held[-1] <= findable


def test_a_bounded_number_of_prefixes_is_announced() -> None:
    allocator = BlockAllocator(MAX_HELD + 9, block_size=1)
    held, digests = HeldPrefixes(allocator), []
    for block in allocator.take(MAX_HELD + 9) or []:
        digests.append(chain_digest(chain_root("t"), [block]))
        allocator.publish(block, digests[-1])
        held.note(digests[-1])
    assert held.names() == {name_of(digest) for digest in digests[9:]}
