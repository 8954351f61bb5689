"""CPU time of the engine's own Python per step and per token.

Measures schedule, pack, update, detokenise and deliver: CPU time of the engine's thread outside the
runner, which other load on the machine hardly affects. One row per kind of request, one column per
number of sequences; median microseconds per step, in brackets per output token.

The runner returns immediately, so the CPU caches hold nothing but Python. With `--model` the native
runner computes a real network, and each step begins with cold caches, as in a server.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from model.batch import Batch, StepOutput
from model.checkpoint import load_model
from model.config import ModelConfig
from model.runners import Runner, RunnerOptions
from model.runners.native import NativeRunner
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer
from service.engine.plan import EngineConfig
from service.messages import Event, GenerationRequest, SamplingParams

_VOCAB_SIZE = 49152
_TOKEN_BYTES = [f" w{token % 997}".encode() for token in range(_VOCAB_SIZE)]
_PROMPT = 400
_GREEDY = SamplingParams(seed=1, temperature=0.0)
_KV_MEMORY = 2**30

KINDS: dict[str, GenerationRequest] = {
    name: GenerationRequest(
        id=name, prompt_ids=(), sampling=sampling, max_tokens=4000, stop=stop, ignore_eos=True
    )
    for name, sampling, stop in (
        ("greedy", _GREEDY, ()),
        ("stop strings", _GREEDY, ("\n\nUser:", "###")),
        ("penalties", replace(_GREEDY, frequency_penalty=0.2, repetition_penalty=1.1), ()),
        ("5 logprobs", replace(_GREEDY, top_logprobs=5), ()),
        ("copies", _GREEDY, ()),
    )
}


class InstantRunner:
    """Generates consecutive ids modulo `period`. Each step advances its clock by 10 ms."""

    exact = True
    block_size = 16
    numeric_class = "instant"

    def __init__(self, *, period: int, num_blocks: int) -> None:
        self.config = ModelConfig(
            family="none", vocab_size=_VOCAB_SIZE, hidden_size=2, num_layers=1, num_heads=1,
            num_kv_heads=1, head_dim=2, intermediate_size=2, max_model_len=8192,
        )  # fmt: skip
        self.num_blocks = num_blocks
        self.now = 0.0
        self._period = period
        self._none = np.empty(0, np.float32)

    def clock(self) -> float:
        """Seconds of its steps so far."""
        return self.now

    def run(self, batch: Batch) -> StepOutput:
        self.now += 0.01
        rows, num = len(batch.sample_rows_R), batch.sampling.num_top
        tokens_R = (batch.tokens_T[batch.sample_rows_R] + 1) % self._period
        return StepOutput(
            tokens_R=tokens_R,
            logprobs_R=np.zeros(rows, np.float32),
            top_ids_RN=np.zeros((rows, num), np.int32),
            top_logprobs_RN=np.zeros((rows, num), np.float32),
            score_logprobs_Q=self._none,
            score_top_ids_QN=np.empty((0, 0), np.int32),
            score_top_logprobs_QN=np.empty((0, 0), np.float32),
        )

    def warm_up(self) -> None:
        pass

    def close(self) -> None:
        pass


class Timed:
    """Wraps a runner and sums the CPU seconds that its calls took on the calling thread."""

    def __init__(self, runner: Runner, clock: Callable[[], float]) -> None:
        self.seconds = 0.0
        self.clock = clock
        self._runner = runner

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # any attribute of the runner
        return getattr(self._runner, name)

    def run(self, batch: Batch) -> StepOutput:
        began = time.thread_time()
        try:
            return self._runner.run(batch)
        finally:
            self.seconds += time.thread_time() - began


def instant(kind: str, sequences: int) -> Timed:
    """An instant runner for this kind of request."""
    period = 50 if kind == "copies" else _VOCAB_SIZE
    runner = InstantRunner(period=period, num_blocks=sequences * 300)
    return Timed(runner, runner.clock)


def native(model: Path) -> Timed:
    loaded = load_model(model)
    options = RunnerOptions(kv_memory=_KV_MEMORY)
    runner = NativeRunner(loaded.config, loaded.weights, options=options, digest=loaded.digest)
    return Timed(runner, time.monotonic)


def measure(
    kind: str, runner: Timed, *, sequences: int, steps: int, speculate: bool
) -> tuple[float, float]:
    """Microseconds per step (median) and per token."""
    events: list[Event] = []
    loop = EngineLoop(
        runner,
        config=EngineConfig(
            max_sequences=sequences, max_batch_tokens=max(512, sequences), speculate=speculate
        ),
        token_bytes=_TOKEN_BYTES,
        eos_ids=frozenset({0}),
        deliver=events.extend,
        observer=Observer(),
        clock=runner.clock,
    )
    for index in range(sequences):
        prompt = tuple((index * 41 + token) % 40_000 for token in range(_PROMPT))
        loop.add(Work(request=replace(KINDS[kind], id=f"r{index}", prompt_ids=prompt)))
    while len({event.request_id for event in events}) < sequences:
        loop.step()
    times, tokens = [], 0
    for _ in range(steps):
        events.clear()
        began, inside = time.thread_time(), runner.seconds
        loop.step()
        times.append(time.thread_time() - began - (runner.seconds - inside))
        tokens += sum(len(getattr(event.record, "ids", ())) for event in events)
    return statistics.median(times) * 1e6, sum(times) / max(1, tokens) * 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sequences", default="1,8,32,64")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--no-speculate", action="store_true")


def run(options: argparse.Namespace) -> None:
    counts = [int(count) for count in options.sequences.split(",")]
    gc.collect()
    gc.freeze()
    print("microseconds per step (per token)".ljust(34) + "".join(f"{n:>16}" for n in counts))
    real = native(options.model) if options.model else None
    for kind in KINDS:
        if real is not None and kind == "copies":
            continue  # whether a real network copies is not ours to choose
        cells = [
            measure(
                kind,
                real or instant(kind, n),
                sequences=n,
                steps=min(options.steps, 220),
                speculate=not options.no_speculate,
            )
            for n in counts
        ]
        print(kind.ljust(34) + "".join(f"{step:>9.0f} ({token:4.1f})" for step, token in cells))
