"""Laws of the engine over the oracle: an answer is a function of its request, of nothing else."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from service.engine.plan import EngineConfig
from service.messages import FinishReason, GenerationRequest
from tests.engine.harness import CONFIG, Rig, expected, make_request, random_request, renamed
from tests.support.fakes import (
    EOS_ID,
    VOCAB_SIZE,
    DeferringOracle,
    OracleRunner,
    OverlappedOracle,
    oracle_answer,
    oracle_logprob,
)


def make_long(name: str = "r", **fields: Any) -> GenerationRequest:
    """A request of 20 tokens that nothing ends early."""
    return make_request(name, **{"max_tokens": 20, "ignore_eos": True, **fields})


def random_config(draw: random.Random) -> EngineConfig:
    seats = draw.randint(1, 6)
    return EngineConfig(
        max_sequences=seats,
        max_batch_tokens=seats + draw.randint(0, 12),
        max_prompt_chunk=draw.randint(1, 9),
        patience=draw.randint(0, 3),
        prefix_cache=draw.random() < 0.8,
    )


@pytest.fixture(
    autouse=True,
    params=[OracleRunner, OverlappedOracle, DeferringOracle],
    ids=["", "overlapped", "deferring"],
)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[OracleRunner]:
    """What the engine runs on: no law knows whether steps overlap."""
    kind: type[OracleRunner] = request.param
    monkeypatch.setattr(Rig, "kind", kind)
    return kind


@pytest.mark.slow
def test_whatever_happens_around_it_a_request_gets_its_answer() -> None:
    """Random requests, limits, pools, arrivals, aborts, take-overs and, in half of the runs, drafts
    right and wrong; the sums at the end show that preemption, recomputation, cache hits, chunks and
    drafts of both kinds were really among them.
    """
    preemptions = recomputed = hits = chunks = accepted = rejected = 0
    for seed in range(50):
        draw = random.Random(seed)
        rig = Rig(
            random_config(draw),
            num_blocks=draw.randint(11, 16),
            block_size=4,
            reckless=random.Random(seed) if seed % 2 else None,
        )
        requests = [random_request(draw, f"r{index}") for index in range(draw.randint(1, 10))]
        waiting, aborted = list(requests), set()
        while waiting or rig.loop.busy:
            if waiting and draw.random() < 0.5:
                request = waiting.pop()
                known = oracle_known(request, draw)
                rig.add(request, tokens=known)
            if draw.random() < 0.03:
                victim = draw.choice(requests)
                if victim not in waiting and rig.transcripts[victim.id].end is None:
                    rig.loop.abort(victim.id)
                    aborted.add(victim.id)
            rig.step()
        rig.check_idle()
        for request in requests:
            if request.id not in aborted:
                check_answer(rig, request)
        preemptions += rig.total("preemptions")
        recomputed += rig.total("recomputed_tokens")
        hits += rig.total("prefix_hit_tokens")
        chunks += sum(not batch.is_decode for batch in rig.batches)
        accepted += rig.total("num_accepted")
        rejected += rig.total("num_drafts") - rig.total("num_accepted")
    assert min(preemptions, recomputed, hits, chunks) >= 10
    assert min(accepted, rejected) >= 50


def oracle_known(request: GenerationRequest, draw: random.Random) -> tuple[int, ...]:
    """Now and then an earlier engine had answered a part already, the whole at most."""
    whole = expected(request)[0]
    return tuple(whole[: draw.randint(0, len(whole))]) if draw.random() < 0.3 else ()


def check_answer(rig: Rig, request: GenerationRequest) -> None:
    ids, text, reason, stopped_by = expected(request)
    transcript = rig.transcripts[request.id]
    num_known = len(transcript.ids) - len(transcript.logprobs)
    assert (transcript.ids, *transcript.result[2:]) == (ids, reason, stopped_by)
    assert text.endswith(transcript.text)
    num_top = request.sampling.top_logprobs
    if num_top is not None:
        assert transcript.logprobs == [
            oracle_logprob((*request.prompt_ids, *ids[:index]), ids[index], num_top=num_top)
            for index in range(num_known, len(ids))
        ]
    if request.prompt_logprobs is not None and transcript.prompt_logprobs:
        prompt = request.prompt_ids
        assert transcript.prompt_logprobs == [
            None,
            *(
                oracle_logprob(prompt[:at], prompt[at], num_top=request.prompt_logprobs)
                for at in range(1, len(prompt))
            ),
        ]


@pytest.mark.slow
def test_batch_is_singles_and_order_and_priority_change_nothing() -> None:
    draw = random.Random(5)
    requests = [random_request(draw, f"r{index}") for index in range(17)]
    results = [expected(request) for request in requests]
    for order in (
        requests,
        requests[::-1],
        [replace(r, priority=2 - r.priority) for r in requests],
    ):
        transcripts = Rig(num_blocks=200).run(*order)
        assert [transcripts[request.id].result for request in requests] == results
    for request, result in zip(requests, results, strict=True):
        assert Rig().run(request)[request.id].result == result


@pytest.mark.parametrize("chunk", [1, 2, 7, 16])
def test_chunked_is_whole(chunk: int) -> None:
    request = make_long(prompt=range(30))
    rig = Rig(replace(CONFIG, max_prompt_chunk=chunk))
    assert rig.run(request)["r"].result == expected(request)
    assert rig.batches[0].num_tokens == chunk


def test_prefix_hit_is_miss() -> None:
    request = make_long(prompt=range(30))
    rig = Rig()
    rig.run(request)
    second = rig.run(renamed(request, "again"))["again"]
    assert second.result == expected(request)
    assert second.end is not None
    assert second.end.cached_tokens == 28  # 7 blocks of 4; the last tokens are computed
    assert rig.batches[-20].num_tokens == 2


def test_a_hit_never_covers_the_whole_prompt() -> None:
    request = make_long(prompt=range(8))
    rig = Rig()
    rig.run(request)
    second = rig.run(renamed(request, "again"))["again"]
    assert second.result == expected(request)
    assert second.end is not None
    assert second.end.cached_tokens == 4


def test_no_hit_crosses_tenants() -> None:
    request = make_long(prompt=range(30), tenant="a")
    rig = Rig()
    rig.run(request)
    rig.run(replace(request, id="other", tenant="b"))
    assert rig.total("prefix_hit_tokens") == 0


def test_an_answer_is_found_as_the_prefix_of_the_next_turn() -> None:
    first = make_long(prompt=range(6))
    rig = Rig()
    ids = rig.run(first)["r"].ids
    turn = make_request("turn", prompt=[*range(6), *ids, 5], max_tokens=4)
    second = rig.run(turn)["turn"]
    assert second.result == expected(turn)
    assert second.end is not None
    assert second.end.cached_tokens == 24


def test_prompt_log_probabilities_need_every_token_computed() -> None:
    plain = make_long(prompt=range(12))
    asking = replace(plain, id="asking", prompt_logprobs=2)
    rig = Rig()
    rig.run(plain)
    transcript = rig.run(asking)["asking"]
    assert transcript.result == expected(asking)
    assert rig.total("prefix_hit_tokens") == 0
    assert transcript.prompt_logprobs == [
        None,
        *(oracle_logprob(range(at), at, num_top=2) for at in range(1, 12)),
    ]


def test_preempted_is_not_preempted() -> None:
    """Three answers of 8 blocks each over a pool of 12: they must displace one another."""
    requests = [
        make_long(f"r{index}", prompt=[index] * 10, sampling={"seed": index}) for index in range(3)
    ]
    rig = Rig(num_blocks=12)
    transcripts = rig.run(*requests)
    assert rig.total("preemptions") > 0
    assert [transcripts[r.id].result for r in requests] == [expected(r) for r in requests]


@pytest.mark.slow
def test_a_take_over_at_any_token_continues_the_answer() -> None:
    for seed in range(12):
        request = random_request(random.Random(seed), "r")
        ids, text, reason, stopped_by = expected(request)
        undisturbed = Rig()
        undisturbed.run(request)
        for num in range(len(ids) + 1):
            rig, before = Rig(), Rig()
            before.add(request)
            while len(before.transcripts["r"].ids) < num:
                before.step()
            rig.add(request, tokens=tuple(ids[:num]))
            rig.run()
            after = rig.transcripts["r"]
            assert after.ids == ids
            assert before.transcripts["r"].text + after.text == text
            assert after.end is not None
            assert (after.end.reason, after.end.stopped_by) == (reason, stopped_by)
            assert bool(rig.batches) == (num < len(ids)), "a complete answer needs no step"


def test_length_is_exactly_max_tokens() -> None:
    for num in (1, 2, 9):
        request = make_request(max_tokens=num, ignore_eos=True)
        transcript = Rig().run(request)["r"]
        assert len(transcript.ids) == num
        assert transcript.end is not None
        assert transcript.end.reason is FinishReason.LENGTH


def test_a_request_as_large_as_the_pool_or_the_model_is_served() -> None:
    whole_pool = make_request(prompt=range(10), max_tokens=7, ignore_eos=True)  # 16 slots
    assert Rig(num_blocks=4).run(whole_pool)["r"].result == expected(whole_pool)
    whole_model = make_request(prompt=range(10), max_tokens=54, ignore_eos=True)
    assert Rig(max_model_len=64).run(whole_model)["r"].result == expected(whole_model)


@pytest.mark.parametrize(
    ("request_", "runner", "code"),
    [
        (
            make_request(prompt=range(10), max_tokens=8),
            {"num_blocks": 4},
            "context_length_exceeded",
        ),
        (make_request(prompt=range(10), max_tokens=55), {}, "context_length_exceeded"),
        (make_request(prompt=[]), {}, "empty_prompt"),
        (make_request(max_tokens=0), {}, "integer_below_min_value"),
        (make_request(prompt=[VOCAB_SIZE]), {}, "invalid_token_id"),
        (make_request(sampling={"logit_bias": ((-1, 1.0),)}), {}, "invalid_token_id"),
        (make_request(sampling={"seed": 2**64}), {}, "invalid_value"),
        (make_request(stop=("",)), {}, "invalid_value"),
    ],
)
def test_what_can_never_be_served_ends_with_an_error(
    request_: GenerationRequest, runner: dict[str, Any], code: str
) -> None:
    rig = Rig(**runner)
    good = make_request("good", max_tokens=4)
    transcripts = rig.run(request_, good)
    end = transcripts["r"].end
    assert end is not None
    assert (end.count, end.reason, end.error) == (0, FinishReason.ERROR, code)
    assert transcripts["good"].result == expected(good)


def test_min_tokens_forbids_the_end_and_ignore_eos_makes_it_text() -> None:
    plain = make_request(max_tokens=60, sampling={"seed": 1})
    ids = oracle_answer(plain)
    assert ids[-1] == EOS_ID, "this seed must end by itself"
    early = replace(plain, min_tokens=len(ids) + 3)
    forced = Rig().run(early)["r"]
    assert EOS_ID not in forced.ids[: len(ids) + 3]
    assert forced.result == expected(early)
    ignoring = replace(plain, ignore_eos=True)
    ignored = Rig().run(ignoring)["r"]
    assert ignored.ids[: len(ids)] == ids
    assert len(ignored.ids) == 60
    assert "<eos>" in ignored.text


def test_an_abort_frees_the_blocks_in_the_next_step_and_silences_the_request() -> None:
    rig = Rig()
    rig.add(make_long("stays"))
    rig.add(make_long("goes", prompt=range(20)))
    for _ in range(5):
        rig.step()
    before, told = rig.loop._allocator.num_used, len(rig.transcripts["goes"].ids)
    rig.loop.abort("goes")
    rig.loop.abort("unknown")
    rig.step()
    assert rig.loop._allocator.num_used <= before - 5
    rig.run()
    assert len(rig.transcripts["goes"].ids) == told
    assert rig.transcripts["goes"].end is None
    assert rig.transcripts["stays"].result == expected(make_long("stays"))


def test_an_abort_in_the_middle_of_a_step_silences_that_step() -> None:
    rig = Rig()
    rig.add(make_long())
    rig.step()
    rig.runner._on_run = lambda _batch: rig.loop.abort("r")
    told = len(rig.transcripts["r"].ids)
    rig.step()
    rig.runner._on_run = None
    rig.run()
    assert len(rig.transcripts["r"].ids) == told


def test_a_request_handed_in_again_replaces_the_earlier_one() -> None:
    request = make_long()
    rig = Rig()
    rig.add(request)
    for _ in range(4):
        rig.step()
    known = tuple(rig.transcripts["r"].ids)
    rig.add(request, tokens=known)
    rig.run()
    assert rig.transcripts["r"].ids == expected(request)[0]


def test_a_deadline_ends_the_request_at_the_next_step_running_or_waiting(
    kind: type[OracleRunner],
) -> None:
    now = 100.0
    rig = Rig(replace(CONFIG, max_sequences=1), clock=lambda: now)
    rig.add(make_long("running"), remaining_ms=2000)
    rig.add(make_long("waiting"), remaining_ms=1000)
    rig.add(make_long("patient"), remaining_ms=60_000)
    rig.step()
    now = 101.0
    rig.step()
    waiting = rig.transcripts["waiting"].end
    assert waiting is not None
    assert (waiting.count, waiting.reason) == (0, FinishReason.DEADLINE)
    assert not rig.ended("running")
    now = 102.0
    rig.step()
    running = rig.transcripts["running"].end
    assert running is not None
    read = 2 if kind is OracleRunner else 1  # of the two steps before
    assert (running.count, running.reason) == (read, FinishReason.DEADLINE)
    rig.run()
    assert rig.transcripts["patient"].result == expected(make_long("patient"))


def test_room_counts_seats_what_was_handed_in_and_blocks() -> None:
    rig = Rig(replace(CONFIG, max_sequences=4), num_blocks=16)
    assert rig.loop.room == 4
    rig.add(make_long("one", prompt=range(12)))  # 8 blocks at its end
    assert rig.loop.room == 3
    rig.step()
    assert rig.loop.room == 1, "12 of 16 blocks are free, enough for one more like it"
    rig.add(make_request("two", prompt=range(40), max_tokens=10))
    rig.step()
    assert rig.loop.room == 0, "a sequence waits for blocks"
    rig.run()
