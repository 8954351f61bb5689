"""An encoding runner without a network: a result is a function of its input alone."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors

from model.config import Pooling
from model.runners.encoding import EncoderInfo, EncoderTokenizer, Encoding, EncodingRunner
from service.engine.encoding import EncodingLoop
from service.engine.observer import Observer
from service.engine.plan import EngineConfig
from service.messages import (
    ENCODING,
    EncodingInputs,
    Event,
    GenerationRequest,
    SamplingParams,
    model_feature,
)
from service.queues.contract import EngineInfo, Queue
from service.vectors import result_id
from service.worker.observer import WorkerObserver
from service.worker.worker import Worker

WIDTH = 5  # not a multiple of 3, so that base64 pads it
VOCAB_SIZE = 97
NUMERIC_CLASS = "hashes"

Result = npt.NDArray[np.float32]


def info_of(**fields: Any) -> EncoderInfo:
    """What a small model that embeds computes; any field can be set."""
    return EncoderInfo(**{
        "width": WIDTH,
        "max_tokens": 16,
        "vocab_size": VOCAB_SIZE,
        "num_types": 2,
        "pooling": Pooling.MEAN,
        "normalised": False,
        "similarity": "cosine",
        **fields,
    })  # fmt: skip


def result_of(ids: Sequence[int], types: Sequence[int] | None = None, *, width: int) -> Result:
    """The result of an input: normal numbers, by its hash."""
    digest = hashlib.sha256(repr((tuple(ids), tuple(types or ()))).encode()).digest()
    draw = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return draw.standard_normal(width).astype(np.float32)


class HashEncoder:
    """`on_encode` is called with each step before it is computed; it may raise."""

    numeric_class = NUMERIC_CLASS
    fingerprint = NUMERIC_CLASS

    def __init__(
        self,
        info: EncoderInfo | None = None,
        *,
        on_encode: Callable[[Sequence[Encoding]], None] | None = None,
    ) -> None:
        self.info = info or info_of()
        self.steps: list[list[Encoding]] = []
        self._on_encode = on_encode

    def encode(self, batch: Sequence[Encoding]) -> list[Result]:
        if self._on_encode is not None:
            self._on_encode(batch)
        self.steps.append([*batch])
        return [result_of(each.ids, each.types, width=self.info.width) for each in batch]

    def warm_up(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing to give back."""


def encoding_request(
    id_: str, inputs: Sequence[Sequence[int]], *, width: int = WIDTH, **fields: Any
) -> GenerationRequest:
    """A request that encodes these inputs, none of which is a pair."""
    return GenerationRequest(
        id=id_,
        prompt_ids=tuple(token for each in inputs for token in each),
        encoding=EncodingInputs(lengths=tuple(map(len, inputs)), width=width),
        sampling=SamplingParams(seed=0),
        max_tokens=len(inputs),
        **fields,
    )


def ids_of_results(inputs: Sequence[Sequence[int]], *, width: int = WIDTH) -> tuple[int, ...]:
    """What the journal has as the token ids of the results."""
    return tuple(result_id(result_of(each, width=width)) for each in inputs)


def tiny_encoder_tokenizer(*, max_tokens: int = 16) -> EncoderTokenizer:
    """Words by their lengths and first letters, between special tokens, as a BERT has them."""
    words = {f"{letter}{'x' * num}": 5 + i * 4 + num for i, letter in enumerate("abcdef")
             for num in range(4)}  # fmt: skip
    raw = RawTokenizer(models.WordLevel({"[UNK]": 1, "[CLS]": 2, "[SEP]": 3, **words}, "[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return EncoderTokenizer(raw, max_tokens=max_tokens)


class EncodingStation:
    """An engine that encodes, with its worker, on a queue that it may share with others."""

    def __init__(
        self,
        queue: Queue,
        name: str = "encoder",
        *,
        runner: EncodingRunner | None = None,
        model: str = "",
        observer: WorkerObserver | None = None,
        max_batch_tokens: int = 32,
    ) -> None:
        self.runner = runner or HashEncoder()
        self.engine = EncodingLoop(
            self.runner,
            config=EngineConfig(max_batch_tokens=max_batch_tokens, max_sequences=8),
            deliver=self._deliver,
            observer=Observer(),
            on_failure=lambda _failure: self.worker.fail(),
            settle=self._settle,
        )
        info = EngineInfo(
            id=name,
            numeric_class=self.runner.numeric_class,
            version="0",
            features=(ENCODING, model_feature(model)),
        )
        self.worker = Worker(
            queue, self.engine, info=lambda: info, observer=observer or WorkerObserver()
        )
        self.task: asyncio.Task[None] | None = None

    def _deliver(self, events: Sequence[Event]) -> None:
        self.worker.deliver(events)

    def _settle(self) -> bool:
        return self.worker.settle()

    async def __aenter__(self) -> Self:
        self.task = asyncio.create_task(self.worker.run())
        return self

    async def __aexit__(self, *_error: object) -> None:
        if self.task is None or self.task.done():
            return
        if self.task.cancelling():
            await asyncio.gather(self.task, return_exceptions=True)
        else:
            self.worker.drain()
            await self.task

    async def kill(self) -> None:
        """What SIGKILL leaves behind: leases that are neither renewed nor released. The step in
        flight may still compute, and the worker waits for it until the end of this context; nothing
        of it is written.
        """
        assert self.task is not None
        self.worker._table.items.clear()
        self.task.cancel()
        self.engine._inbox.stop()
