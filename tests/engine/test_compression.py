"""Laws of the engine over a compressed cache: blocks are freed, and no answer depends on when."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.batch import Batch, StepOutput
from model.compression import SINKS, Window
from model.runners import RunnerOptions
from model.runners.torch import TorchRunner
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer, StepReport
from service.engine.plan import EngineConfig
from service.errors import BadRequest
from service.messages import End, Event, FinishReason, GenerationRequest, SamplingParams, Tokens
from service.startup import longest_text
from tests.engine.harness import Rig, make_request
from tests.support.builders import tiny_model_config, tiny_weights
from tests.support.fakes import OracleRunner, OverlappedOracle

SMALL = Window(6)
NO_FLOATS, NO_ROWS = np.zeros(0, np.float32), np.zeros((0, 0), np.int32)


def digest_of(token: int, seen: list[int]) -> int:
    """What a token's keys and values stand for: all that it sees, and all that those saw."""
    return hash((token, *seen))


def answer_of(request: GenerationRequest, window: Window) -> list[int]:
    """The answer from the request alone: the window as a mask over positions."""
    tokens, digests = list(request.prompt_ids), list[int]()
    while True:
        for position in range(len(digests), len(tokens)):
            first = window.first(position)
            seen = [d for p, d in enumerate(digests) if p < SINKS or p >= first]
            digests.append(digest_of(tokens[position], seen))
        if len(tokens) == request.max_total_tokens:
            return tokens[len(request.prompt_ids) :]
        tokens.append(digests[-1] % 90)


