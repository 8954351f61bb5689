"""Builders and a rig for the engine's tests: a real EngineLoop over the oracle, always checked."""

from __future__ import annotations

import codecs
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from model.batch import Batch
from service.engine.cost import CostModel, StepWork
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer, StepReport
from service.engine.plan import EngineConfig, Plan
from service.engine.sequence import Sequence as EngineSequence
from service.engine.speculate import Speculator
from service.messages import (
    End,
    Event,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenLogprob,
    Tokens,
    rolling_digest,
)
from tests.support.fakes import (
    EOS_IDS,
    TOKEN_BYTES,
    VISIBLE_BYTES,
    VOCAB_SIZE,
    OracleRunner,
    Overlapping,
    oracle_answer,
)

CONFIG = EngineConfig(max_batch_tokens=16, max_sequences=6, max_prompt_chunk=8)


def make_request(
    name: str = "r",
    *,
    prompt: Iterable[int] = (1, 2, 3),
    max_tokens: int = 8,
    sampling: dict[str, Any] | None = None,
    **fields: Any,
) -> GenerationRequest:
    """A request with defaults; `sampling` are fields of its SamplingParams."""
    return GenerationRequest(
        id=name,
        prompt_ids=tuple(prompt),
        max_tokens=max_tokens,
        sampling=SamplingParams(**{"seed": 7, **(sampling or {})}),
        **fields,
    )


