"""Startup: from settings to a tokenizer, a runner and a model card. Loads; serves nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from model.checkpoint import CheckpointError, configure, open_checkpoint
from model.checkpoint.fetch import FetchError, resolve
from model.checkpoint.gguf_parts import name_without_part
from model.config import ModelConfig
from model.memory import return_free_memory
from model.runners import RunnerOptions
from model.text.tokenizer import Tokenizer
from service.errors import StartupError
from service.messages import ModelCard
from service.settings import Settings, bound_spinning, keep_ranks_to_themselves, keep_sums_whole

if TYPE_CHECKING:
    from model.parallel.ranks import FollowerProcesses
    from model.runners import Runner
    from model.runners.choose import SelectedRunner


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What an engine process has in memory when it is ready."""

    runner: Runner
    tokenizer: Tokenizer
    card: ModelCard
    seconds: float
    passed_over: str  # why a faster runner does not serve; empty where none was
    options: RunnerOptions = field(default_factory=RunnerOptions)  # with the sizes that were chosen
    followers: FollowerProcesses | None = None  # the ranks that share the network, if any


@contextmanager
def _said_in_one_line() -> Iterator[None]:
    """Turns what can be wrong with a model into the operator's one line."""
    try:
        yield
    except (CheckpointError, FetchError) as error:
        raise StartupError(f"model: {error}") from None


def fetch_model(settings: Settings, *, console: Console) -> Path:
    """The model's file or folder, fetched where it is not there yet, with a progress bar."""
    bar = Progress(
        "[progress.description]{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    cache = settings.cache_dir.expanduser() / "models"
    task = bar.add_task(f"fetching {settings.model}", total=None)

    def report(done: int, total: int | None) -> None:
        bar.start()  # only now: where nothing is fetched there is nothing to see
        bar.update(task, completed=done, total=total)

    try:
        with _said_in_one_line():
            return resolve(settings.model, cache=cache, progress=report)
    finally:
        if bar.live.is_started:
            bar.stop()


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a fetched model."""
    with _said_in_one_line():
        return Tokenizer.from_checkpoint(open_checkpoint(path).tokenizer)


def load_engine(settings: Settings, path: Path) -> Loaded:
    """Loads weights and tokenizer, packs, warms up. Seconds of work: not for the event loop.

    With tensor parallelism it starts the other ranks' processes. Raises StartupError.
    """
    bound_spinning()
    keep_ranks_to_themselves()
    from model.parallel.runner import RankLost

    began = time.monotonic()
    try:
        loaded = _load(settings, path)
        return_free_memory()
        loaded.runner.warm_up()
    except RankLost as lost:
        raise StartupError(f"tensor parallelism: {lost}") from None
    return replace(loaded, seconds=time.monotonic() - began)


def _load(settings: Settings, path: Path) -> Loaded:
    """All but the warm-up. Raises StartupError for what cannot be served here."""
    from model.native import NativeUnavailable
    from model.runners.choose import choose_runner, choose_sizes

    num_ranks, wanted = settings.tensor_parallel, _options(settings)
    try:
        with _said_in_one_line():
            _, config = configure(open_checkpoint(path))
            choice = choose_runner(settings.runner, config, wanted, num_ranks=num_ranks)
            options = choose_sizes(
                wanted,
                runner=choice.name,
                kv_memory=settings.kv_memory,
                memory_share=settings.memory_share,
                max_batch_tokens=settings.max_batch_tokens,
                max_sequences=settings.max_sequences,
            )
            if choice.name == "cuda":
                options = replace(options, vendor_blas=keep_sums_whole())
            tokenizer = load_tokenizer(path)
            runner, followers = _build(path, config, choice, options, num_ranks=num_ranks)
    except (ValueError, NativeUnavailable, ImportError) as error:
        raise StartupError(f"runner {settings.runner}: {error}") from None
    card = replace(
        card_of(settings, path, runner.config, pool=runner.num_blocks * runner.block_size),
        numeric_class=runner.numeric_class,
    )
    return Loaded(
        runner=runner,
        tokenizer=tokenizer,
        card=card,
        seconds=0.0,
        passed_over=choice.fallback_reason,
        options=options,
        followers=followers,
    )


def _options(settings: Settings) -> RunnerOptions:
    """What of a runner's options is the operator's alone; sizes are chosen for the runner."""
    return RunnerOptions(
        dtype=settings.dtype,
        kv_dtype=settings.kv_dtype,
        device=settings.device,
        block_size=settings.block_size,
        num_threads=settings.threads,
    )


def _build(
    path: Path,
    config: ModelConfig,
    choice: SelectedRunner,
    options: RunnerOptions,
    *,
    num_ranks: int,
) -> tuple[Runner, FollowerProcesses | None]:
    """The runner over the model's weights and, where it shares them, the other ranks."""
    from model.checkpoint import load_model
    from model.parallel.ranks import check_ranks, start_parallel
    from model.runners import RUNNERS

    if num_ranks > 1:
        check_ranks(num_ranks, runner=choice.name, config=config, options=options)
        return start_parallel(
            path, runner=choice.name, dtype=choice.dtype, options=options, num_ranks=num_ranks
        )
    # In the runner's own dtype from the start: a second copy would double the memory.
    model = load_model(path, dtype=choice.dtype)
    return RUNNERS[choice.name](config, model.weights, options, model.digest), None


def load_card(settings: Settings, path: Path) -> ModelCard:
    """What a replica without a runner knows of the model; engines tell it the rest."""
    with _said_in_one_line():
        _, config = configure(open_checkpoint(path))
    return card_of(settings, path, config)


def card_of(
    settings: Settings, path: Path, config: ModelConfig, *, pool: int | None = None
) -> ModelCard:
    """The card of a model; `pool` is the number of tokens that the KV cache holds."""
    lengths = (config.max_model_len, settings.max_model_len, pool)
    return ModelCard(
        id=settings.model_name or name_of(settings.model, path),
        max_model_len=min(length for length in lengths if length is not None),
        vocab_size=config.vocab_size,
        numeric_class="unknown",
        created=int(path.stat().st_mtime),
    )


def name_of(model: str, path: Path) -> str:
    """What clients call a model by default: a repository's id, else the file's name."""
    if not model or Path(model).expanduser().exists():
        return name_without_part(path.stem) if path.is_file() else path.name
    return model
