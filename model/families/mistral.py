"""Mistral: Llama with a sliding window in every layer, or, from version 0.2 on, without."""

from __future__ import annotations

from dataclasses import replace

from model.config import ModelConfig
from model.families import Family
from model.families.hugging_face import LLAMA_NAMES, Config, llama_like, refuse, whole


def configure(config: Config) -> ModelConfig:
    """Raises ValueError for what the network does not have."""
    refuse(config, attention_bias=(None, False), mlp_bias=(None, False))
    window: int | None = 4096  # of the first release, whose file may be silent
    if "sliding_window" in config:
        unlimited = config["sliding_window"] is None
        window = None if unlimited else whole(config, "sliding_window")
    return replace(llama_like(config, family="mistral"), sliding_window=window)


FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    configure=configure,
    names=LLAMA_NAMES,
    prefix="model.",
)
