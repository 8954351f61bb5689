"""Laws of the engine over a compressed cache: blocks are freed, and no answer depends on when."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from model.batch import Batch, Ints, StepOutput
from model.compression import SINKS, Anchors, Window
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
from tests.support.fakes import EOS_ID, OracleRunner, OverlappedOracle

SMALL = Window(6)
NO_FLOATS, NO_ROWS = np.zeros(0, np.float32), np.zeros((0, 0), np.int32)


def digest_of(token: int, seen: list[int]) -> int:
    """What a token's keys and values stand for: all that it sees, and all that those saw."""
    return hash((token, *seen))


def choice(digest: int) -> int:
    """The token after one with this digest: often an anchor."""
    return EOS_ID if digest % 4 == 0 else digest % 90


def visible(tokens: list[int], position: int, policy: Window | Anchors) -> list[int]:
    """Earlier positions that a token sees, by the definition of the policy."""
    if isinstance(policy, Window):
        first = policy.first(position)
        return [p for p in range(position) if p < SINKS or p >= first]
    ends = [p for p in range(position) if tokens[p] == EOS_ID]
    own = range(ends[-1] + 1 if ends else 0, position)
    return [*own] if tokens[position] == EOS_ID else [*ends, *own]


def answer_of(request: GenerationRequest, policy: Window | Anchors) -> list[int]:
    """The answer from the request alone."""
    tokens, digests = list(request.prompt_ids), list[int]()
    while True:
        for position in range(len(digests), len(tokens)):
            seen = [digests[p] for p in visible(tokens, position, policy)]
            digests.append(digest_of(tokens[position], seen))
        if len(tokens) == request.max_total_tokens:
            return tokens[len(request.prompt_ids) :]
        tokens.append(choice(digests[-1]))


