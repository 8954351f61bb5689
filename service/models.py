"""Models: fetches and loads all models of a process, those that generate and those that encode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from rich.console import Console

from model.runners.encoding import EncoderInfo, is_encoder
from model.text.encoder_tokenizer import EncoderTokenizer
from model.text.tokenizer import Tokenizer
from service.encoders import LoadedEncoder, load_encoder_card, load_encoding_engine
from service.errors import StartupError
from service.messages import ModelCard
from service.setting_types import AdapterSource, ModelSource
from service.settings import Settings
from service.startup import (
    Loaded,
    MemoryPart,
    adapter_card,
    check_names,
    fetch_model,
    load_adapter,
    load_card,
    load_engine,
    load_tokenizer,
    model_errors,
    name_of,
)

AnyLoaded = Loaded | LoadedEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """What a replica without a runner has of a model: a tokenizer if it generates, else an
    encoder's.
    """

    card: ModelCard
    adapters: tuple[ModelCard, ...] = ()
    tokenizer: Tokenizer | None = None
    encoder: tuple[EncoderTokenizer, EncoderInfo] | None = None


def load_engines(settings: Settings, *, console: Console) -> list[AnyLoaded]:
    """Fetches and loads all models, one after another; several runners compute in turns. Raises
    StartupError.
    """
    from model.runners.turns import Turns, encode_in_turns, take_turns

    found = _fetch_all(settings, console=console)
    generating = [index for index, (_, _, encodes) in enumerate(found) if not encodes]
    adapters = _adapters_of(settings, found)
    parts = dict(zip(generating, _memory_parts(settings, generating), strict=True))
    models: list[AnyLoaded] = []
    for index, (source, path, encodes) in enumerate(found):
        if encodes:
            models.append(load_encoding_engine(settings, source, path))
        else:
            models.append(
                load_engine(
                    settings, source, path, memory=parts[index], adapters=adapters.get(index, ())
                )
            )
    check_names(cards_of(models))
    if len(models) == 1:
        return models
    turns = Turns()
    return [
        replace(each, runner=take_turns(each.runner, turns))
        if isinstance(each, Loaded)
        else replace(each, runner=encode_in_turns(each.runner, turns))
        for each in models
    ]


def load_cards(settings: Settings, *, console: Console) -> list[ModelFiles]:
    """Fetches all models and reads what a replica without a runner needs of them. Raises
    StartupError.
    """
    models = []
    found = _fetch_all(settings, console=console)
    adapters = _adapters_of(settings, found)
    for index, (source, path, encodes) in enumerate(found):
        if encodes:
            card, encoder, info = load_encoder_card(settings, source, path)
            models.append(ModelFiles(card=card, encoder=(encoder, info)))
        else:
            tokenizer = load_tokenizer(path)
            card = load_card(settings, source, path, tokenizer)
            of_model = tuple(_card_of(card, each, path) for each in adapters.get(index, ()))
            models.append(ModelFiles(card=card, adapters=of_model, tokenizer=tokenizer))
    check_names(cards_of(models))
    return models


class HasCards(Protocol):
    """What has a card, and those of its adapters."""

    @property
    def card(self) -> ModelCard: ...
    @property
    def adapters(self) -> Sequence[ModelCard]: ...


def cards_of(models: Sequence[HasCards]) -> list[ModelCard]:
    """The cards of all models, each followed by those of its adapters."""
    return [card for each in models for card in (each.card, *each.adapters)]


def close_runners(models: Sequence[AnyLoaded]) -> None:
    """Frees memory and threads; the engines have ended."""
    for each in models:
        each.runner.close()


def _fetch_all(settings: Settings, *, console: Console) -> list[tuple[ModelSource, Path, bool]]:
    """Each model's source, its files, and whether it encodes."""
    found = []
    for source in settings.sources:
        path = fetch_model(settings, source, console=console)
        with model_errors():
            found.append((source, path, is_encoder(path)))
    return found


def _adapters_of(
    settings: Settings, found: Sequence[tuple[ModelSource, Path, bool]]
) -> dict[int, list[AdapterSource]]:
    """The adapters of each model, by its index. Raises StartupError."""
    names = [source.name or name_of(source.source, path) for source, path, _ in found]
    adapters: dict[int, list[AdapterSource]] = {}
    for each in settings.adapters:
        if each.base is not None and each.base not in names:
            raise StartupError(f"adapter {each.name}: no model is named {each.base}")
        index = 0 if each.base is None else names.index(each.base)
        if found[index][2]:
            raise StartupError(
                f"adapter {each.name}: {names[index]} is an encoder; adapters are for"
                " models that generate"
            )
        adapters.setdefault(index, []).append(each)
    return adapters


def _card_of(base: ModelCard, adapter: AdapterSource, path: Path) -> ModelCard:
    """The card of an adapter of a model with these files, which a replica without a runner reads
    to refuse what engines refuse.
    """
    return adapter_card(base, adapter, load_adapter(adapter, path).digest)


def _memory_parts(settings: Settings, generating: Sequence[int]) -> list[MemoryPart]:
    """Of the KV cache memory, which encoders do not have."""
    parts = [settings.memory_parts[index] for index in generating]
    return MemoryPart.divide([part / sum(parts) for part in parts])