def random_request(draw: random.Random, name: str) -> GenerationRequest:
    """Any parameters; prompts often begin alike, so that prefixes are shared."""
    shared = [draw.randrange(2)] * draw.choice([0, 4, 8, 12])
    prompt = [*shared, *(draw.randrange(90) for _ in range(draw.randint(1, 9)))]
    sampling: dict[str, Any] = {"seed": draw.randrange(2**64), "choice": draw.randrange(3)}
    if draw.random() < 0.3:
        sampling |= {"temperature": 0.0, "top_k": draw.randint(1, 9), "top_p": 0.5, "min_p": 0.1}
    if draw.random() < 0.3:
        sampling |= {draw.choice(["presence_penalty", "frequency_penalty"]): 0.5}
    if draw.random() < 0.2:
        sampling |= {"repetition_penalty": 1.5}
    if draw.random() < 0.2:
        sampling |= {"logit_bias": ((draw.randrange(90), 2.0), (96, -1.0))}
    if draw.random() < 0.2:
        sampling |= {"allowed": tuple(sorted(draw.sample(range(97), draw.randint(3, 6))))}
    if draw.random() < 0.3:
        # Of few tokens, so that sequences come about; never all that are allowed.
        few = (sampling.get("allowed") or tuple(range(97)))[:-1]
        words = {
            tuple(draw.choices(few, k=draw.choice([1, 2, 2, 3]))) for _ in range(len(few) // 2)
        }
        sampling |= {"banned": tuple(sorted(words))}
    if draw.random() < 0.3:
        sampling |= {"top_logprobs": draw.randrange(3)}
    return make_request(
        name,
        prompt=prompt,
        max_tokens=draw.randint(1, 24),
        sampling=sampling,
        min_tokens=0 if "allowed" in sampling else draw.choice([0, 0, 5]),
        stop=tuple(
            draw.sample(["a", "bc", "éa", "cd", "\ufffd", "ab", "fgh"], draw.choice([0, 2]))
        ),
        stop_token_ids=tuple(draw.sample(range(96), draw.choice([0, 0, 4]))),
        ignore_eos=draw.random() < 0.3,
        include_stop=draw.random() < 0.2,
        skip_special_tokens=draw.random() < 0.8,
        prompt_logprobs=draw.choice([None, None, None, 0, 2]),
        tenant=draw.choice(["a", "b", "c"]),
        priority=draw.randrange(3),
    )


@dataclass
class Transcript:
    """What came out for one request, records put together."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    end: End | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    def read(self, record: Tokens | End) -> None:
        """Appends a record; fails if it does not continue the earlier ones."""
        assert self.end is None, "nothing comes after the end"
        if isinstance(record, End):
            assert record.count == len(self.ids)
            self.end = record
            return
        assert record.start == len(self.ids)
        assert record.ids
        self.ids += record.ids
        self.text += record.text
        self.logprobs += record.logprobs
        assert not (record.prompt_logprobs and record.start)
        self.prompt_logprobs += record.prompt_logprobs
        assert record.digest == rolling_digest(self.ids)

    @property
    def result(self) -> tuple[list[int], str, FinishReason | None, str | int | None]:
        """What must be equal between all ways to run a request."""
        reason, stopped_by = (self.end.reason, self.end.stopped_by) if self.end else (None, None)
        return self.ids, self.text, reason, stopped_by


def expected(request: GenerationRequest) -> tuple[list[int], str, FinishReason, str | int | None]:
    """The same from the request alone, the slow way: all text decoded anew for each token."""
    ids = oracle_answer(request)
    ending = set(request.stop_token_ids) | (set() if request.ignore_eos else EOS_IDS)
    for num in range(1, len(ids) + 1):
        ended = ids[num - 1] in ending
        last = ended or num == request.max_tokens
        table = TOKEN_BYTES if request.skip_special_tokens else VISIBLE_BYTES
        shown = ids[: num - (ended and not request.include_stop)]
        text = codecs.utf_8_decode(b"".join(table[token] for token in shown), "replace", last)[0]
        cut = first_stop(text, request.stop, included=request.include_stop)
        if ended:
            return ids[:num], cut[0] if cut else text, FinishReason.STOP, ids[num - 1]
        if cut:
            return ids[:num], cut[0], FinishReason.STOP, cut[1]
    return ids, text, FinishReason.LENGTH, None


def first_stop(
    text: str, stops: Sequence[str], *, included: bool = False
) -> tuple[str, str] | None:
    """The text before the first stop to be complete (the longest of those), and that stop."""
    found = [
        (text.index(stop) + len(stop), text.index(stop), stop) for stop in stops if stop in text
    ]
    if not found:
        return None
    end, start, stop = min(found)
    return text[: end if included else start], stop


def costs(seconds: Callable[[int], float]) -> CostModel:
    """A cost model that has seen steps of many sizes; `seconds` by tokens."""
    cost = CostModel()
    for tokens in [1, 2, 3, 5, 8, 12, 16, 24, 32, 64, 128, 256] * 4:
        for chunk, decodes in ((tokens, 0), (0, tokens)):
            work = StepWork(tokens, chunk**2 + 50 * decodes, chunk + 50 * decodes, decodes)
            cost.observe(work, seconds(tokens))
    return cost


class Reckless(Speculator):
    """Drafts without regard to time or chances: any number, some right where `truth` is known.

    If steps overlap, a step is read for them at random.
    """

    def __init__(
        self,
        draw: random.Random,
        *,
        max_rows: int,
        truth: Callable[[GenerationRequest], Sequence[int]] | None = None,
    ) -> None:
        super().__init__(EngineConfig(), CostModel(), most_sampled=max_rows)
        self.draw = draw
        self.max_rows = max_rows
        self.truth = truth
        self.right = 0.8  # of the drafts as long as the truth is known

    def propose(self, plan: Plan) -> dict[EngineSequence, list[int]]:
        """Up to the budget, and never beyond max_tokens."""
        drafts: dict[EngineSequence, list[int]] = {}
        if any(sequence.num_unread for sequence in plan.tokens):
            return drafts
        left = self.max_rows - plan.num_tokens
        for sequence in plan.tokens:
            num = self.draw.randint(0, max(0, min(7, left, sequence.num_remaining - 1)))
            if num:
                left -= num
                drafts[sequence] = self._drafts(sequence, num)
        return drafts

    def expects(self, sequences: Collection[EngineSequence]) -> list[EngineSequence]:
        assert all(sequence.num_unread for sequence in sequences)
        return list(sequences) if self.draw.random() < 0.5 else []

    def learn(self, sequence: EngineSequence, *, num: int, hits: int) -> None:
        assert 0 <= hits <= num

    def _drafts(self, sequence: EngineSequence, num: int) -> list[int]:
        truth = () if self.truth is None else self.truth(sequence.request)
        known = list(truth[sequence.num_output : sequence.num_output + num])
        known += [self.draw.randrange(6) for _ in range(num - len(known))]
        return [
            token if self.draw.random() < self.right else self.draw.randrange(97) for token in known
        ]


class Rig(Observer):
    """An engine over the oracle, stepped by hand. Integrity and limits are checked at each step."""

    kind: type[OracleRunner] = OracleRunner

    def __init__(
        self,
        config: EngineConfig = CONFIG,
        *,
        clock: Callable[[], float] | None = None,
        takes: Callable[[int], float] = lambda _rows: 0.0,
        cost: CostModel | None = None,
        reckless: random.Random | None = None,
        kind: type[OracleRunner] | None = None,
        **runner: Any,
    ) -> None:
        self.config = config
        self.now = 0.0  # a step adds what it takes, by its rows
        self.takes = takes
        self.transcripts: dict[str, Transcript] = {}
        self.reports: list[StepReport] = []
        self.batches: list[Batch] = []
        self.runner = (kind or self.kind)(on_run=self._ran, **runner)
        self.loop = EngineLoop(
            self.runner,
            config=config,
            token_bytes=TOKEN_BYTES,
            visible_bytes=VISIBLE_BYTES,
            eos_ids=EOS_IDS,
            deliver=self._delivered,
            observer=self,
            clock=clock or (lambda: self.now),
            cost=cost,
        )
        self.reckless = None
        if reckless is not None:
            self.reckless = Reckless(
                reckless,
                max_rows=self.max_sampled,
                truth=oracle_answer,
            )
            self.loop._scheduler._speculator = self.reckless

    @property
    def max_sampled(self) -> int:
        """Rows of a step that may sample."""
        overlaps = isinstance(self.runner, Overlapping)
        return self.config.max_sequences if overlaps else self.config.max_batch_tokens

    def stepped(self, report: StepReport) -> None:
        self.reports.append(report)

    def add(self, request: GenerationRequest, **fields: Any) -> None:
        """Hands work in; a transcript with the known tokens begins."""
        tokens = fields.get("tokens", ())
        self.transcripts[request.id] = Transcript(ids=list(tokens))
        self.loop.add(Work(request=request, **fields))

    def step(self) -> bool:
        """One step, and a look at the books."""
        worked = self.loop.step()
        self.loop.check_integrity()
        return worked

    def run(self, *requests: GenerationRequest) -> dict[str, Transcript]:
        """Adds requests and steps until nothing is left to do."""
        for request in requests:
            self.add(request)
        for _ in range(5000):
            if not self.step():
                break
        else:
            raise AssertionError("the engine does not come to an end")
        self.check_idle()
        return self.transcripts

    def until(self, done: Callable[[], bool]) -> None:
        """Steps until something is so."""
        for _ in range(5000):
            if done():
                return
            self.step()
        raise AssertionError("it never becomes so")

    def check_idle(self) -> None:
        """Nothing is left: every block is free or cached."""
        assert not self.loop.busy
        assert self.loop._allocator.num_used == 0
        assert self.loop.room == self.config.max_sequences

    def ended(self, name: str) -> bool:
        """Whether the request has its end."""
        return self.transcripts[name].end is not None

    def total(self, name: str) -> int:
        """A figure of the step reports, summed."""
        return sum(getattr(report, name) for report in self.reports)

    def _ran(self, batch: Batch) -> None:
        self.batches.append(batch)
        self.now += self.takes(batch.num_tokens)
        assert batch.num_tokens <= self.config.max_batch_tokens
        assert batch.num_sequences <= self.config.max_sequences
        assert batch.batch_slots_S.max() < self.config.max_sequences
        assert len(batch.sample_rows_R) <= self.max_sampled

    def _delivered(self, events: Sequence[Event]) -> None:
        for event in events:
            self.transcripts[event.request_id].read(event.record)


def renamed(request: GenerationRequest, name: str) -> GenerationRequest:
    """The same request under another id."""
    return replace(request, id=name)


__all__ = [
    "CONFIG", "EOS_IDS", "TOKEN_BYTES", "VOCAB_SIZE", "Reckless", "Rig", "Transcript", "costs",
    "expected", "first_stop", "make_request", "random_request", "renamed",
]  # fmt: skip
