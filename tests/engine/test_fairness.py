"""A tenant's flood, and how long another waits for its first tokens: counted in steps, no clock.

Queue, engine loop, scheduler and blocks are the real ones, over the oracle; claims are made between
two steps. What the tenants ask for is a function of a seed, so that the two runs that are compared
differ by the flood alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from service.engine.plan import EngineConfig
from service.messages import GenerationRequest, Submission, Tokens, rolling_digest
from service.queues.contract import EngineInfo, Lease, QueueLimits, Write
from service.queues.memory.queue import MemoryQueue
from tests.engine.harness import Rig, make_request

CONFIG = EngineConfig(max_batch_tokens=32, max_sequences=8)
NUM_QUIET = 40
NUM_FLOOD = 300
INFO = EngineInfo(id="e", numeric_class="oracle", version="1")


def make_work(
    draw: random.Random, tenant: str, num: int, *, answer: int
) -> list[GenerationRequest]:
    """Requests of `answer` to 2 * `answer` tokens; no prompt begins as another does."""
    return [
        make_request(
            f"{tenant}{index}.0",
            prompt=[draw.randrange(90) for _ in range(draw.randint(4, 40))],
            max_tokens=draw.randint(answer, 2 * answer),
            sampling={"seed": draw.randrange(2**32)},
            tenant=tenant,
            ignore_eos=True,
        )
        for index in range(num)
    ]


class Service:
    """A queue and an engine; a step claims what there is room for, computes, journals ends."""

    def __init__(self, *, num_blocks: int) -> None:
        limits = QueueLimits(max_requests=1000, max_per_tenant=1000)
        self.queue = MemoryQueue(limits, clock=lambda: 0.0)
        self.rig = Rig(CONFIG, num_blocks=num_blocks)
        self.leases: dict[str, Lease] = {}

    async def submit(self, request: GenerationRequest) -> None:
        submission = Submission(id=request.id[:-2], tenant=request.tenant, requests=(request,))
        assert (await self.queue.submit(submission)).status == "ok"

    async def step(self) -> None:
        loop = self.rig.loop
        for claim in await self.queue.claim(
            INFO, limit=loop.room, under_served=loop.under_served_room, wait=0
        ):
            self.leases[claim.request.id] = claim.lease
            self.rig.add(claim.request)
        self.rig.step()
        for name in [name for name in self.leases if self.rig.ended(name)]:
            lease, answer = self.leases.pop(name), self.rig.transcripts[name]
            assert answer.end is not None
            ids = tuple(answer.ids)
            tokens = Tokens(start=0, ids=ids, text=answer.text, digest=rolling_digest(ids))
            replies = await self.queue.write([Write(lease, tokens), Write(lease, answer.end)])
            assert [reply.status for reply in replies] == ["ok", "ok"]

    def begun(self, name: str) -> bool:
        return name in self.rig.transcripts and bool(self.rig.transcripts[name].ids)


async def waits(
    quiet: Sequence[GenerationRequest], flood: Sequence[GenerationRequest], service: Service
) -> list[int]:
    """Steps from each quiet request's arrival to its first token, sorted."""
    for request in flood:
        await service.submit(request)
    draw = random.Random(len(quiet))
    arrivals = sorted(draw.randint(20, 20 + 7 * len(quiet)) for _ in quiet)
    coming = list(zip(arrivals, quiet, strict=True))
    waiting: dict[str, int] = {}
    found: list[int] = []
    for step in range(2000):
        while coming and coming[0][0] == step:
            request = coming.pop(0)[1]
            await service.submit(request)
            waiting[request.id] = step
        await service.step()
        begun = [name for name in waiting if service.begun(name)]
        found += [step + 1 - waiting.pop(name) for name in begun]
        if len(found) == len(quiet):
            return sorted(found)
    raise AssertionError("a sequence waits forever")


CASES = [
    (num, seed) for num in (200, 80) for seed in range(4)
]  # 80: blocks for six sequences or so


@pytest.mark.slow
@pytest.mark.parametrize(("num_blocks", "seed"), CASES)
async def test_a_flood_at_most_doubles_the_wait_of_others(num_blocks: int, seed: int) -> None:
    quiet = make_work(random.Random(seed), "quiet", NUM_QUIET, answer=4)
    flood = make_work(random.Random(seed + 1000), "flood", NUM_FLOOD, answer=12)
    alone = await waits(quiet, [], Service(num_blocks=num_blocks))
    service = Service(num_blocks=num_blocks)
    crowded = await waits(quiet, flood, service)
    p99 = -1 - len(quiet) // 100
    assert crowded[p99] <= 2 * alone[p99]
    assert sum(crowded) <= 2 * sum(alone)
    # It costs the flood little: as many sequences give way as others came, and all still go on.
    assert sum(len(report.preempted) for report in service.rig.reports) <= 2 * len(quiet)
    done = sum(transcript.end is not None for transcript in service.rig.transcripts.values())
    assert done >= 50
    assert service.rig.total("recomputed_tokens") <= service.rig.total("num_sampled") / 3


def make_prompt(name: str, tenant: str, length: int, *, answer: int = 4) -> GenerationRequest:
    prompt = [(length + position) % 90 for position in range(length)]
    return make_request(name, prompt=prompt, max_tokens=answer, tenant=tenant, ignore_eos=True)


def test_a_long_prompt_does_not_hold_up_another_s() -> None:
    """It needs ten more steps; a later one of another tenant needs two of these."""
    rig = Rig(CONFIG, num_blocks=200, max_model_len=400)
    rig.add(make_prompt("long", "one", 320))
    rig.step()
    rig.add(make_prompt("short", "two", 20))
    for _ in range(2):
        rig.step()
    assert rig.transcripts["short"].ids
    assert not rig.transcripts["long"].ids
    rig.run()


def test_where_memory_is_short_those_over_their_share_give_way() -> None:
    """The other tenant's sequence is the youngest of all, and would else be the first to go."""
    rig = Rig(CONFIG, num_blocks=40)
    for index in range(6):
        rig.add(make_prompt(f"flood{index}", "flood", 8 + index, answer=40))
    for _ in range(4):
        rig.step()
    rig.add(make_prompt("quiet", "quiet", 20, answer=30))
    rig.until(lambda: rig.ended("quiet"))
    given_way = [name for report in rig.reports for name in report.preempted]
    assert len(given_way) >= 2
    assert "quiet" not in given_way
    rig.run()


def test_whoever_gave_way_goes_on_although_others_keep_coming() -> None:
    """Another tenant fills its share again and again. What was there first and needs more than its
    own can give way, but once: from then on it is the first of all, which never does.
    """
    rig = Rig(CONFIG, num_blocks=40, max_model_len=160)
    rig.add(make_prompt("large", "one", 100, answer=40))  # most of the blocks
    for step in range(70):
        rig.step()
        rig.add(make_prompt(f"new{step}", "two", 36))
    given_way = [name for report in rig.reports for name in report.preempted]
    assert given_way.count("large") <= 1
    assert rig.ended("large")
    rig.run()
