"""The API over a real queue and a real tokenizer; only the engine is scripted.

The engine claims from the queue and journals what a script says: the seam between API and engine.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from model.grammar import Grammars
from model.text.tokenizer import Tokenizer
from service.api.http.auth import Authenticator, open_to_all
from service.api.http.context import ApiLimits, Models, Probes
from service.api.http.middleware import HostCheck, any_host
from service.api.http.observer import ApiObserver, CallReport
from service.api.structured.validator import GrammarValidator
from service.app import build_app, served_model
from service.batches.jobs import JobLimits
from service.http.listeners import Listener
from service.http.ports import address, bind
from service.messages import (
    FEATURES,
    End,
    FinishReason,
    GenerationRequest,
    ModelCard,
    Record,
    TokenLogprob,
    Tokens,
    rolling_digest,
)
from service.queues.contract import Claim, EngineInfo, QueueLimits, Write, WriteStatus
from service.queues.memory.queue import MemoryQueue
from tests.support.waiting import PATIENCE

MODEL = "tiny-model"
MAX_MODEL_LEN = 256
SPECIALS = ("<|im_start|>", "<|im_end|>", "<s>")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["hello world, how are you? the answer is plain and the words are short", "één €5 😀"] * 5


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level BPE tokenizer, trained here, read from its files as any model's is."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    raw.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    raw.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": "<s>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"vocab_size": raw.get_vocab_size()}))
    return Tokenizer.from_checkpoint(folder)


Script = Callable[[GenerationRequest], Sequence[int]]


def random_answer(vocab_size: int) -> Script:
    """A pure function of the request, as the real engine's is: bytes, characters, specials."""

    def script(request: GenerationRequest) -> Sequence[int]:
        sampling = request.sampling
        draw = random.Random(f"{request.prompt_ids}{sampling.seed}{sampling.choice}")
        return [draw.randrange(vocab_size) for _ in range(request.max_tokens)]

    return script


@dataclass
class ScriptedEngine:
    """Journals `script`'s tokens in pieces of random length, `pause` seconds apart."""

    queue: MemoryQueue
    tokenizer: Tokenizer
    script: Script
    pause: float = 0.0
    end: FinishReason = FinishReason.LENGTH
    error: str | None = None
    stopped_by: str | None = None
    bad_digest_at: int | None = None
    seen: list[GenerationRequest] = field(default_factory=list)
    fenced: list[str] = field(default_factory=list)
    info: EngineInfo = field(
        default_factory=lambda: EngineInfo(
            id="e1", numeric_class="class-1", version="1", features=tuple(FEATURES)
        )
    )

    async def run(self) -> None:
        """Serves claims until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                for claim in await self.queue.claim(self.info, limit=64, wait=1.0):
                    self.seen.append(claim.request)
                    group.create_task(self._serve(claim))

    async def _serve(self, claim: Claim) -> None:
        for record in self.records(claim.request):
            if self.pause:
                await asyncio.sleep(self.pause)
            (reply,) = await self.queue.write([Write(claim.lease, record)])
            if reply.status is WriteStatus.FENCED:
                self.fenced.append(claim.request.id)
                return

    def records(self, request: GenerationRequest) -> Iterator[Record]:
        """The journal of an answer."""
        ids = list(self.script(request))
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        draw = random.Random(str(ids))
        digest = start = 0
        while start < len(ids):
            part = tuple(ids[start : start + draw.choice([1, 1, 1, 2, 3])])
            end = start + len(part)
            skip = request.skip_special_tokens
            table = self.tokenizer.token_bytes if skip else self.tokenizer.visible_bytes
            text = decoder.decode(b"".join(table[token] for token in part), end == len(ids))
            digest = rolling_digest(part, previous=digest)
            if self.bad_digest_at is not None and end > self.bad_digest_at:
                digest ^= 1
            yield Tokens(
                start=start,
                ids=part,
                text=text,
                digest=digest,
                logprobs=self._logprobs(part, request.sampling.top_logprobs),
                prompt_logprobs=self._prompt_logprobs(request) if start == 0 else (),
            )
            start = end
        yield End(
            count=len(ids),
            reason=self.end,
            cached_tokens=2,
            stopped_by=self.stopped_by,
            error=self.error,
        )

    def _logprobs(self, ids: Sequence[int], top: int | None) -> tuple[TokenLogprob, ...]:
        if top is None:
            return ()
        size = self.tokenizer.vocab_size
        return tuple(
            TokenLogprob(-token / 7, tuple(((token + k) % size, -k / 3) for k in range(top)))
            for token in ids
        )

    def _prompt_logprobs(self, request: GenerationRequest) -> tuple[TokenLogprob | None, ...]:
        if request.prompt_logprobs is None:
            return ()
        return (None, *self._logprobs(request.prompt_ids[1:], request.prompt_logprobs))


class RecordingObserver(ApiObserver):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.reports: list[CallReport] = []
        self.statuses: list[int] = []
        self.refusals: list[str] = []

    def call_answered(self, status: int) -> None:
        self.statuses.append(status)

    def call_refused(self, reason: str) -> None:
        self.refusals.append(reason)

    def call_ended(self, report: CallReport) -> None:
        self.reports.append(report)


@dataclass
class Service:
    """One replica with its engine."""

    app: FastAPI
    client: httpx.AsyncClient
    queue: MemoryQueue
    engine: ScriptedEngine
    observer: RecordingObserver
    tokenizer: Tokenizer
    state: dict[str, Any]  # what the probes say

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """A JSON body; header names with underscores."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        named["content-type"] = "application/json"
        return await self.client.post(path, content=json.dumps(body), headers=named)


