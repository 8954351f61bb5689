"""The files of the models: are they there, can they be served here, and by which runner?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from model.checkpoint import CheckpointError, configure, open_checkpoint
from model.checkpoint.fetch import find
from model.compression import compressed_config, parse_compression
from model.config import ModelConfig
from model.runners.choose import SelectedRunner
from model.runners.encoding import is_encoder
from service.doctor import Finding, Level
from service.encoders import load_encoder_card
from service.errors import StartupError
from service.settings import Settings
from service.startup import load_tokenizer, runner_options, select_runner


def check_models(settings: Settings) -> Iterator[tuple[Finding, ModelConfig | None]]:
    """One finding per model, and its sizes if it can be served here."""
    for source in settings.sources:
        path = find(source.source, cache=settings.cache_dir.expanduser() / "models")
        if path is None:
            text = "not on this machine yet: fetched at the first start"
            yield Finding("model", text, Level.NOTE, "to fetch it now: quire pull"), None
            continue
        size = sum(file.stat().st_size for file in _files(path)) / 2**20
        try:
            if is_encoder(path):
                card, _, _ = load_encoder_card(settings, source, path)
                length = f"up to {card.max_model_len} tokens"
                text = f"{path.name}: an encoder, {size:,.0f} MiB, {length}, runner torch"
                yield Finding("model", text), None
                continue
            config, choice = _choose(path, settings)
            load_tokenizer(path)
        except (CheckpointError, StartupError, ValueError, ImportError) as error:
            advice = f"{error}; the formats that can be served are in README.md"
            yield Finding("model", f"{path.name} cannot be served", Level.BAD, advice), None
            continue
        text = (
            f"{path.name}: {config.family}, {size:,.0f} MiB, up to {config.max_model_len} tokens,"
            f" runner {choice.name}{', 4 bits' * (choice.name == 'native' and choice.keeps_blocks)}"
        )
        if choice.fallback_reason:
            advice = f"a faster runner cannot serve it: {choice.fallback_reason}"
            yield Finding("model", text, Level.NOTE, advice), config
        else:
            yield Finding("model", text), config


def _choose(path: Path, settings: Settings) -> tuple[ModelConfig, SelectedRunner]:
    checkpoint = open_checkpoint(path)
    _, config = configure(checkpoint)
    choice = select_runner(settings, checkpoint, config, runner_options(settings))
    compression = parse_compression(settings.kv_compression)
    return compressed_config(config, compression), choice


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [each for each in path.iterdir() if each.is_file()]
