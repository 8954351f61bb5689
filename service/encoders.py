"""Encoders: loads a model that encodes. What `startup` does for models that generate."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from model.checkpoint import configure, open_checkpoint
from model.checkpoint.sentence_transformers import read_settings
from model.runners import RunnerOptions
from model.runners.encoding import EncoderInfo, EncodingRunner, describe, load_encoder
from model.text.encoder_tokenizer import EncoderTokenizer
from service.errors import StartupError
from service.messages import ModelCard
from service.setting_types import ModelSource
from service.settings import Settings
from service.startup import card_of, model_errors

STEP_TOKENS = 2048
"""Of a step by default, if it is short enough: see `service.engine.encoding`."""
DTYPES = frozenset({"auto", "float32", "bfloat16", "int8"})
"""A process may also have models that generate: their other dtypes do not concern this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEncoder:
    """What an encoding engine has loaded when it is ready."""

    path: Path
    runner: EncodingRunner
    tokenizer: EncoderTokenizer
    card: ModelCard
    adapters: tuple[ModelCard, ...] = ()  # none: these are for models that generate
    seconds: float
    options: RunnerOptions = field(default_factory=RunnerOptions)


def load_encoding_engine(settings: Settings, model: ModelSource, path: Path) -> LoadedEncoder:
    """Loads weights and tokenizer and warms up. Takes seconds. Raises StartupError."""
    began = time.monotonic()
    try:
        with model_errors():
            runner, tokenizer = load_encoder(
                path,
                dtype=settings.dtype if settings.dtype in DTYPES else "auto",
                device=settings.device,
                threads=settings.threads,
            )
            runner.warm_up()
            _, config = configure(open_checkpoint(path))
            most = runner.info.max_tokens
            card = card_of(settings, model, path, config, tokenizer=tokenizer, most=most)
    except (ValueError, ImportError) as error:
        raise StartupError(f"model {model.source}: {error}") from None
    options = RunnerOptions(
        max_batch_tokens=settings.max_batch_tokens or STEP_TOKENS,
        max_sequences=settings.max_sequences or RunnerOptions().max_sequences,
    )
    return LoadedEncoder(
        path=path,
        runner=runner,
        tokenizer=tokenizer,
        card=replace(card, numeric_class=runner.numeric_class),
        seconds=time.monotonic() - began,
        options=options,
    )


def load_encoder_card(
    settings: Settings, model: ModelSource, path: Path
) -> tuple[ModelCard, EncoderTokenizer, EncoderInfo]:
    """What a replica without a runner needs; engines report what the card leaves unknown. Raises
    StartupError.
    """
    with model_errors():
        _, config = configure(open_checkpoint(path))
        info = describe(config, read_settings(path))
        tokenizer = EncoderTokenizer.from_path(path, max_tokens=info.max_tokens)
        card = card_of(settings, model, path, config, tokenizer=tokenizer, most=info.max_tokens)
    return card, tokenizer, info
