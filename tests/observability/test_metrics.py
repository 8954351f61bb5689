"""The figures add up, are never stale, and are the same under any name."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.api.http.observer import CallReport
from service.cluster import Cluster
from service.engine.loop import EngineLoop
from service.engine.observer import StepReport
from service.engine.plan import EngineConfig
from service.errors import Unavailable
from service.messages import End, FinishReason, ModelCard, model_feature
from service.observability.metrics import Metrics
from service.observability.queue_gauges import STALE_AFTER
from service.queues.contract import (
    FINAL_SILENCE,
    Claim,
    EngineInfo,
    Lease,
    ModelDepth,
    Queue,
    QueueDepth,
    QueueLimits,
    SubmitStatus,
    Write,
    WriteReply,
)
from service.queues.memory.queue import MemoryQueue
from service.queues.redis.queue import RedisQueue
from service.queues.redis.servers import shards_of
from service.worker.worker import Worker
from tests.cluster.redis_process import RedisServer
from tests.queues.builders import (
    be_patient,
    claim_one,
    finish,
    make_engine,
    make_submission,
    stop_at,
)
from tests.support.fakes import EOS_IDS, TOKEN_BYTES, OracleRunner
from tests.support.waiting import PATIENCE

MODEL = "tiny"
CARD = ModelCard(id=MODEL, max_model_len=64, vocab_size=97, numeric_class="guess", created=0)
LIMITS = QueueLimits(max_requests=40, max_per_tenant=40, lease=2.0, max_attempts=2, live_ttl=50.0)
NEVER_COMPUTED: dict[str, Any] = dict.fromkeys(StepReport.__dataclass_fields__, 0)


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample as Prometheus reads it: name, or name{label="value",...}, to value."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def total(*processes: Metrics, name: str) -> float:
    """The sum over all processes and labels."""
    return sum(
        sample.value
        for metrics in processes
        for family in metrics.registry.restricted_registry([name]).collect()
        for sample in family.samples
        if sample.name == name
    )


class Clock:
    """A clock set by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# --- conservation -------------------------------------------------------------------------------
