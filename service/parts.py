"""Parts: what the roles are composed of, made from the settings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version as distribution_version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from fastapi import FastAPI

from model.checkpoint import open_checkpoint
from model.compression import parse_compression
from model.grammar import Grammars
from model.text.tokenizer import Tokenizer
from service.api.http.auth import only_with_key, open_to_all
from service.api.http.context import ApiLimits, Models, Probes, ServedEncoder, ServedModel
from service.api.http.middleware import any_host
from service.api.http.observer import ApiObserver
from service.api.system.attention import AttentionService
from service.api.system.health import HealthContext
from service.app import build_admin_app, build_app, served_model
from service.cluster import Cluster, ModelEngines
from service.encoders import LoadedEncoder
from service.engine.encoding import EncodingLoop
from service.engine.loop import EngineLoop
from service.engine.observer import Observer
from service.engine.plan import EngineConfig
from service.engine.thread import EngineThread
from service.errors import StartupError
from service.http.exposure import extras_of, keyless_hosts
from service.jobs import job_limits
from service.keys import KeyRing
from service.messages import ENCODING, GENERATING, Event, ModelCard, model_feature
from service.models import AnyLoaded, ModelFiles, cards_of
from service.observability.fan_out import fan_out
from service.observability.logs import log_call
from service.observability.metrics import Metrics, ModelMetrics
from service.observability.tracing import TracedCalls, TracedWork
from service.queues import open_queue
from service.queues.contract import EngineInfo, Queue, QueueLimits
from service.settings import Settings
from service.startup import Loaded
from service.worker.worker import Worker

if TYPE_CHECKING:
    from service.observability.otlp import OtlpTraces

log = logging.getLogger("quire")

VERSION = distribution_version("quire-llm")
JOURNAL_INTERVAL = 0.02
"""Seconds, on a GPU: a reader does not see shorter gaps."""


def make_metrics(settings: Settings, role: str) -> Metrics:
    """Creates the metrics of a process. Their observer also logs each call."""
    metrics = Metrics(
        role=role, version=VERSION, vllm_names=settings.vllm_metrics, on_call=log_call
    )
    metrics.accepts_without_engines.set(settings.accept_without_engines)
    return metrics


def open_traces(settings: Settings, role: str) -> OtlpTraces | None:
    """Returns the exporter of traces; None, without loading its libraries, if there is no endpoint.

    Raises StartupError if they are not installed.
    """
    if settings.otlp_endpoint is None:
        return None
    try:
        from service.observability.otlp import open_otlp
    except ImportError:
        raise StartupError("otlp_endpoint needs OpenTelemetry: quire-llm[otel]") from None
    names = {"service.name": f"quire-{role}", "service.version": VERSION}
    return open_otlp(settings.otlp_endpoint, resource=names)


def open_keys(settings: Settings, metrics: Metrics) -> KeyRing | None:
    """Returns the API keys; None if none are required. Raises StartupError."""
    if settings.keys_file is None:
        return None
    return KeyRing(settings.keys_file.expanduser(), on_reload=metrics.keys_reloaded)


def open_attention(
    settings: Settings, path: Path, observer: ApiObserver
) -> AttentionService | None:
    """Returns the attention maps of a model, if enabled. They load weights when first used."""
    if not settings.attention:
        return None
    from model.attention_maps import AttentionMaps

    maps = AttentionMaps(open_checkpoint(path))
    if maps.config.encoder is not None:
        return None  # a map is of one text
    return AttentionService(maps, api_limits(settings), observer)


async def connect_queue(settings: Settings, metrics: Metrics) -> Queue:
    """Connects to the queue and checks it. Raises StartupError."""
    queue = open_queue(
        settings.queue,
        QueueLimits(
            max_requests=settings.max_queued_requests,
            max_tokens=settings.max_queued_tokens,
            max_per_tenant=settings.max_per_tenant,
            max_bytes=settings.max_stored_bytes,
            max_tenant_bytes=settings.max_tenant_stored_bytes,
            lease=settings.lease,
            resume_window=settings.resume_window,
            sweep_pause=api_limits(settings).sweep_pause,
        ),
        observer=metrics,
    )
    await queue.open()
    return queue


def api_limits(settings: Settings) -> ApiLimits:
    """Returns the API's limits, with those that are settings."""
    limits = ApiLimits(
        max_body_bytes=settings.max_body,
        keep_alive=settings.keep_alive,
        grace=settings.disconnect_grace,
        resume_window=settings.resume_window,
        keep_responses=settings.keep_responses,
    )
    return replace(limits, sweep_interval=min(limits.sweep_interval, limits.sweep_pause / 2))


