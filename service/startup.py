"""Startup: from settings to a tokenizer, a runner and a model card. Loads; serves nothing.

Also sets the environment variables of libraries, before they are imported or first used. What the
operator has set stays.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from model.adapters import Adapter
from model.checkpoint import (
    Checkpoint,
    CheckpointError,
    configure,
    load_model,
    open_checkpoint,
    open_model,
)
from model.checkpoint.adapters import read_adapter
from model.checkpoint.eight_bit import eight_bit_reason
from model.checkpoint.fetch import FetchError, resolve
from model.checkpoint.four_bit import four_bit_reason
from model.checkpoint.gguf_parts import name_without_part
from model.compression import compressed_config, parse_compression
from model.config import ModelConfig
from model.memory import return_free_memory
from model.runners import WHOLE_SUMS, RunnerOptions
from model.text.encoder_tokenizer import EncoderTokenizer
from model.text.tokenizer import Tokenizer
from service.errors import StartupError
from service.messages import ModelCard
from service.setting_types import AdapterSource, ModelSource
from service.settings import Settings

if TYPE_CHECKING:
    from model.parallel.ranks import FollowerProcesses
    from model.runners import Runner
    from model.runners.choose import SelectedRunner


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What an engine has loaded when it is ready."""

    path: Path
    runner: Runner
    tokenizer: Tokenizer
    card: ModelCard
    seconds: float
    fallback_reason: str  # why a faster runner is not used; empty if the fastest one is
    options: RunnerOptions = field(default_factory=RunnerOptions)  # with the chosen sizes
    adapters: tuple[ModelCard, ...] = ()  # in the runner's order
    followers: FollowerProcesses | None = None  # the other ranks of tensor parallelism, if any
    on_gpu: bool = False


@contextmanager
def model_errors() -> Iterator[None]:
    """Converts the errors of an invalid model to StartupError."""
    try:
        yield
    except (CheckpointError, FetchError) as error:
        raise StartupError(f"model: {error}") from None


def fetch_model(settings: Settings, model: ModelSource, *, console: Console) -> Path:
    """Returns a model's file or folder; downloads it if necessary, with a progress bar."""
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
    task = bar.add_task(f"fetching {model.source}", total=None)

    def report(done: int, total: int | None) -> None:
        bar.start()  # not before: most starts download nothing
        bar.update(task, completed=done, total=total)

    try:
        with model_errors():
            return resolve(model.source, cache=cache, progress=report)
    finally:
        if bar.live.is_started:
            bar.stop()


def load_tokenizer(path: Path) -> Tokenizer:
    with model_errors():
        return Tokenizer.from_checkpoint(open_checkpoint(path).tokenizer)


def check_names(cards: Sequence[ModelCard]) -> None:
    """Raises StartupError if two models have one name."""
    names = Counter(card.id for card in cards)
    name, number = names.most_common(1)[0]
    if number > 1:
        raise StartupError(f"{number} models have the name {name}: name them by --model NAME=PATH")


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """A model's part of the KV cache memory of its process."""

    of_all: float = 1.0  # 0 .. 1, of memory that is a setting
    of_rest: float = 1.0  # of what the models before it leave free on a GPU

    @classmethod
    def divide(cls, parts: Sequence[float]) -> list[Self]:
        """One per model, in the order in which they are loaded."""
        return [cls(part, part / sum(parts[index:])) for index, part in enumerate(parts)]


def load_engine(
    settings: Settings,
    model: ModelSource,
    path: Path,
    *,
    memory: MemoryPart = MemoryPart(),
    adapters: Sequence[AdapterSource] = (),
) -> Loaded:
    """Loads weights, adapters and tokenizer and warms up. Takes seconds: not for the event loop.

    Starts the other ranks' processes if there are any. Raises StartupError.
    """
    set_thread_waiting()
    set_rank_interface()
    from model.parallel import RankLost

    began = time.monotonic()
    try:
        loaded = _load(settings, model, path, memory, adapters)
        return_free_memory()
        loaded.runner.warm_up()
    except RankLost as lost:
        raise StartupError(f"tensor parallelism: {lost}") from None
    except ValueError as error:
        raise StartupError(f"runner {settings.runner}: {error}") from None
    return replace(loaded, seconds=time.monotonic() - began)