StartService = Callable[..., Any]


@pytest.fixture(scope="session")
def grammar_validator(tokenizer: Tokenizer) -> Iterator[GrammarValidator]:
    """One process for all services here: it takes a third of a second to begin."""
    with validator_of(tokenizer) as validator:
        yield validator


@contextmanager
def validator_of(tokenizer: Tokenizer) -> Iterator[GrammarValidator]:
    """One of this vocabulary. Its process starts with the first grammar."""
    tokens, eos_ids = tokenizer.token_bytes, tokenizer.eos_ids
    validator = GrammarValidator(
        lambda: Grammars(tokens, eos_ids=eos_ids, vocab_size=tokenizer.vocab_size)
    )
    yield validator
    validator.close()


@pytest.fixture
def start_service(tokenizer: Tokenizer, grammar_validator: GrammarValidator) -> StartService:
    """`async with start_service(limits=..., queue_limits=..., running=...)`."""

    @asynccontextmanager
    async def start(
        *,
        limits: ApiLimits | None = None,
        queue_limits: QueueLimits | None = None,
        queue: MemoryQueue | None = None,
        running: bool = True,
        max_model_len: int = MAX_MODEL_LEN,
        vocab_size: int = tokenizer.vocab_size,
        docs: bool = False,
        authenticate: Authenticator = open_to_all,
        check_host: HostCheck = any_host,
        cors_origins: Sequence[str] = (),
        jobs: JobLimits | None = None,
    ) -> AsyncIterator[Service]:
        # The scripted engine renews no leases.
        queue = queue or MemoryQueue(queue_limits or QueueLimits(lease=10 * PATIENCE))
        engine = ScriptedEngine(queue, tokenizer, random_answer(tokenizer.vocab_size))
        observer = RecordingObserver()
        state: dict[str, Any] = {
            "started": True,
            "live": True,
            "draining": False,
            "served": True,
            "speed": 100.0,
        }
        card = ModelCard(
            id=MODEL,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            numeric_class="class-1",
            created=1_700_000_000,
        )
        app = build_app(
            queue,
            Models.of(
                served_model(
                    tokenizer,
                    lambda: card,
                    served=lambda: state["served"],
                    tokens_per_second=lambda: state["speed"],
                    grammars=grammar_validator,
                )
            ),
            probes=Probes(
                started=lambda: state["started"],
                live=lambda: state["live"],
                draining=lambda: state["draining"],
            ),
            limits=limits or ApiLimits(),
            observer=observer,
            version="0.0.1",
            extras=("docs", "page") if docs else ("page",),
            authenticate=authenticate,
            check_host=check_host,
            cors_origins=cors_origins,
            jobs=jobs,
        )
        task = asyncio.create_task(engine.run()) if running else None
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", timeout=PATIENCE
        ) as client:
            yield Service(app, client, queue, engine, observer, tokenizer, state)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    return start


@pytest.fixture
async def service(start_service: StartService) -> AsyncIterator[Service]:
    """A replica with default limits."""
    async with start_service() as started:
        yield started


@asynccontextmanager
async def _listen(app: FastAPI, *, send_buffer: int | None = None) -> AsyncIterator[str]:
    bound = bind("127.0.0.1", 0)
    if send_buffer is not None:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = Listener(app, bound)
    task = asyncio.create_task(server.listen())
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield address(bound)
    finally:
        server.stop()
        await task


@pytest.fixture
def listen() -> Callable[..., Any]:
    """`async with listen(app) as url`: a real server on a free port."""
    return _listen


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The JSON of a stream's events, without `[DONE]`."""
    lines = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


@pytest.fixture
def read_events() -> Callable[[bytes], list[dict[str, Any]]]:
    return events_of


@pytest.fixture
def small_limits() -> Callable[..., ApiLimits]:
    """ApiLimits with some fields replaced."""

    def make(**fields: Any) -> ApiLimits:
        return replace(ApiLimits(), **fields)

    return make