class WindowedOracle(OracleRunner):
    """Its pool holds digests; a token's is of those that it sees, read back through the table."""

    exact = False
    window = SMALL

    def run(self, batch: Batch) -> StepOutput:
        """Stores the digests of the step's tokens in order of their positions."""
        if self._on_run is not None:
            self._on_run(batch)
        batch.check(block_size=self.block_size, num_blocks=self.num_blocks, vocab_size=97)
        owner = np.repeat(np.arange(batch.num_sequences), np.diff(batch.query_starts_S1)).tolist()
        stored = []
        for row, position in enumerate(batch.positions_T.tolist()):
            table = batch.block_table_SB[owner[row]]
            first = self.window.first(position)
            seen = [
                int(self._pool[table[p // self.block_size], p % self.block_size])
                for p in range(position)
                if p < SINKS or p >= first
            ]
            stored.append(digest_of(int(batch.tokens_T[row]), seen))
            self._pool[table[position // self.block_size], position % self.block_size] = stored[-1]
        tokens = [stored[row] % 90 for row in batch.sample_rows_R.tolist()]
        return StepOutput(
            tokens_R=np.array(tokens, np.int32),
            logprobs_R=NO_FLOATS,
            top_ids_RN=NO_ROWS,
            top_logprobs_RN=NO_FLOATS.reshape(0, 0),
            score_logprobs_Q=NO_FLOATS,
            score_top_ids_QN=NO_ROWS,
            score_top_logprobs_QN=NO_FLOATS.reshape(0, 0),
        )


class OverlappedWindows(OverlappedOracle, WindowedOracle):
    """The same with steps that overlap."""


def make_long(
    name: str, *, prompt: list[int], max_tokens: int, tenant: str = "a"
) -> GenerationRequest:
    """A request that nothing but its length ends."""
    return make_request(name, prompt=prompt, max_tokens=max_tokens, tenant=tenant, ignore_eos=True)


@pytest.mark.parametrize("kind", [WindowedOracle, OverlappedWindows])
def test_whatever_happens_around_it_a_windowed_request_gets_its_answer(
    kind: type[OracleRunner],
) -> None:
    """Random chats longer than the pool, in random pools and chunks: with preemptions, prefix
    hits, take-overs and blocks that others overwrite as soon as they are dropped.
    """
    preemptions = recomputed = hits = 0
    for seed in range(30):
        draw = random.Random(seed)
        seats = draw.randint(1, 4)
        config = EngineConfig(
            max_sequences=seats,
            max_batch_tokens=seats + draw.randint(2, 10),
            max_prompt_chunk=draw.randint(1, 6),
            prefix_cache=draw.random() < 0.8,
            kv_compression=SMALL,
        )
        size = draw.choice([1, 2, 4])
        most = SMALL.most_slots(block_size=size, chunk=config.prompt_chunk)
        rig = Rig(
            config,
            kind=kind,
            num_blocks=-(-most // size) + draw.randint(0, 5),
            block_size=size,
            max_model_len=200,
        )
        requests = {}
        begins = [[draw.randrange(90) for _ in range(40)] for _ in range(2)]
        for index in range(draw.randint(2, 7)):
            prompt = [*draw.choice(begins)[: draw.randint(1, 40)], draw.randrange(90)]
            request = make_long(
                f"r{index}", prompt=prompt, max_tokens=draw.randint(1, 30), tenant=draw.choice("ab")
            )
            known = answer_of(request, SMALL)[: draw.choice([0, 0, 5])]
            if len(known) < request.max_tokens:
                requests[request.id] = request
                rig.add(request, tokens=tuple(known))
            for _ in range(draw.randint(0, 12)):
                rig.step()
        rig.run()
        for name, request in requests.items():
            assert rig.transcripts[name].ids == answer_of(request, SMALL), (seed, name)
        preemptions += rig.total("preemptions")
        recomputed += rig.total("recomputed_tokens")
        hits += rig.total("prefix_hit_tokens")
    assert min(preemptions, recomputed, hits) >= 10


def test_blocks_outside_of_the_window_are_free() -> None:
    """One chat of 150 tokens holds what sinks, window and step need; the pool has room for others,
    and no more of them run at once without the window.
    """
    config = EngineConfig(
        max_sequences=8, max_batch_tokens=16, max_prompt_chunk=4, prefix_cache=False
    )
    together = {}
    for window in (SMALL, None):
        kind = OracleRunner if window is None else WindowedOracle
        rig = Rig(
            replace(config, kv_compression=window),
            kind=kind, num_blocks=40, block_size=4, max_model_len=200,
        )  # fmt: skip
        rig.run(*(make_long(f"r{n}", prompt=[n] * 40, max_tokens=110) for n in range(8)))
        together[window] = max(report.running for report in rig.reports)
        if window is not None:
            each = SMALL.most_slots(block_size=4, chunk=4) // 4
            assert max(report.blocks_used for report in rig.reports) <= 8 * each
            assert not rig.total("preemptions")
            assert {len(transcript.ids) for transcript in rig.transcripts.values()} == {110}
    assert together[SMALL] == 8
    assert rig.total("preemptions") > 0


def test_a_chat_longer_than_the_pool_is_accepted_and_finds_its_beginning() -> None:
    """Its prefix is found although blocks of the middle were evicted: the sinks' and the window's
    are enough.
    """
    config = EngineConfig(
        max_sequences=1, max_batch_tokens=4, max_prompt_chunk=4, kv_compression=SMALL
    )
    rig = Rig(config, kind=WindowedOracle, num_blocks=9, block_size=4, max_model_len=200)
    first = make_long("first", prompt=list(range(80)), max_tokens=20)
    assert rig.run(first)["first"].ids == answer_of(first, SMALL)
    again = make_long("again", prompt=[*range(80), *rig.transcripts["first"].ids, 7], max_tokens=5)
    assert rig.run(again)["again"].ids == answer_of(again, SMALL)
    end = rig.transcripts["again"].end
    assert end is not None
    assert end.cached_tokens == 96
    with pytest.raises(BadRequest, match="exceed 200 tokens"):
        rig.loop._scheduler.add(make_long("long", prompt=list(range(80)), max_tokens=121))


def test_the_context_in_the_api_is_that_of_the_window() -> None:
    """Limited by the pool only if it cannot hold a window and a step."""
    plain = RunnerOptions(block_size=16, max_batch_tokens=512)
    assert longest_text(plain, num_blocks=10) == 160
    windowed = replace(plain, kv_compression="window:1000")
    assert longest_text(windowed, num_blocks=98) is None
    assert longest_text(windowed, num_blocks=97) == 97 * 16


class Bits(Observer):
    """Answers of an engine over the torch runner, with their log probabilities."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[float]] = {}
        self.ends: dict[str, FinishReason] = {}
        self.preemptions = self.hits = 0

    def go(self, config: EngineConfig, works: list[Work], *, num_blocks: int) -> Bits:
        """Runs all requests to their ends on a runner of their own."""
        model = tiny_model_config(max_model_len=32)
        options = RunnerOptions(
            dtype="float32", device="cpu", block_size=4, num_blocks=num_blocks,
            kv_compression="window:20",
        )  # fmt: skip
        runner = TorchRunner(model, tiny_weights(model), options=options, digest="0" * 64)
        loop = EngineLoop(
            runner,
            config=config,
            token_bytes=tuple(bytes([byte]) for byte in range(97)),
            eos_ids=frozenset(),
            deliver=self._read,
            observer=self,
        )
        for work in works:
            loop.add(work)
        while loop.step():
            loop.check_integrity()
        return self

    def stepped(self, report: StepReport) -> None:
        self.preemptions += len(report.preempted)
        self.hits += report.prefix_hit_tokens

    def _read(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event.record, Tokens):
                self.tokens.setdefault(event.request_id, []).extend(event.record.ids)
                self.logprobs.setdefault(event.request_id, []).extend(
                    each.logprob for each in event.record.logprobs
                )
            elif isinstance(event.record, End):
                self.ends[event.request_id] = event.record.reason


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of torch wait for one another, and on a busy machine each wait is long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_chats_beyond_the_models_context_go_on_and_are_their_singles() -> None:
    """A model of 32 positions answers texts of 90 tokens: alone, together in small chunks,
    preempted, from the prefix cache, and taken over in the middle.
    """
    draw = random.Random(3)
    begin = [draw.randrange(97) for _ in range(60)]
    works = [
        Work(
            request=GenerationRequest(
                id=f"r{index}",
                prompt_ids=(*begin[: 12 * index], index, 5),
                max_tokens=40,
                ignore_eos=True,
                sampling=SamplingParams(seed=index, temperature=0.7, top_logprobs=0),
            )
        )
        for index in range(5)
    ]
    window = Window(20)
    plain = EngineConfig(max_sequences=8, prefix_cache=False, kv_compression=window)
    alone = Bits()
    for work in works:
        alone.go(plain, [work], num_blocks=200)
    assert set(alone.ends.values()) == {FinishReason.LENGTH}
    crowded = replace(plain, max_batch_tokens=11, max_prompt_chunk=7, prefix_cache=True)
    together = Bits().go(crowded, works, num_blocks=20)
    assert min(together.preemptions, together.hits) > 0
    begun = [replace(work, tokens=tuple(alone.tokens[work.request.id][:21])) for work in works]
    rest = Bits().go(crowded, begun, num_blocks=20)
    for name, tokens in alone.tokens.items():
        assert together.tokens[name] == tokens
        assert rest.tokens[name] == tokens[21:]
        np.testing.assert_allclose(together.logprobs[name], alone.logprobs[name], atol=1e-3)
        np.testing.assert_allclose(rest.logprobs[name], alone.logprobs[name][21:], atol=1e-3)