def _load(
    settings: Settings,
    model: ModelSource,
    path: Path,
    memory: MemoryPart,
    adapters: Sequence[AdapterSource],
) -> Loaded:
    """Loads all, without the warm-up. Raises StartupError if the model cannot be served here."""
    from model.native import NativeUnavailable
    from model.runners.choose import choose_sizes

    num_ranks = settings.tensor_parallel
    read = tuple(load_adapter(each, path) for each in adapters)
    wanted = replace(runner_options(settings), adapters=read)
    try:
        with model_errors():
            checkpoint = open_checkpoint(path)
            _, config = configure(checkpoint)
            choice = select_runner(settings, checkpoint, config, wanted)
            options = choose_sizes(
                wanted,
                runner=choice.name,
                kv_memory=settings.kv_memory,
                memory_share=settings.memory_share * memory.of_rest,
                max_batch_tokens=settings.max_batch_tokens,
                max_sequences=settings.max_sequences,
            )
            options = replace(options, kv_memory=int(options.kv_memory * memory.of_all))
            if choice.name == "cuda":
                options = replace(options, vendor_blas=set_whole_sums())
            if choice.name == "native":
                cache = settings.cache_dir.expanduser() / "packed"
                dtype = "int4" if choice.keeps_blocks else options.dtype
                options = replace(options, weights_cache=cache, dtype=dtype)
            with ThreadPoolExecutor(max_workers=1) as pool:
                reading = pool.submit(load_tokenizer, path)
                if num_ranks > 1:  # an error must not leave ranks behind
                    reading.result()
                runner, followers = _build(path, config, choice, options, num_ranks=num_ranks)
                tokenizer = reading.result()
    except (ValueError, NativeUnavailable, ImportError) as error:
        raise StartupError(f"runner {settings.runner}: {error}") from None
    card = replace(
        card_of(
            settings,
            model,
            path,
            runner.config,
            tokenizer=tokenizer,
            most=longest_text(options, num_blocks=runner.num_blocks),
        ),
        numeric_class=runner.numeric_class,
    )
    digests = [each.digest for each in read]
    return Loaded(
        path=path,
        runner=runner,
        tokenizer=tokenizer,
        card=card,
        adapters=tuple(map(partial(adapter_card, card), adapters, digests)),
        seconds=0.0,
        fallback_reason=choice.fallback_reason,
        options=options,
        followers=followers,
        on_gpu=choice.name == "cuda",
    )


def select_runner(
    settings: Settings, checkpoint: Checkpoint, config: ModelConfig, options: RunnerOptions
) -> SelectedRunner:
    """Returns the runner that the settings select. Raises ValueError as `choose_runner` does."""
    from model.runners.choose import choose_runner

    return choose_runner(
        settings.runner,
        config,
        options,
        num_ranks=settings.tensor_parallel,
        is_alone=settings.is_embedded,
        four_bit_reason=four_bit_reason(checkpoint),
        eight_bit_reason=eight_bit_reason(checkpoint),
    )


