"""The engine over the native runner: the same bits whatever happens to a request on its way."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from model.config import ModelConfig
from model.runners import Runner, overlapped
from model.runners.native import NativeRunner
from model.runners.turns import Turns, take_turns
from service.engine.cost import CostModel, StepWork
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer, StepReport
from service.engine.plan import EngineConfig
from service.messages import Event, GenerationRequest, SamplingParams, TokenLogprob, Tokens
from tests.support.builders import at_length, slowly, tiny_weights

BYTES = tuple(bytes([byte]) for byte in range(97))
LENGTH = 40  # tokens of each answer


class FreeRows(CostModel):
    """Rows cost next to nothing, whatever a clock says: as many drafts as there are."""

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learns nothing."""

    def seconds(self, work: StepWork) -> float:
        """All but the same for any step."""
        return 0.01 + work.tokens * 1e-6


@dataclass
class Run(Observer):
    """Answers requests and keeps all bits of what came out, and figures of the steps."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    preemptions: int = 0
    hits: int = 0
    drafts: int = 0

    def go(self, runner: Runner, config: EngineConfig, works: Sequence[Work]) -> Run:
        loop = EngineLoop(
            runner,
            config=config,
            cost=FreeRows(),
            token_bytes=BYTES,
            eos_ids=frozenset(),
            deliver=self._read,
            observer=self,
        )
        for work in works:
            loop.add(work)
            loop.step()
        while loop.step():
            loop.check_integrity()
        return self

    def stepped(self, report: StepReport) -> None:
        self.preemptions += len(report.preempted)
        self.hits += report.prefix_hit_tokens
        self.drafts += report.num_drafts

    def _read(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event.record, Tokens):
                self.tokens.setdefault(event.request_id, []).extend(event.record.ids)
                self.logprobs.setdefault(event.request_id, []).extend(event.record.logprobs)


def make_requests(seed: int) -> list[GenerationRequest]:
    """Greedy and sampled ones, some with penalties or without some tokens. Some begin alike, and
    all have something to copy.
    """
    draw = random.Random(seed)
    shared = [draw.randrange(97) for _ in range(48)]
    requests = []
    for index in range(7):
        own = [draw.randrange(97) for _ in range(draw.randint(1, 12))] * 2
        sampling = SamplingParams(
            seed=draw.randrange(2**64),
            temperature=draw.choice([0.0, 0.3, 1.0]),
            top_logprobs=3,
            frequency_penalty=0.7 if index % 3 == 2 else 0.0,
            repetition_penalty=1.2 if index % 4 == 1 else 1.0,
            allowed=tuple(range(3, 60)) if index == 4 else (),
            banned=((5, 6), (7,)) if index == 6 else (),
        )
        requests.append(
            GenerationRequest(
                id=f"r{index}",
                prompt_ids=(*(shared if index % 2 else ()), *own),
                max_tokens=LENGTH,
                sampling=sampling,
                ignore_eos=True,
            )
        )
    return requests


def hint(tokens: Sequence[int]) -> tuple[int, ...]:
    """What a client predicts: the answer, but for every ninth token."""
    return tuple(0 if place % 9 == 8 else token for place, token in enumerate(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["bfloat16", *slowly("int8")])
@pytest.mark.parametrize("seed", [0, *at_length(1, 2)])
def test_nothing_on_the_way_of_a_request_changes_a_bit(
    seed: int,
    kv_dtype: str,
    native_config: Callable[..., ModelConfig],
    native: Callable[..., NativeRunner],
) -> None:
    """Alone with one thread, a step at a time; then together with two, steps launched ahead, in
    small chunks, with drafts, from the prefix cache, preempted because blocks are short, and taken
    over from an engine that had begun.
    """
    config = native_config(vocab_size=97, max_model_len=256)
    weights = tiny_weights(config)
    requests = make_requests(seed)
    plain = EngineConfig(max_sequences=8, prefix_cache=False, speculate=False)
    alone = Run()
    single = take_turns(native(config, weights, num_threads=1, kv_dtype=kv_dtype), Turns())
    assert overlapped(single) is None
    for request in requests:
        alone.go(single, plain, [Work(request=request)])

    chunked = replace(plain, max_batch_tokens=8, max_prompt_chunk=7)
    crowded = EngineConfig(max_sequences=8, max_batch_tokens=48)
    works = [
        Work(request=replace(request, prediction=hint(alone.tokens[request.id])))
        for request in requests
    ]
    for engine in (chunked, crowded):
        runner = native(config, weights, num_threads=2, num_blocks=20, kv_dtype=kv_dtype)
        together = Run().go(runner, engine, works)
        assert together.tokens == alone.tokens
        assert together.logprobs == alone.logprobs
        assert together.preemptions > 0
        if engine is crowded:
            assert min(together.hits, together.drafts) > 0

    for taken in (1, 17, LENGTH - 1):
        begun = [
            replace(work, tokens=tuple(alone.tokens[work.request.id][:taken])) for work in works
        ]
        rest = Run().go(native(config, weights, kv_dtype=kv_dtype), crowded, begun)
        assert rest.tokens == {name: ids[taken:] for name, ids in alone.tokens.items()}
        assert rest.logprobs == {name: found[taken:] for name, found in alone.logprobs.items()}