def journal_interval(settings: Settings, queue: Queue, *, on_gpu: bool) -> float:
    """Seconds between two records of an answer. Records cost nothing in this process."""
    if settings.journal_interval is not None:
        return settings.journal_interval
    return JOURNAL_INTERVAL if on_gpu and queue.shared else 0.0


def engine_of(
    settings: Settings,
    loaded: AnyLoaded,
    observer: Observer,
    *,
    deliver: Callable[[Sequence[Event]], None],
    fail: Callable[[], None],
    settle: Callable[[], bool],
) -> EngineThread:
    """The engine of one model. The steps of several models in a process take turns, so each may
    take a part of the target gap.
    """
    encodes = isinstance(loaded, LoadedEncoder)
    config = EngineConfig(
        max_batch_tokens=loaded.options.max_batch_tokens,
        max_sequences=loaded.options.max_sequences,
        max_model_len=loaded.card.max_model_len,
        target_gap=settings.target_gap / (len(settings.sources) if encodes else 1),
        speculate=settings.speculate,
        kv_compression=parse_compression(loaded.options.kv_compression),
    )
    if isinstance(loaded, LoadedEncoder):
        return EncodingLoop(
            loaded.runner,
            config=config,
            deliver=deliver,
            observer=observer,
            on_failure=lambda _failure: fail(),
            settle=settle,
        )
    return EngineLoop(
        loaded.runner,
        config=config,
        token_bytes=loaded.tokenizer.token_bytes,
        visible_bytes=loaded.tokenizer.visible_bytes,
        eos_ids=loaded.tokenizer.eos_ids,
        deliver=deliver,
        observer=observer,
        on_failure=lambda _failure: fail(),
        grammars=Grammars(
            loaded.tokenizer.token_bytes,
            eos_ids=loaded.tokenizer.eos_ids,
            vocab_size=loaded.card.vocab_size,
        ),
        settle=settle,
        adapters=loaded.adapters,
    )


class EngineSide:
    """The engine of one model, and its worker."""

    def __init__(
        self,
        settings: Settings,
        loaded: AnyLoaded,
        queue: Queue,
        metrics: Metrics,
        *,
        traces: OtlpTraces | None = None,
    ) -> None:
        self.id = uuid4().hex
        self._metrics = metrics.of_model(loaded.card.id)
        observers: list[ModelMetrics | TracedWork] = [self._metrics]
        if traces is not None:
            observers.append(TracedWork(traces.tracer, model=loaded.card.id, engine=self.id))
        observer = fan_out(*observers)
        self._card = loaded.card
        self._cache = None if isinstance(loaded, LoadedEncoder) else loaded.runner
        kinds = (ENCODING,) if self._cache is None else GENERATING
        self._features = (*kinds, *(model_feature(card.key) for card in cards_of([loaded])))
        if self._cache is not None:
            self._metrics.has_cache(
                block_size=self._cache.block_size, num_blocks=self._cache.num_blocks
            )
        self.loop = engine_of(
            settings,
            loaded,
            observer,
            deliver=self._deliver,
            fail=self._fail,
            settle=self._settle,
        )
        on_gpu = isinstance(loaded, Loaded) and loaded.on_gpu
        self.worker = Worker(
            queue,
            self.loop,
            info=self._info,
            observer=observer,
            journal_interval=journal_interval(settings, queue, on_gpu=on_gpu),
        )
        if isinstance(loaded, Loaded) and loaded.followers is not None:
            loaded.followers.when_lost(self._lose_rank)

    def is_live(self) -> bool:
        """Whether the engine makes progress or has nothing to do. Saturated is not dead."""
        return not self.worker.is_stalled

    def _lose_rank(self, reason: str) -> None:
        """Fails the engine, even while it is idle. Called in any thread."""
        log.critical(reason)
        self.worker.fail()

    def _deliver(self, events: Sequence[Event]) -> None:
        self.worker.deliver(events)

    def _settle(self) -> bool:
        return self.worker.settle()

    def _fail(self) -> None:
        self.worker.fail()

    def _info(self) -> EngineInfo:
        latest, card, cache = self._metrics.latest, self._card, self._cache
        info = EngineInfo(
            id=self.id,
            numeric_class=card.numeric_class,
            version=VERSION,
            running=self.worker.running,
            waiting=latest.waiting if latest else 0,
            max_model_len=card.max_model_len,
            tokens_per_second=self._metrics.tokens_per_second(),
            features=self._features,
            model=card.id,
        )
        if cache is None:
            return info
        return replace(
            info,
            blocks_used=latest.blocks_used if latest else 0,
            blocks_cached=latest.blocks_cached if latest else 0,
            blocks_free=latest.blocks_free if latest else cache.num_blocks,
            block_size=cache.block_size,
        )


