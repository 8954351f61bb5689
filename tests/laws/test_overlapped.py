"""The engine over the cuda runner, kernels interpreted: overlapped steps and drafts give the same
bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from model.batch import Batch, Bools, StepOutput
from model.grammar import Grammars, json_schema_grammar
from model.runners import OverlappedRunner, RunnerOptions, StepHandle
from model.runners.cuda.build import build_runner
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer, StepReport
from service.engine.plan import EngineConfig
from service.messages import Event, GenerationRequest, SamplingParams, Tokens
from tests.engine.harness import costs
from tests.laws.noise import EOS_IDS, TOKEN_BYTES, VOCAB_SIZE
from tests.support.builders import tiny_model_config, tiny_weights

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_order")]

CONFIG = EngineConfig(max_batch_tokens=12, max_sequences=3, max_prompt_chunk=5)
ROOMY = EngineConfig(max_batch_tokens=32, max_sequences=32)  # that many rows may sample

GRAMMARS = Grammars(TOKEN_BYTES, eos_ids=EOS_IDS, vocab_size=VOCAB_SIZE)


class Blocking:
    """A runner whose steps cannot be launched ahead."""

    def __init__(self, runner: OverlappedRunner) -> None:
        self.config = runner.config
        self.block_size = runner.block_size
        self.num_blocks = runner.num_blocks
        self.numeric_class = runner.numeric_class
        self.exact = False  # no drafts
        self.most_sampled = runner.most_sampled
        self.beside_host = runner.beside_host
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


class Counting(Observer):
    """Counts accepted drafts."""

    accepted = rejected = 0

    def stepped(self, report: StepReport) -> None:
        self.accepted += report.num_accepted
        self.rejected += report.num_drafts - report.num_accepted


def make_runner(limits: EngineConfig = CONFIG, *, num_blocks: int = 14) -> Watched:
    config = tiny_model_config(
        num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1, intermediate_size=24,
        max_model_len=64, vocab_size=VOCAB_SIZE,
    )  # fmt: skip
    options = RunnerOptions(
        dtype="float32", device="cpu", block_size=4, num_blocks=num_blocks,
        max_sequences=limits.max_sequences, max_batch_tokens=limits.max_batch_tokens,
    )  # fmt: skip
    weights = tiny_weights(config)
    return Watched(build_runner(config, weights, options=options, digest="0" * 64, check=None))


def answers(
    runner: Watched | Blocking,
    requests: Sequence[GenerationRequest],
    *,
    config: EngineConfig = CONFIG,
    observer: Observer | None = None,
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
        runner, config=config, token_bytes=TOKEN_BYTES, eos_ids=EOS_IDS, deliver=deliver,
        observer=observer or Observer(), grammars=GRAMMARS,
        clock=lambda: 0.0, cost=costs(lambda rows: 0.01 + rows * 1e-6),
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
            stop_token_ids=tuple(range(0, VOCAB_SIZE, 9)) if index == 1 else (),
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


def test_drafts_give_the_same_bits() -> None:
    """Greedy, sampled, cut, penalised, limited to a set of tokens and by a grammar, all side by
    side; each is expected to say what it says without drafts, but for a few wrong tokens.
    """
    ways = {
        "greedy": {"temperature": 0.0},
        "sampled": {"temperature": 0.9},
        "cut": {"temperature": 1.2, "top_k": 7, "top_p": 0.9},
        "penalised": {"temperature": 0.7, "presence_penalty": 1.5, "repetition_penalty": 1.2},
        "allowed": {"temperature": 0.8, "allowed": tuple(range(97, 110))},
        "grammar": {"temperature": 1.0},
    }
    schema = {"type": "object", "properties": {"ab": {"type": "boolean"}}, "required": ["ab"]}
    requests = [
        GenerationRequest(
            id=name,
            prompt_ids=tuple(range(index, index + 3)),
            max_tokens=8,
            ignore_eos=name != "grammar",
            grammar=json_schema_grammar(schema) if name == "grammar" else None,
            sampling=SamplingParams(seed=index, top_logprobs=0, **way),  # type: ignore[arg-type]
        )
        for index, (name, way) in enumerate(ways.items())
    ]
    expected = answers(Blocking(make_runner(ROOMY, num_blocks=40)), requests, config=ROOMY)
    hinted = []
    for index, request in enumerate(requests):
        hint = [token for token, _ in expected[request.id]]
        hint[3 + index % 2] = 0
        hinted.append(replace(request, prediction=tuple(hint)))
    runner, seen = make_runner(ROOMY, num_blocks=40), Counting()
    runner.exact = True
    assert answers(runner, hinted, config=ROOMY, observer=seen) == expected
    assert seen.accepted > 6
    assert seen.rejected > 0
