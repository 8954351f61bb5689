"""The engine over the cuda runner, kernels interpreted: overlapped steps give the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from model.batch import Batch, Bools, StepOutput
from model.runners import OverlappedRunner, RunnerOptions, StepHandle
from model.runners.cuda.build import build_runner
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer
from service.engine.plan import EngineConfig
from service.messages import Event, GenerationRequest, SamplingParams, Tokens
from tests.support.builders import tiny_model_config, tiny_weights

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_order")]

CONFIG = EngineConfig(max_batch_tokens=12, max_sequences=3, max_prompt_chunk=5)
BYTES = tuple(bytes([token]) for token in range(97))


class Blocking:
    """A runner whose steps cannot be launched ahead."""

    def __init__(self, runner: OverlappedRunner) -> None:
        self.config = runner.config
        self.block_size = runner.block_size
        self.num_blocks = runner.num_blocks
        self.numeric_class = runner.numeric_class
        self.exact = False  # no drafts: what overlaps has none either
        self._runner = runner

    def run(self, batch: Batch) -> StepOutput:
        return self._runner.run(batch)

    def warm_up(self) -> None:
        self._runner.warm_up()

    def close(self) -> None:
        self._runner.close()


class Watched(Blocking):
    """Counts how many steps were in flight at once."""

    most_ahead = 0
    _ahead = 0

    def launch(self, batch: Batch, *, unread_T: Bools | None = None) -> StepHandle:
        handle = self._runner.launch(batch, unread_T=unread_T)
        self._ahead += 1
        return handle

    def collect(self, handle: StepHandle) -> StepOutput:
        self.most_ahead = max(self.most_ahead, self._ahead)
        output = self._runner.collect(handle)
        self._ahead -= 1
        return output


def make_runner() -> Watched:
    config = tiny_model_config(
        num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1, intermediate_size=24,
        max_model_len=64, vocab_size=97,
    )  # fmt: skip
    options = RunnerOptions(
        dtype="float32", device="cpu", block_size=4, num_blocks=14,
        max_sequences=3, max_batch_tokens=12,
    )  # fmt: skip
    weights = tiny_weights(config)
    return Watched(build_runner(config, weights, options=options, digest="0" * 64, check=None))


def answers(
    runner: Watched | Blocking, requests: Sequence[GenerationRequest]
) -> dict[str, list[tuple[int, float]]]:
    """(token, log probability) by request."""
    told: dict[str, list[tuple[int, float]]] = {}

    def deliver(events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event.record, Tokens):
                pairs = zip(event.record.ids, event.record.logprobs, strict=True)
                found = told.setdefault(event.request_id, [])
                found += [(token, score.logprob) for token, score in pairs]

    loop = EngineLoop(
        runner, config=CONFIG, token_bytes=BYTES, eos_ids=frozenset(), deliver=deliver,
        observer=Observer(),
    )  # fmt: skip
    for request in requests:
        loop.add(Work(request=request))
    while loop.step():
        loop.check_integrity()
    return told


def test_steps_launched_ahead_give_the_same_bits() -> None:
    """Greedy and sampled, chunked prompts, preemption, a stop that nobody could know, a penalty."""
    ways = [{"temperature": 0.0}, {"temperature": 0.9}, {"temperature": 1.2, "top_k": 7}]
    requests = [
        GenerationRequest(
            id=f"r{index}",
            prompt_ids=tuple(range(index, index + 7)),
            max_tokens=9,
            stop_token_ids=tuple(range(0, 97, 9)) if index == 1 else (),
            sampling=SamplingParams(seed=index, top_logprobs=0, **ways[index % 3]),  # type: ignore[arg-type]
        )
        for index in range(4)
    ]
    penalised = GenerationRequest(
        id="penalised",
        prompt_ids=(5, 5, 5),
        max_tokens=3,
        sampling=SamplingParams(seed=1, top_logprobs=0, presence_penalty=1.5),
    )
    runner = make_runner()
    ahead = answers(runner, requests)
    ahead |= answers(runner, [penalised])
    assert runner.most_ahead == 2
    for request in (*requests, penalised):
        assert ahead[request.id] == answers(Blocking(make_runner()), [request])[request.id]
