"""Startup: from settings to a tokenizer, a runner and a model card. Loads; serves nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from model.config import ModelConfig
from model.memory import return_free_memory
from model.tokenizer import Tokenizer
from service.errors import StartupError
from service.messages import ModelCard
from service.settings import Settings, bound_spinning

if TYPE_CHECKING:
    from model.runners import Runner


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What an engine process has in memory when it is ready."""

    runner: Runner
    tokenizer: Tokenizer
    card: ModelCard
    seconds: float
    passed_over: str  # why a faster runner does not serve; empty where none was


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
    """Loads weights and tokenizer, packs, warms up. Seconds of work: not for the event loop."""
    bound_spinning()
    from model.checkpoint import load_model
    from model.native import NativeUnavailable
    from model.runners import RUNNERS, RunnerOptions
    from model.runners.choose import choose_runner

    began = time.monotonic()
    options = RunnerOptions(
        dtype=settings.dtype,
        kv_dtype=settings.kv_dtype,
        device=settings.device,
        block_size=settings.block_size,
        kv_memory=settings.kv_memory,
        num_threads=settings.threads,
        max_batch_tokens=settings.max_batch_tokens,
        max_sequences=settings.max_sequences,
    )
    try:
        with _said_in_one_line():
            _, config = configure(open_checkpoint(path))
            choice = choose_runner(settings.runner, config, options)
            # In the runner's own dtype from the start: a second copy would double the memory.
            model = load_model(path, dtype=choice.dtype)
            tokenizer = load_tokenizer(path)
        runner = RUNNERS[choice.name](config, model.weights, options, model.digest)
    except (ValueError, NativeUnavailable, ImportError) as error:
        raise StartupError(f"runner {settings.runner}: {error}") from None
    del model
    return_free_memory()
    runner.warm_up()
    card = replace(
        card_of(settings, path, runner.config, pool=runner.num_blocks * runner.block_size),
        numeric_class=runner.numeric_class,
    )
    return Loaded(
        runner=runner,
        tokenizer=tokenizer,
        card=card,
        seconds=time.monotonic() - began,
        passed_over=choice.passed_over,
    )


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
        return path.stem if path.is_file() else path.name
    return model