class Walk:
    """Random calls of a queue, reported to a Metrics as an API and its engines would."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.clock = Clock()
        self.metrics = Metrics(clock=self.clock)
        self.metrics.serves(CARD)
        self.queue = MemoryQueue(LIMITS, clock=self.clock, observer=self.metrics)
        self.claims: list[Claim] = []
        self.known: list[str] = []

    async def submit(self) -> None:
        submission = make_submission(
            self.draw.randint(1, 3),
            grace=self.draw.choice([None, 0.5]),
            timeout_ms=self.draw.choice([None, 700]),
        )
        if (await self.queue.submit(submission)).status is SubmitStatus.OK:
            self.metrics.call_accepted(len(submission.requests), MODEL)
            self.known.append(submission.id)

    async def claim(self) -> None:
        engine = make_engine(self.draw.choice("ab"))
        self.claims += await self.queue.claim(engine, limit=self.draw.randint(0, 3), wait=0)

    async def finish(self) -> None:
        """As the worker: what was fenced is not its own to count."""
        if self.claims:
            claim = self.claims.pop(self.draw.randrange(len(self.claims)))
            end = stop_at(0, self.draw.choice([FinishReason.STOP, FinishReason.ERROR]))
            (reply,) = await self.queue.write([Write(claim.lease, end)])
            if reply.status.value == "ok":
                self.metrics.of_model(MODEL).ended(end, 0.1)

    async def stop(self) -> None:
        if self.known:
            reason = self.draw.choice([FinishReason.CANCELLED, FinishReason.DEADLINE])
            await self.queue.stop([f"{self.draw.choice(self.known)}.0"], reason)

    async def forget(self) -> None:
        if self.known:
            await self.queue.forget(self.draw.choice(self.known))

    async def sweep(self) -> None:
        self.clock.now += self.draw.choice([0.1, 0.6, 3.0])
        await self.queue.sweep()


@pytest.mark.parametrize("seed", range(5))
async def test_what_was_accepted_has_ended_or_is_in_flight(seed: int) -> None:
    """After every call, whatever wrote the end: an engine, a client's leaving, a sweep, a claim."""
    walk = Walk(seed)
    calls = (walk.submit, walk.submit, walk.claim, walk.finish, walk.stop, walk.forget, walk.sweep)
    for _ in range(150):
        await walk.draw.choice(calls)()
        depth = await walk.queue.depth()
        accepted = total(walk.metrics, name="quire_requests_accepted_total")
        ended = total(walk.metrics, name="quire_requests_finished_total")
        assert accepted == ended + depth.queued_requests + depth.running_requests
    found = samples(walk.metrics)
    for reason in ("stop", "error", "cancelled", "deadline"):
        series = f'quire_requests_finished_total{{model="{MODEL}",reason="{reason}"}}'
        assert found[series] > 0, reason


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that has been up for an hour."""
    server = RedisServer(tmp_path / "redis", frozen_clock=True)
    server.start()
    server.advance(3600)
    yield server
    server.close()


@pytest.fixture
async def replicas(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., tuple[RedisQueue, Metrics]]]:
    """Makes the queue of one process of several over one Redis, and its figures."""
    be_patient(monkeypatch)
    made: list[RedisQueue] = []

    def make(limits: QueueLimits) -> tuple[RedisQueue, Metrics]:
        metrics = Metrics()
        made.append(RedisQueue(limits, shard=shards_of(server.url)[0], observer=metrics))
        return made[-1], metrics

    yield make
    for queue in made:
        await queue.close()


@asynccontextmanager
async def working(queue: Queue, metrics: Metrics, name: str) -> AsyncIterator[Worker]:
    """An engine over the oracle until the block ends; then it is drained."""

    def deliver(events: Any) -> None:
        worker.deliver(events)

    engine = EngineLoop(
        OracleRunner(num_blocks=128),
        config=EngineConfig(max_batch_tokens=32, max_sequences=4),
        token_bytes=TOKEN_BYTES,
        eos_ids=EOS_IDS,
        deliver=deliver,
        observer=metrics.of_model(MODEL),
    )
    info = EngineInfo(id=name, numeric_class="oracle", version="0")
    worker = Worker(queue, engine, info=lambda: info, observer=metrics.of_model(MODEL))
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.drain()
        await task


async def remain(queue: Queue, count: int) -> None:
    """Waits until so many requests have not ended."""
    async with asyncio.timeout(PATIENCE):
        while (depth := await queue.depth()).queued_requests + depth.running_requests != count:
            await asyncio.sleep(0.02)


@pytest.mark.slow
async def test_so_it_is_over_several_processes_and_a_redis(
    replicas: Any, server: RedisServer
) -> None:
    """Two APIs, three engines one after another, cancels, deadlines, deserted ones, a poison."""
    limits = QueueLimits(lease=3.0, max_attempts=1)
    parts = [replicas(limits) for _ in range(5)]
    (api, told), (other, other_told) = parts[:2]
    draw = random.Random(7)
    submissions = []
    for index in range(40):
        submission = make_submission(
            2,
            prompt_ids=(index % 60, 1, 2),
            timeout_ms=1 if index % 10 == 3 else None,
            grace=0.2 if index % 10 == 4 else None,
        )
        queue, metrics = draw.choice([(api, told), (other, other_told)])
        assert (await queue.submit(submission)).status is SubmitStatus.OK
        metrics.call_accepted(2, MODEL)
        submissions.append(submission)
    poisoned = await claim_one(api, make_engine("dies"))
    await api.stop([f"{submissions[7].id}.0", f"{submissions[7].id}.1"], FinishReason.CANCELLED)
    await other.forget(submissions[8].id)
    for _ in range(3):
        server.advance(0.25)
        await other.sweep()
    everything = [metrics for _, metrics in parts]
    for index in (2, 3, 4):
        queue, metrics = parts[index]
        async with working(queue, metrics, f"e{index}"):
            await asyncio.sleep(0.3)
    async with working(queue, metrics, "last"):
        await remain(api, 1)
        server.advance((FINAL_SILENCE + 1) * limits.lease)  # only the poison is left
        await remain(api, 0)
    ended = {
        reason.value: sum(
            value
            for each in everything
            for series, value in samples(each).items()
            if series.startswith("quire_requests_finished_total{")
            and f'reason="{reason.value}"' in series
        )
        for reason in FinishReason
    }
    assert total(*everything, name="quire_requests_accepted_total") == 80 == sum(ended.values())
    assert (ended["deadline"], ended["error"]) == (8, 1), poisoned.request.id
    assert ended["cancelled"] == 12
    waited = total(*everything, name="quire_queue_wait_seconds_count")
    assert 30 < waited <= 80 - 8 - 12 - 1, "once those that an engine began, not the poison"


class SlowToReply(MemoryQueue):
    """An end is in the journal at once; its writer gets the reply when `replies` is set."""

    def __init__(self, limits: QueueLimits) -> None:
        super().__init__(limits)
        self.replies, self.ended, self.renewals = asyncio.Event(), asyncio.Event(), 0

    async def write(self, writes: Sequence[Write]) -> Sequence[WriteReply]:
        found = await super().write(writes)
        if any(isinstance(write.record, End) for write in writes):
            self.ended.set()
            await self.replies.wait()
        return found

    async def renew(self, leases: Sequence[Lease]) -> Sequence[str]:
        self.renewals += 1
        return await super().renew(leases)


@pytest.mark.slow
@pytest.mark.parametrize("meanwhile", ["renewed", "drained"])
async def test_an_end_is_counted_whatever_comes_before_its_reply(meanwhile: str) -> None:
    """A renewal reported the ended request's lease as lost, or a drain cut the write off: the end
    was not counted, and a lost lease was. The reply waits here until that has really happened.
    """
    queue, metrics = SlowToReply(QueueLimits(lease=0.6)), Metrics()
    async with working(queue, metrics, "e") as worker, asyncio.timeout(PATIENCE):
        await queue.submit(make_submission())
        await queue.ended.wait()
        before = queue.renewals
        if meanwhile == "drained":
            worker.drain()
            await asyncio.sleep(0.05)
        while meanwhile == "renewed" and queue.renewals < before + 2:
            await asyncio.sleep(0.002)
        queue.replies.set()
    assert total(metrics, name="quire_requests_finished_total") == 1
    assert total(metrics, name="quire_lost_leases_total") == 0


# --- waiting ------------------------------------------------------------------------------------
async def test_a_request_tells_its_wait_at_its_first_claim_alone() -> None:
    clock = Clock()
    queue = MemoryQueue(LIMITS, clock=clock)
    assert (await queue.depth()).oldest_seconds is None
    await queue.submit(make_submission(priority=2))
    clock.now += 1.5
    await queue.submit(make_submission(priority=0))
    clock.now += 0.5
    assert (await queue.depth()).oldest_seconds == 2.0
    first, second = await queue.claim(make_engine(), limit=2, wait=0)
    assert (first.waited_ms, second.waited_ms) == (500, 2000)
    assert (await queue.depth()).oldest_seconds is None
    await queue.release([second.lease])
    assert (await claim_one(queue)).waited_ms is None


@pytest.mark.slow
async def test_redis_tells_the_same_waits(replicas: Any, server: RedisServer) -> None:
    queue, _ = replicas(LIMITS)
    assert (await queue.depth()).oldest_seconds is None
    gone = make_submission(priority=1)
    await queue.submit(gone)
    server.advance(0.3)
    await queue.submit(make_submission(priority=1))
    await queue.submit(make_submission(priority=2))
    assert (await queue.depth()).oldest_seconds == 0.3
    await queue.stop([f"{gone.id}.0"], FinishReason.CANCELLED)  # and stays in its stream
    assert (await queue.depth()).oldest_seconds == 0
    server.advance(0.2)
    first, second = await queue.claim(make_engine(), limit=2, wait=0)
    assert (first.waited_ms, second.waited_ms) == (200, 200)
    assert (await queue.depth()).oldest_seconds is None
    await queue.release([first.lease])
    async with asyncio.timeout(PATIENCE):
        again = await claim_one(queue, wait=2 * PATIENCE)
    assert again.waited_ms is None
    await finish(queue, again, length=0)


# --- never stale ----------------------------------------------------------------------------------
OF_THE_QUEUE = (
    "quire_queue_requests", "quire_queue_tokens", "quire_queue_running",
    "quire_queue_oldest_seconds", 'quire_engines{model="tiny"}',
)  # fmt: skip


class SilentQueue(MemoryQueue):
    """One whose store may be away."""

    away = False
    takes_writes = True

    async def engine_groups(self) -> Any:
        if self.away:
            raise Unavailable("away")
        return await super().engine_groups()

    async def check(self) -> None:
        if not self.takes_writes:
            raise Unavailable("read-only")


async def test_what_is_not_known_is_absent() -> None:
    clock = Clock()
    metrics = Metrics(clock=clock)
    queue = SilentQueue(LIMITS, clock=clock)
    cluster = Cluster(queue, [CARD], observer=metrics, clock=clock)
    assert not {"quire_queue_reachable", *OF_THE_QUEUE} & set(samples(metrics))
    await queue.submit(make_submission(2))
    await queue.claim(make_engine("e", numeric_class="real"), limit=1, wait=0)
    clock.now += 3
    await cluster.refresh()
    found = samples(metrics)
    assert [found[name] for name in OF_THE_QUEUE] == [1, 7, 1, 3, 1]
    assert found["quire_queue_reachable"] == 1
    queue.away = True
    watching = asyncio.create_task(cluster.watch())
    await asyncio.sleep(0)
    assert not set(OF_THE_QUEUE) & set(samples(metrics))
    assert samples(metrics)["quire_queue_reachable"] == 0
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    queue.away = False
    await cluster.refresh()
    assert samples(metrics)["quire_queue_reachable"] == 1
    queue.takes_writes = False  # as a demoted primary: it can be read
    with pytest.raises(Unavailable):
        await cluster.refresh()
    watching = asyncio.create_task(cluster.watch())
    await asyncio.sleep(0)
    assert samples(metrics)["quire_queue_reachable"] == 0
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    queue.takes_writes = True
    await cluster.refresh()
    clock.now += STALE_AFTER + 1  # a call that hangs raises nothing
    assert not set(OF_THE_QUEUE) & set(samples(metrics))
    assert samples(metrics)["quire_queue_reachable"] == 0


async def test_each_model_has_its_queue() -> None:
    """Zero, and not absent, for a model without requests: an autoscaler reads it."""
    metrics, queue = Metrics(), MemoryQueue(LIMITS)
    cards = [replace(CARD, id=name, vocabulary=name) for name in ("a", "b")]
    cluster = Cluster(queue, cards, observer=metrics)
    await queue.submit(make_submission(2, model=cards[0].key))
    await queue.claim(make_engine(features=(model_feature(cards[0].key),)), limit=1, wait=0)
    assert "quire_model_queue_tokens" not in str(samples(metrics)), "the queue was not read yet"
    await cluster.refresh()
    found = samples(metrics)
    series = ("requests", "tokens", "running")
    of = {
        name: [found[f'quire_model_queue_{each}{{model="{name}"}}'] for each in series]
        for name in "ab"
    }
    assert of == {"a": [1, 7, 1], "b": [0, 0, 0]}


async def test_a_process_says_what_it_is() -> None:
    metrics = Metrics(role="api", version="1.2.3")
    queue = MemoryQueue(LIMITS)
    cluster = Cluster(queue, [CARD], observer=metrics)
    info = 'quire_info{{model="tiny",numeric_class="{}",role="api",version="1.2.3"}}'
    assert samples(metrics)[info.format("guess")] == 1
    await queue.claim(make_engine(numeric_class="real"), limit=0, wait=0)
    await cluster.refresh()
    found = samples(metrics)
    assert found[info.format("real")] == 1
    assert info.format("guess") not in found
    assert found["process_resident_memory_bytes"] > 1e6
    assert found["process_cpu_seconds_total"] > 0
    assert found["python_gc_collections_total" + '{generation="0"}'] >= 0


# --- names that others chose ----------------------------------------------------------------------
def bounds(metrics: Metrics, name: str) -> list[float]:
    return [
        float(bound)
        for key in samples(metrics)
        if key.startswith(name + "_bucket")
        for bound in re.findall(r'le="([^"]*)"', key)
        if bound != "+Inf"
    ]


def test_histograms_have_the_conventions_boundaries() -> None:
    """OpenTelemetry, semantic conventions for generative AI model servers."""
    metrics = Metrics()
    metrics.begin_model(MODEL)
    assert bounds(metrics, "gen_ai_server_request_duration_seconds") == [
        0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
    ]  # fmt: skip
    assert bounds(metrics, "gen_ai_server_time_to_first_token_seconds") == [
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    ]  # fmt: skip
    assert bounds(metrics, "gen_ai_server_time_per_output_token_seconds") == [
        0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    ]  # fmt: skip


def fed(*, vllm_names: bool, role: str = "serve") -> Metrics:
    metrics = Metrics(vllm_names=vllm_names, role=role)
    metrics.serves(CARD)
    engine = metrics.of_model(CARD.id)
    engine.has_cache(block_size=16, num_blocks=100)
    seen = {"prompt_tokens": 30, "num_sampled": 5, "num_tokens": 35, "prefix_hit_tokens": 10}
    seen |= {"running": 3, "waiting": 2, "blocks_used": 30, "blocks_cached": 50, "blocks_free": 20}
    engine.stepped(StepReport(**NEVER_COMPUTED | seen | {"preempted": ("a.0", "b.0")}))
    for reason in (FinishReason.STOP, FinishReason.CANCELLED, FinishReason.DEADLINE):
        engine.ended(End(count=4, reason=reason), 0.25)
    report: dict[str, Any] = {
        "id": "a",
        "tenant": "t",
        "model": CARD.id,
        "endpoint": "chat",
        "outcome": "stop",
    }
    metrics.call_ended(
        CallReport(
            **report, streamed=True, prompt_tokens=4, completion_tokens=5,
            to_first_token=0.03, duration=0.43,
        )
    )  # fmt: skip
    depth = QueueDepth(
        queued_requests=7,
        queued_tokens=0,
        running_requests=0,
        by_model={CARD.key: ModelDepth(queued_requests=7)},
    )
    metrics.queue_read(depth, {CARD.id: 1})
    return metrics


def test_vllms_dashboards_find_the_same_figures() -> None:
    found = samples(fed(vllm_names=True))
    theirs = {key: value for key, value in found.items() if key.startswith("vllm:")}
    assert all('model_name="tiny"' in key for key in theirs)
    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2 + 7,
        "vllm:kv_cache_usage_perc": 0.3,
        "vllm:prompt_tokens_total": 40,
        "vllm:generation_tokens_total": 5,
        "vllm:prefix_cache_queries_total": 40,
        "vllm:prefix_cache_hits_total": 10,
        "vllm:num_preemptions_total": 2,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:time_to_first_token_seconds_sum": 0.03,
        "vllm:e2e_request_latency_seconds_sum": 0.43,
        "vllm:request_time_per_output_token_seconds_sum": pytest.approx(0.1),
        "vllm:request_queue_time_seconds_count": 0,
        "vllm:request_inference_time_seconds_count": 3,
        "vllm:iteration_tokens_total_sum": 35,
    }
    for name, value in expected.items():
        assert theirs[f'{name}{{model_name="tiny"}}'] == value, name
    cache = 'vllm:cache_config_info{block_size="16",model_name="tiny",num_gpu_blocks="100"}'
    assert theirs[cache] == 1
    success = 'vllm:request_success_total{{finished_reason="{}",model_name="tiny"}}'
    ends = {reason: theirs[success.format(reason)] for reason in ("stop", "abort", "length")}
    assert ends == {"stop": 1, "abort": 2, "length": 0}
    for key, value in found.items():  # bucket by bucket
        if key.startswith("gen_ai_server_time_to_first_token_seconds_bucket"):
            (bound,) = re.findall(r'le="([^"]*)"', key)
            name = "vllm:time_to_first_token_seconds_bucket"
            assert theirs[f'{name}{{le="{bound}",model_name="tiny"}}'] == value


def test_without_the_flag_there_are_none_and_a_shared_queue_is_nobodys() -> None:
    assert not any(key.startswith("vllm:") for key in samples(fed(vllm_names=False)))
    engine = samples(fed(vllm_names=True, role="engine"))
    assert engine['vllm:num_requests_waiting{model_name="tiny"}'] == 2


def test_wasted_rows_have_their_cause() -> None:
    metrics = Metrics()
    engine = metrics.of_model(MODEL)
    for waste in ({"recomputed_tokens": 7}, {"num_skipped": 2}, {"num_skipped": 1}):
        engine.stepped(StepReport(**NEVER_COMPUTED | waste | {"preempted": ()}))
    name = 'quire_wasted_tokens_total{{cause="{}",model="tiny"}}'
    found = samples(metrics)
    assert (found[name.format("preemption")], found[name.format("grammar")]) == (7, 3)
