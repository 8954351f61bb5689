"""Time of a decode step by what its rows request, as a ratio to plain greedy.

Two engines share the native runner in this process, each with its own blocks: all sequences of one
are greedy, those of the other have an option. They step in turns, so that both meet the same load
of the machine. The ratio is that of the fastest tenths of their steps. No drafts.

With one thread, steps are measured in CPU time of that thread, which other load on the machine
hardly affects; with more, in elapsed time, on a quiet machine. A row is sampled by one thread.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from model.batch import Batch, StepOutput
from model.checkpoint import load_model
from model.checkpoint.fetch import default_cache, resolve
from model.grammar import Grammars, json_schema_grammar, regex_grammar
from model.runners import RunnerOptions
from model.runners.native import NativeRunner
from model.text.tokenizer import Tokenizer
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer
from service.engine.plan import EngineConfig
from service.messages import End, Event, GenerationRequest, SamplingParams

_PROMPT = 64  # tokens at most
_TOPICS = (
    "bread", "the sea", "mathematics", "trains", "cities", "music", "glass", "maps", "rivers",
    "languages", "birds", "clocks", "theatre", "medicine", "letters", "the moon",
)  # fmt: skip
_BLOCK = 16
_GREEDY = GenerationRequest(
    id="greedy",
    prompt_ids=(),
    sampling=SamplingParams(seed=1, temperature=0.0),
    max_tokens=1,  # replaced
    ignore_eos=True,
)
_ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "price": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
        "in_stock": {"type": "boolean"},
    },
    "required": ["name", "price", "tags", "in_stock"],
    "additionalProperties": False,
}

_WORDS = regex_grammar("([a-z]{1,12}[ ,.]){900}")
_ITEMS = json_schema_grammar({"type": "array", "minItems": 300, "items": _ITEM})


def _option(name: str, *, grammar: str | None = None, **sampling: object) -> GenerationRequest:
    params = replace(_GREEDY.sampling, **sampling)  # type: ignore[arg-type]
    return replace(_GREEDY, id=name, sampling=params, grammar=grammar)


OPTIONS: Sequence[GenerationRequest] = (
    _option("temperature 1", temperature=1.0),
    _option("temperature 0.7, top_p 0.9", temperature=0.7, top_p=0.9),
    _option("temperature 1, top_p 0.99", temperature=1.0, top_p=0.99),
    _option("temperature 1, top_k 40", temperature=1.0, top_k=40),
    _option("temperature 1, min_p 0.05", temperature=1.0, min_p=0.05),
    _option("5 log probabilities", top_logprobs=5),
    _option("penalties", frequency_penalty=0.2, repetition_penalty=1.1),
    _option("logit bias of 50 tokens", logit_bias=tuple((i, -100.0) for i in range(50))),
    _option(
        "all of these", temperature=1.0, top_p=0.95, top_k=200, frequency_penalty=0.2,
        repetition_penalty=1.1, top_logprobs=5,
    ),
    _option("regular expression", grammar=_WORDS),
    _option("regular expression, temperature 1", grammar=_WORDS, temperature=1.0),
    _option("JSON schema", grammar=_ITEMS),
    _option("JSON schema, temperature 1", grammar=_ITEMS, temperature=1.0),
)  # fmt: skip


class Share:
    """Some blocks of a runner, as a runner of its own."""

    def __init__(self, runner: NativeRunner, *, index: int, num_blocks: int) -> None:
        self.config, self.exact = runner.config, runner.exact
        self.keeps_logits = runner.keeps_logits
        self.block_size, self.num_blocks = runner.block_size, num_blocks
        self.numeric_class = runner.numeric_class
        self._runner, self._first = runner, index * num_blocks

    def run(self, batch: Batch) -> StepOutput:
        own = batch.block_table_SB + self._first
        return self._runner.run(replace(batch, block_table_SB=own))

    def warm_up(self) -> None:
        self._runner.warm_up()

    def close(self) -> None:
        """The runner itself stays open."""


class Side:
    """An engine over a share of the runner, all of whose sequences have one option."""

    def __init__(
        self, share: Share, tokenizer: Tokenizer, grammars: Grammars, option: GenerationRequest,
        *, sequences: int, max_sequences: int,
    ) -> None:  # fmt: skip
        self._started: set[str] = set()
        self._loop = EngineLoop(
            share,
            config=EngineConfig(
                max_sequences=sequences, max_batch_tokens=max(512, sequences), speculate=False
            ),
            token_bytes=tokenizer.token_bytes,
            eos_ids=tokenizer.eos_ids,
            deliver=self._read,
            observer=Observer(),
            grammars=grammars,
        )
        for index in range(sequences):
            topic = _TOPICS[index % len(_TOPICS)]
            text = f"{index}. A long essay on the history of {topic}:\n\n"
            request = replace(
                option,
                id=f"r{index}",
                prompt_ids=tuple(tokenizer.encode(text)),
                max_tokens=share.num_blocks * share.block_size // max_sequences - _PROMPT,
                sampling=replace(option.sampling, seed=index),
            )
            self._loop.prepare(request)
            self._loop.add(Work(request=request))
        while len(self._started) < sequences:
            self._loop.step()

    def step(self, clock: Callable[[], float]) -> float:
        """Seconds of a step."""
        began = clock()
        self._loop.step()
        return clock() - began

    def check(self) -> None:
        """Raises SystemExit if an output has ended, which would make steps cheaper."""
        if self._ended:
            raise SystemExit("an output has ended too early")

    _ended = False

    def _read(self, events: Sequence[Event]) -> None:
        for event in events:
            self._started.add(event.request_id)
            self._ended |= isinstance(event.record, End)


def fastest_tenth(seconds: list[float]) -> float:
    """Mean of the fastest tenth."""
    fastest = sorted(seconds)[: max(1, len(seconds) // 10)]
    return sum(fastest) / len(fastest)


def compare(
    base: Side, other: Side, *, steps: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of a step of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(steps):
        for side in (0, 1) if index % 2 else (1, 0):
            times[side].append((base, other)[side].step(clock))
    base.check()
    other.check()
    return fastest_tenth(times[0]), fastest_tenth(times[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="")
    parser.add_argument("--sequences", default="1,8,32")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", default="")
    parser.add_argument("--only", default="", help="part of the names of options")


def run(options: argparse.Namespace) -> None:
    counts = [int(count) for count in options.sequences.split(",")]
    path: Path = resolve(options.model, cache=default_cache())
    model, tokenizer = load_model(path), Tokenizer.from_checkpoint(path)
    each = max(counts) * -(-(_PROMPT + options.steps + 32) // _BLOCK)
    runner = NativeRunner(
        model.config,
        model.weights,
        options=RunnerOptions(num_blocks=2 * each, block_size=_BLOCK, num_threads=options.threads),
        digest=model.digest,
        variant=options.variant,
    )
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    grammars = Grammars(
        tokenizer.token_bytes, eos_ids=tokenizer.eos_ids, vocab_size=model.config.vocab_size
    )
    gc.collect()
    gc.freeze()
    print(f"{runner.variant}, {runner.numeric_class}; milliseconds of a greedy step, then ratios\n")
    print("| time of a step |" + "".join(f" {n} clients |" for n in counts))
    print("| --- |" + " ---: |" * len(counts))
    for option in OPTIONS:
        if options.only not in option.id:
            continue
        cells = []
        for count in counts:
            sides = [
                Side(
                    Share(runner, index=index, num_blocks=each), tokenizer, grammars, request,
                    sequences=count, max_sequences=max(counts),
                )
                for index, request in enumerate((_GREEDY, option))
            ]  # fmt: skip
            base, other = compare(*sides, steps=options.steps, clock=clock)
            cells.append(f" {other / base:.3f} ({base * 1e3:.1f} ms) |")
        print(f"| {option.id} |" + "".join(cells), flush=True)
    runner.close()