def runner_options(settings: Settings) -> RunnerOptions:
    """Returns the options that are settings; sizes that are not set depend on the runner."""
    return RunnerOptions(
        dtype=settings.dtype,
        kv_dtype=settings.kv_dtype,
        kv_compression=settings.kv_compression,
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
    """Returns the runner and, with tensor parallelism, the other ranks' processes."""
    from model.runners import RUNNERS

    if num_ranks > 1:
        from model.parallel.ranks import check_ranks, start_parallel

        check_ranks(num_ranks, runner=choice.name, config=config, options=options)
        return start_parallel(
            path, runner=choice.name, dtype=choice.dtype, options=options, num_ranks=num_ranks
        )
    load = RUNNERS[choice.name]
    if choice.name == "native":  # reads tensors one by one and, if it finds them packed, none
        opened = open_model(path, four_bit=choice.keeps_blocks)
        return load(config, opened.weights, options, opened.digest), None
    # Read in the runner's dtype at once: a second copy would double the memory.
    model = load_model(path, dtype=choice.dtype, eight_bit=choice.keeps_blocks)
    return load(config, model.weights, options, model.digest), None


def load_card(
    settings: Settings, model: ModelSource, path: Path, tokenizer: Tokenizer
) -> ModelCard:
    """Returns the card of a replica without a runner; engines report what it leaves unknown."""
    with model_errors():
        _, config = configure(open_checkpoint(path))
    config = compressed_config(config, parse_compression(settings.kv_compression))
    return card_of(settings, model, path, config, tokenizer=tokenizer)


def card_of(
    settings: Settings,
    model: ModelSource,
    path: Path,
    config: ModelConfig,
    *,
    tokenizer: Tokenizer | EncoderTokenizer,
    most: int | None = None,
) -> ModelCard:
    """Returns a model's card. `most`: tokens that fit the KV cache, or of an encoder's input."""
    lengths = (config.max_model_len, settings.max_model_len, most)
    return ModelCard(
        id=model.name or name_of(model.source, path),
        max_model_len=min(length for length in lengths if length is not None),
        vocab_size=config.vocab_size,
        numeric_class="unknown",
        created=int(path.stat().st_mtime),
        vocabulary=tokenizer.digest,
        start_ids=config.start_ids,
        source_end=config.end_id,
    )


def load_adapter(source: AdapterSource, base: Path) -> Adapter:
    """Reads an adapter of the model with these files. Raises StartupError."""
    try:
        return read_adapter(Path(source.folder).expanduser(), base)
    except CheckpointError as error:
        raise StartupError(f"adapter {source.name}: {error}") from None


def adapter_card(base: ModelCard, source: AdapterSource, digest: str) -> ModelCard:
    """Returns the card of an adapter of a model."""
    card = replace(base, id=source.name, parent=base.id, adapter=digest)
    return card.of_class(base.numeric_class)


def longest_text(options: RunnerOptions, *, num_blocks: int) -> int | None:
    """Tokens of a text that the KV cache holds; None: of any text."""
    slots = num_blocks * options.block_size
    compression = parse_compression(options.kv_compression)
    if compression is None:
        return slots
    most = compression.longest_text(
        slots, block_size=options.block_size, chunk=options.max_batch_tokens
    )
    if most is not None and most < options.block_size:
        raise StartupError("kv_memory is too small for a step of max_batch_tokens")
    return most


def name_of(source: str, path: Path) -> str:
    """Returns a model's default name in the API: the repository id, or the file's name."""
    if not source or Path(source).expanduser().exists():
        return name_without_part(path.stem) if path.is_file() else path.name
    return source


def set_thread_waiting() -> None:
    """Bounds how long idle OpenMP threads spin before they sleep. Call before importing torch.

    A step has hundreds of parallel regions: waking sleeping threads for each costs a third of the
    speed on a quiet machine. Without a bound, a waiting thread occupies a core for milliseconds
    that the API, the queue and local clients need.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(OMP_WAIT_POLICY="ACTIVE", GOMP_SPINCOUNT="10000")


def set_rank_interface() -> None:
    """Makes the ranks of tensor parallelism connect on the loopback interface. The libraries'
    default is one that other machines can reach, or fails if the host name does not resolve.
    """
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")


def set_whole_sums() -> bool:
    """Sets `WHOLE_SUMS`. Call before the first matrix product. Returns whether they are in force:
    only then the vendor BLAS's products can be exact.
    """
    return all(os.environ.setdefault(name, value) == value for name, value in WHOLE_SUMS.items())