class WindowedOracle(OracleRunner):
    """Its pool holds digests; a token's is of those that it sees, read back through the tables."""

    exact = False

    def run(self, batch: Batch) -> StepOutput:
        """Stores the digests of the step's tokens in order of their positions."""
        if self._on_run is not None:
            self._on_run(batch)
        batch.check(block_size=self.block_size, num_blocks=self.num_blocks, vocab_size=97)
        owner = np.repeat(np.arange(batch.num_sequences), np.diff(batch.query_starts_S1)).tolist()
        stored: list[int] = []
        for row, position in enumerate(batch.positions_T.tolist()):
            table = batch.block_table_SB[owner[row]]
            seen = [self._pool[place] for place in self._read(batch, owner[row], row)]
            stored.append(digest_of(int(batch.tokens_T[row]), [int(each) for each in seen]))
            self._pool[self._place(table, position)] = stored[-1]
            self._stored(batch, owner[row], row, stored[-1])
        tokens = [choice(stored[row]) for row in batch.sample_rows_R.tolist()]
        return StepOutput(
            tokens_R=np.array(tokens, np.int32),
            logprobs_R=NO_FLOATS,
            top_ids_RN=NO_ROWS,
            top_logprobs_RN=NO_FLOATS.reshape(0, 0),
            score_logprobs_Q=NO_FLOATS,
            score_top_ids_QN=NO_ROWS,
            score_top_logprobs_QN=NO_FLOATS.reshape(0, 0),
        )

    def _place(self, table: Ints, entry: int) -> tuple[int, int]:
        return int(table[entry // self.block_size]), entry % self.block_size

    def _read(self, batch: Batch, sequence: int, row: int) -> list[tuple[int, int]]:
        position, table = int(batch.positions_T[row]), batch.block_table_SB[sequence]
        return [self._place(table, p) for p in visible([], position, SMALL)]

    def _stored(self, batch: Batch, sequence: int, row: int, digest: int) -> None:
        """Called with each digest."""


class AnchoredOracle(WindowedOracle):
    """The same over segments: earlier anchors are read by their numbers."""

    def _read(self, batch: Batch, sequence: int, row: int) -> list[tuple[int, int]]:
        assert batch.segments is not None
        own = range(int(batch.segments.starts_T[row]), int(batch.positions_T[row]))
        far = range(int(batch.segments.seen_T[row]))
        places = [self._place(batch.segments.table_SB[sequence], number) for number in far]
        return [*places, *(self._place(batch.block_table_SB[sequence], p) for p in own)]

    def _stored(self, batch: Batch, sequence: int, row: int, digest: int) -> None:
        assert batch.segments is not None
        for number in batch.segments.numbers_A[batch.segments.rows_A == row].tolist():
            self._pool[self._place(batch.segments.table_SB[sequence], number)] = digest


class OverlappedWindows(OverlappedOracle, WindowedOracle):
    """The same with steps that overlap."""


def make_long(
    name: str, *, prompt: list[int], max_tokens: int, tenant: str = "a"
) -> GenerationRequest:
    """A request that nothing but its length ends."""
    return make_request(name, prompt=prompt, max_tokens=max_tokens, tenant=tenant, ignore_eos=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "policy"),
    [(WindowedOracle, SMALL), (OverlappedWindows, SMALL), (AnchoredOracle, Anchors())],
)
def test_whatever_happens_around_it_a_compressed_request_gets_its_answer(
    kind: type[OracleRunner], policy: Window | Anchors
) -> None:
    """Random chats, under a window longer than the pool, in random pools and chunks: with
    preemptions, prefix hits, take-overs and blocks that others overwrite once they are dropped.
    """
    preemptions = recomputed = hits = 0
    for seed in range(15):
        draw = random.Random(seed)
        crowd = 0 if policy == SMALL else 6  # anchors need a pool for whole texts: few preemptions
        seats = crowd + draw.randint(1, 4)
        config = EngineConfig(
            max_sequences=seats,
            max_batch_tokens=seats + draw.randint(2, 10),
            max_prompt_chunk=draw.randint(1, 6),
            prefix_cache=draw.random() < 0.8,
            kv_compression=policy,
        )
        size = draw.choice([1, 2, 4])
        most = policy.most_slots(70, block_size=size, chunk=config.prompt_chunk)
        rig = Rig(
            config,
            kind=kind,
            num_blocks=-(-most // size) + draw.randint(0, 5),
            block_size=size,
            max_model_len=200,
        )
        requests = {}
        begins = [[draw.randrange(90) for _ in range(40)] for _ in range(2)]
        for index in range(crowd + draw.randint(2, 7)):
            prompt = [*draw.choice(begins)[: draw.randint(1, 40)], draw.randrange(90)]
            prompt = [EOS_ID if token % 17 == 0 else token for token in prompt]
            request = make_long(
                f"r{index}", prompt=prompt, max_tokens=draw.randint(1, 30), tenant=draw.choice("ab")
            )
            known = answer_of(request, policy)[: draw.choice([0, 0, 5])]
            if len(known) < request.max_tokens:
                requests[request.id] = request
                rig.add(request, tokens=tuple(known))
            for _ in range(draw.randint(0, 12)):
                rig.step()
        rig.run()
        for name, request in requests.items():
            assert rig.transcripts[name].ids == answer_of(request, policy), (seed, name)
        preemptions += rig.total("preemptions")
        recomputed += rig.total("recomputed_tokens")
        hits += rig.total("prefix_hit_tokens")
    assert min(preemptions, recomputed) >= 10
    assert (hits >= 10) is (policy == SMALL)


@pytest.mark.slow
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
            each = SMALL.most_slots(200, block_size=4, chunk=4) // 4
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


def test_blocks_of_finished_segments_are_free() -> None:
    """Texts of short sentences hold one slot for each of them, and the last one's tokens."""
    config = EngineConfig(
        max_sequences=8, max_batch_tokens=16, max_prompt_chunk=4, kv_compression=Anchors()
    )
    rig = Rig(config, kind=AnchoredOracle, num_blocks=100, block_size=4, max_model_len=200)
    prompt = [*range(1, 10), EOS_ID] * 10
    requests = [make_long(f"r{n}", prompt=[n, *prompt], max_tokens=30) for n in range(6)]
    transcripts = rig.run(*requests)
    for request in requests:
        assert transcripts[request.id].ids == answer_of(request, Anchors())
    plain = 6 * -(-130 // 4)
    assert max(report.running for report in rig.reports) == 6
    assert max(report.blocks_used for report in rig.reports) < plain // 2
    assert not rig.total("preemptions")
    with pytest.raises(BadRequest, match="exceed 200 tokens"):
        rig.loop._scheduler.add(make_long("long", prompt=prompt, max_tokens=101))


@pytest.mark.parametrize(("ends", "room"), [(True, 7), (False, 1)], ids=["sentences", "none"])
def test_room_counts_on_what_running_texts_hold(ends: bool, room: int) -> None:
    """A running text of short sentences leaves room for as many as the batch has slots; one without
    an end holds all, and so may the others: as at first, before the end of a sentence.
    """
    config = EngineConfig(
        max_sequences=8, max_batch_tokens=16, max_prompt_chunk=4, kv_compression=Anchors()
    )
    rig = Rig(config, kind=AnchoredOracle, num_blocks=100, block_size=4, max_model_len=200)
    prompt = [*range(1, 10), EOS_ID if ends else 10] * 15
    rig.add(make_long("r", prompt=prompt, max_tokens=30))
    rooms = []
    while not rig.transcripts["r"].ids:
        rig.step()
        rooms.append(rig.loop._scheduler.room)
    assert (rooms[0], rooms[-1]) == (2, room)


class Bits(Observer):
    """Answers of an engine over the torch runner, with their log probabilities."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[float]] = {}
        self.ends: dict[str, FinishReason] = {}
        self.preemptions = self.hits = 0

    def go(self, config: EngineConfig, works: list[Work], *, num_blocks: int) -> Bits:
        """Runs all requests to their ends on a runner of their own."""
        anchors = isinstance(config.kv_compression, Anchors)
        model = tiny_model_config(max_model_len=128 if anchors else 32)
        options = RunnerOptions(
            dtype="float32", device="cpu", block_size=4, num_blocks=num_blocks,
            kv_compression="anchors" if anchors else "window:20",
        )  # fmt: skip
        runner = TorchRunner(model, tiny_weights(model), options=options, digest="0" * 64)
        loop = EngineLoop(
            runner,
            config=config,
            token_bytes=tuple(bytes([byte]) for byte in range(97)),  # . and ! are among them
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


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("policy", "num_blocks"), [(Window(20), 20), (Anchors(), 40)])
def test_compressed_chats_are_their_singles(policy: Window | Anchors, num_blocks: int) -> None:
    """Texts of 90 tokens, under the window by a model of 32 positions: alone, together in small
    chunks, preempted, from the prefix cache, and taken over in the middle.
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
    plain = EngineConfig(max_sequences=8, prefix_cache=False, kv_compression=policy)
    alone = Bits()
    for work in works:
        alone.go(plain, [work], num_blocks=200)
    assert set(alone.ends.values()) == {FinishReason.LENGTH}
    crowded = replace(plain, max_batch_tokens=11, max_prompt_chunk=7, prefix_cache=True)
    together = Bits().go(crowded, works, num_blocks=num_blocks)
    assert together.preemptions > 0
    assert (together.hits > 0) is isinstance(policy, Window)
    begun = [replace(work, tokens=tuple(alone.tokens[work.request.id][:21])) for work in works]
    rest = Bits().go(crowded, begun, num_blocks=num_blocks)
    for name, tokens in alone.tokens.items():
        assert together.tokens[name] == tokens
        assert rest.tokens[name] == tokens[21:]
        np.testing.assert_allclose(together.logprobs[name], alone.logprobs[name], atol=1e-3)
        np.testing.assert_allclose(rest.logprobs[name], alone.logprobs[name][21:], atol=1e-3)
