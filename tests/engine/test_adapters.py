"""Adapters in the engine: batches name them, and the prefix cache and the class keep them apart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from model.batch import Batch
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer, StepReport
from service.engine.plan import EngineConfig
from service.messages import Event, GenerationRequest, ModelCard, Tokens
from service.prefixes import prompt_prefixes
from tests.engine.harness import CONFIG, make_request
from tests.support.fakes import EOS_IDS, TOKEN_BYTES, OracleRunner

BASE = ModelCard(
    id="base", max_model_len=64, vocab_size=97, numeric_class="oracle", created=0, vocabulary="v"
)


def adapter_of(name: str, digest: str) -> ModelCard:
    card = replace(BASE, id=name, parent=BASE.id, adapter=digest * 32)
    return card.of_class(BASE.numeric_class)


CARDS = [BASE, adapter_of("a", "11"), adapter_of("b", "22")]


@dataclass
class Watched(Observer):
    """An engine over a pool that remembers with which adapter each slot was computed."""

    config: EngineConfig = CONFIG
    blocks: int = 64
    hits: int = 0
    preemptions: int = 0
    seen: set[int] = field(default_factory=set)  # numbers of adapters in batches
    classes: dict[str, str] = field(default_factory=dict)  # of the answers

    def __post_init__(self) -> None:
        self._pool = np.full((self.blocks, 4), -1)
        runner = OracleRunner(num_blocks=self.blocks, on_run=self.ran)
        self.loop = EngineLoop(
            runner,
            config=self.config,
            token_bytes=TOKEN_BYTES,
            eos_ids=EOS_IDS,
            deliver=self.take,
            observer=self,
            clock=lambda: 0.0,
            adapters=CARDS[1:],
        )

    def ran(self, batch: Batch) -> None:
        """Each sequence reads only what was computed with its own adapter."""
        numbers: list[int] = batch.adapters_S.tolist() or [0] * batch.num_sequences
        self.seen |= set(numbers)
        starts, positions = batch.query_starts_S1, batch.positions_T
        for index, number in enumerate(numbers):
            table = batch.block_table_SB[index]
            own = positions[starts[index] : starts[index + 1]]
            self._pool[table[own // 4], own % 4] = number
            before = np.arange(int(batch.context_lens_S[index]))
            assert (self._pool[table[before // 4], before % 4] == number).all()

    def stepped(self, report: StepReport) -> None:
        self.hits += report.prefix_hit_tokens
        self.preemptions += report.preemptions

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event.record, Tokens) and not event.record.start:
                self.classes[event.request_id] = event.record.numeric_class

    def run(self, requests: Sequence[GenerationRequest]) -> Watched:
        for request in requests:
            self.loop.add(Work(request=request))
        while self.loop.step():
            self.loop.check_integrity()
        return self


@pytest.mark.parametrize("seed", range(6))
def test_no_sequence_reads_what_another_adapter_computed(seed: int) -> None:
    """Prompts begin alike, blocks are few: hits and preemptions, among requests of all models."""
    draw = random.Random(seed)
    shared = [draw.randrange(90) for _ in range(16)]
    requests = [
        make_request(
            f"r{index}",
            prompt=[*shared, *(draw.randrange(90) for _ in range(draw.randint(1, 8)))],
            max_tokens=draw.randint(4, 20),
            model=draw.choice([*(card.key for card in CARDS), ""]),
            ignore_eos=True,
        )
        for index in range(30)
    ]
    watched = Watched(blocks=20).run(requests)
    by_key = {card.key: card.numeric_class for card in CARDS} | {"": "oracle"}
    assert watched.classes == {each.id: by_key[each.model] for each in requests}
    assert watched.seen == {0, 1, 2}
    assert watched.hits > 0
    assert watched.preemptions > 0


def test_a_prefix_is_found_by_its_own_adapter_alone() -> None:
    """In the engine, and by the names under which API replicas look for engines."""
    prompt = list(range(20))
    watched = Watched()
    hits = []
    for name, card in enumerate([*CARDS, *CARDS]):
        before = watched.hits
        watched.run([make_request(f"r{name}", prompt=prompt, max_tokens=1, model=card.key)])
        hits.append(watched.hits - before)
    assert hits == [0, 0, 0, 16, 16, 16]
    held = watched.loop.held_prefixes()
    for card in CARDS:
        names = prompt_prefixes(
            prompt, tenant="public", numeric_class=card.numeric_class, block_size=4
        )
        assert set(names) & held


def test_keys_tell_adapters_apart() -> None:
    """By name, content and base: each other one is served by other engines."""
    card = adapter_of("a", "11")
    others = [BASE, adapter_of("b", "11"), adapter_of("a", "22"), replace(card, parent="other")]
    assert len({each.key for each in (card, *others)}) == len(others) + 1
    assert replace(card, numeric_class="elsewhere").key == card.key