def all_live(engines: Sequence[EngineSide]) -> bool:
    """Whether each engine of this process makes progress or has nothing to do."""
    return all(engine.is_live() for engine in engines)


def engine_admin_app(
    settings: Settings, engines: Sequence[EngineSide], queue: Queue, metrics: Metrics
) -> FastAPI:
    """Metrics and probes of a process without an API."""
    return build_admin_app(
        HealthContext(queue, Probes(live=partial(all_live, engines))),
        version=VERSION,
        render_metrics=metrics.render,
        check_host=keyless_hosts(settings),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiModel:
    """What a replica of the API needs of a model. `attention`: if its network is in the process."""

    card: ModelCard
    adapters: tuple[ModelCard, ...] = ()
    tokenizer: Tokenizer | None = None
    encoder: ServedEncoder | None = None
    attention: AttentionService | None = None


def api_model(settings: Settings, loaded: AnyLoaded, observer: ApiObserver) -> ApiModel:
    """Of a model that this process computes."""
    attention = open_attention(settings, loaded.path, observer)
    if isinstance(loaded, LoadedEncoder):
        encoder = ServedEncoder(tokenizer=loaded.tokenizer, info=loaded.runner.info)
        return ApiModel(card=loaded.card, encoder=encoder, attention=attention)
    return ApiModel(
        card=loaded.card,
        adapters=loaded.adapters,
        tokenizer=loaded.tokenizer,
        attention=attention,
    )


def api_model_of_files(files: ModelFiles) -> ApiModel:
    """Of a model that other processes compute."""
    encoder = None
    if files.encoder is not None:
        tokenizer, info = files.encoder
        encoder = ServedEncoder(tokenizer=tokenizer, info=info)
    return ApiModel(
        card=files.card, adapters=files.adapters, tokenizer=files.tokenizer, encoder=encoder
    )


def served_models(settings: Settings, models: Sequence[ApiModel], cluster: Cluster) -> Models:
    """The models by their names, and their aliases. Raises StartupError for an alias that is taken
    or has no model.
    """

    def served(model: ApiModel) -> Iterator[ServedModel]:
        """The model, then its adapters, which have all but the weights in common with it."""
        common = served_model(model.tokenizer, lambda: model.card, encoder=model.encoder)
        for card in cards_of([model]):
            engines = cluster.models[card.id]
            yield replace(
                common,
                read_card=partial(getattr, engines, "card"),
                served=partial(_is_served, settings, engines),
                tokens_per_second=partial(getattr, engines, "tokens_per_second"),
                attention=None if card.adapter else model.attention,
            )

    names = [card.id for card in cards_of(models)]
    for alias, name in settings.aliases.items():
        if alias in names:
            raise StartupError(f"model_alias {alias}: a model has this name")
        if name not in names:
            raise StartupError(f"model_alias {alias}: no model is named {name}")
    return Models.of(*chain.from_iterable(map(served, models)), aliases=settings.aliases)


def _is_served(settings: Settings, engines: ModelEngines) -> bool:
    return settings.accept_without_engines or engines.available


class ApiSide:
    """The API's two applications, and what a replica knows of the cluster."""

    def __init__(
        self,
        settings: Settings,
        models: Sequence[ApiModel],
        queue: Queue,
        metrics: Metrics,
        *,
        engines: Sequence[EngineSide] = (),
        keys: KeyRing | None = None,
        traces: OtlpTraces | None = None,
    ) -> None:
        self.draining = False
        self.drain_timeout = settings.drain_timeout
        self.keys = keys
        self.cluster = Cluster(queue, cards_of(models), observer=metrics)
        self.app = build_app(
            queue,
            served_models(settings, models, self.cluster),
            probes=Probes(live=partial(all_live, engines), draining=lambda: self.draining),
            limits=api_limits(settings),
            observer=metrics if traces is None else fan_out(metrics, TracedCalls(traces.tracer)),
            version=VERSION,
            authenticate=only_with_key(keys.find) if keys else open_to_all,
            extras=extras_of(settings),
            check_host=any_host if keys else keyless_hosts(settings),
            cors_origins=settings.cors_origins,
            jobs=job_limits(settings),
        )
        self.admin_app = build_admin_app(
            self.app.state.health,
            version=VERSION,
            render_metrics=metrics.render,
            check_host=keyless_hosts(settings),
        )

    def close_responses(self) -> None:
        """Ends the open responses with the error `shutting_down`."""
        self.app.state.context.closing.set()
