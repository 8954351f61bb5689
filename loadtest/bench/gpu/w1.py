"""W1, nano-vllm's workload: on the runner, through the service's engine, and over HTTP.

runner    256 sequences at once, one step ahead of the host: the network alone
engine    the same through scheduler, packer and detokeniser: with the bookkeeping
HTTP      the same through `quire serve`, with 256 streaming clients
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loadtest.bench.gpu.bench import Bench
from loadtest.bench.gpu.models import TINY, Shape
from loadtest.bench.gpu.offline import Offline, Workload, w1
from model.batch import Batch, Bools, StepOutput
from model.runners import OverlappedRunner, StepHandle

TABLE = "W1"


def workload_of(bench: Bench, *, short: bool = False) -> Workload:
    """The workload; `short`: equally wide but shorter, to warm up."""
    if bench.smoke:
        return w1(sequences=2, least=3, most=6)
    return w1(sequences=256, least=100, most=140) if short else w1()


def add_row(
    bench: Bench,
    shape: Shape,
    by: str,
    *,
    seconds: float,
    tokens: int,
    roof: float | None = None,
    host_us: float | None = None,
) -> None:
    """`roof`: seconds at the chip's bandwidth. `host_us`: host time per step without waits."""
    bench.add(
        TABLE,
        {
            "model": shape.name,
            "by": by,
            "seconds": seconds,
            "tokens/s": tokens / seconds,
            "of roof": None if roof is None else roof / seconds,
            "host us": host_us,
        },
    )


def measure(bench: Bench) -> None:
    """Both models on the runner."""
    bandwidth, _ = bench.bandwidth()
    workload = workload_of(bench)
    for shape in bench.models:
        bench.check_time()
        runner = bench.runner(shape)
        runner.warm_up()
        Offline(runner, budget=bench.budget).run(
            workload_of(bench, short=True)
        )  # raises the clocks
        clocked = _Clocked(runner)
        outcome = Offline(clocked, budget=bench.budget).run(workload)
        moved = outcome.steps * shape.weight_bytes + outcome.kv_tokens * shape.kv_bytes
        roof = moved / bandwidth
        host = (outcome.seconds - clocked.waited) / clocked.steps
        add_row(
            bench, shape, "runner",
            seconds=outcome.seconds, tokens=outcome.tokens, roof=roof, host_us=host * 1e6,
        )  # fmt: skip
        bench.release(runner)


def measure_long(bench: Bench) -> None:
    """The larger model: 256 prompts of 1,024 tokens, 1,024 output tokens each."""
    bandwidth, _ = bench.bandwidth()
    lengths = ((4, 4),) * 2 if bench.smoke else ((1024, 1024),) * 256
    shape, workload = bench.models[-1], Workload(name="long", lengths=lengths)
    runner = bench.runner(shape)
    runner.warm_up()
    outcome = Offline(runner, budget=bench.budget).run(workload)
    moved = outcome.steps * shape.weight_bytes + outcome.kv_tokens * shape.kv_bytes
    add_row(
        bench, shape, "runner, 1k/1k",
        seconds=outcome.seconds, tokens=outcome.tokens, roof=moved / bandwidth,
    )  # fmt: skip
    bench.release(runner)


def measure_engine(bench: Bench) -> None:
    """Both models, with the service's bookkeeping."""
    workload = workload_of(bench)
    for shape in bench.models:
        bench.check_time()
        runner = bench.runner(shape)
        runner.warm_up()
        clocked = _Clocked(runner)
        seconds = _through_engine(clocked, workload, bench.budget)
        host = (seconds - clocked.waited) / clocked.steps
        add_row(
            bench, shape, "engine",
            seconds=seconds, tokens=workload.tokens_out, host_us=host * 1e6,
        )  # fmt: skip
        bench.release(runner)


def measure_http(bench: Bench) -> None:
    """The smaller model, all requests at once."""
    from loadtest.bench.gpu.http import over_http
    from loadtest.bench.servers import ServerFailed

    shape, workload = bench.models[0], workload_of(bench)
    if bench.smoke:
        shape = Shape("tiny", replace(TINY, vocab_size=300))
    flags = ["--runner", "torch" if bench.device.type == "cpu" else "cuda"]
    if not bench.smoke:
        flags += ["--kv-memory", "40GiB"]
    with TemporaryDirectory() as name:
        folder = Path(name)
        with _log_shown(folder / "quire.log", (ServerFailed, RuntimeError)):
            seconds = over_http(shape, workload, folder, flags=flags, start_timeout=bench.left - 15)
    add_row(bench, shape, "HTTP", seconds=seconds, tokens=workload.tokens_out)


class _Clocked:
    """Wraps a runner and sums the seconds that its caller waits for the device."""

    def __init__(self, runner: OverlappedRunner) -> None:
        self.waited = 0.0
        self.steps = 0
        self._runner = runner

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute of the runner
        return getattr(self._runner, name)

    def run(self, batch: Batch) -> StepOutput:
        return self.collect(self.launch(batch))

    def launch(self, batch: Batch, *, unread_T: Bools | None = None) -> StepHandle:
        self.steps += 1
        return self._runner.launch(batch, unread_T=unread_T)

    def collect(self, handle: StepHandle) -> StepOutput:
        began = time.perf_counter()
        output = self._runner.collect(handle)
        self.waited += time.perf_counter() - began
        return output


def _through_engine(runner: _Clocked, workload: Workload, budget: int) -> float:
    """Seconds of the workload."""
    from service.engine.inbox import Work
    from service.engine.loop import EngineLoop
    from service.engine.observer import Observer
    from service.engine.plan import EngineConfig
    from service.messages import GenerationRequest, SamplingParams

    vocab_size = runner.config.vocab_size
    loop = EngineLoop(
        runner,
        config=EngineConfig(
            max_batch_tokens=budget,
            max_sequences=len(workload.lengths),
            max_prompt_chunk=budget,
            prefix_cache=False,
        ),
        token_bytes=[b"a"] * vocab_size,
        eos_ids=frozenset(),
        deliver=lambda _: None,
        observer=Observer(),
    )
    for index, (prompt, output) in enumerate(workload.lengths):
        request = GenerationRequest(
            id=str(index),
            prompt_ids=tuple(n * 7919 % vocab_size for n in range(prompt)),
            sampling=SamplingParams(seed=index, temperature=workload.temperature),
            max_tokens=output,
            ignore_eos=True,
        )
        loop.add(Work(request=request))
    began = time.perf_counter()
    while loop.busy:
        loop.step()
    return time.perf_counter() - began


@contextmanager
def _log_shown(path: Path, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Prints the end of the server's log if it failed, before its folder is removed."""
    try:
        yield
    except errors:
        if path.is_file():
            print(path.read_text(encoding="utf-8", errors="replace")[-3000:], file=sys.stderr)
        raise
