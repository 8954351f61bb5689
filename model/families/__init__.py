"""Model families: how a checkpoint's config and tensor names become ours. One file a family.

Canonical tensor names, as checkpoints are renamed to (parts) and as the network holds them (fused):

    embed.weight [V, C]                               position.weight [M, C]  (learned positions)
    blocks.{i}.attention_norm.weight [C] (.bias)      blocks.{i}.mlp_norm.weight [C] (.bias)
    blocks.{i}.attention.{q,k,v}.weight (.bias)   ->  blocks.{i}.attention.qkv.weight [(H+2K)D, C]
    blocks.{i}.attention.{q_norm,k_norm}.weight [D]
    blocks.{i}.attention.out.weight [C, HD] (.bias)
    blocks.{i}.mlp.{gate,up}.weight (.bias)       ->  blocks.{i}.mlp.gate_up.weight [2F, C]  (gated)
    blocks.{i}.mlp.up.weight [F, C] (.bias)           blocks.{i}.mlp.down.weight [C, F] (.bias)
    norm.weight [C] (.bias)                           head.weight [V, C]      (absent when tied)

and those of encoders, whose blocks may have the norms behind their sublayers:

    types.weight [types, C]                           embed_norm.weight [C] (.bias)
    classifier.dense.weight [C, C] (.bias)            classifier.norm.weight [C] (.bias)
    classifier.out.weight [labels, C] (.bias)

and those of encoder-decoders, whose encoder has all of the above with the prefix `encoder.`:

    blocks.{i}.cross_norm.weight [C] (.bias)          blocks.{i}.cross.q.weight [HD, C] (.bias)
    blocks.{i}.cross.{k,v}.weight (.bias)         ->  blocks.{i}.cross.kv.weight [2KD, C] (.bias)
    blocks.{i}.cross.out.weight [C, HD] (.bias)       distances.weight [buckets, H]
    head_bias [1, V]                                  encoder.embed.weight    (embed.weight)

Rows of a fused tensor stand in the order of the parts' names in braces. Matrices are [out, in].
Rotary pairs are (d, d + D/2), as Hugging Face has them; a loader that finds them interleaved
(GGUF files of Llama and Mistral) permutes the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The lines that differ between families.

    `names` maps a checkpoint's name to a canonical one (`{i}` stands for the layer), to a tuple of
    canonical parts if the checkpoint has them fused along the output dimension (sizes from the
    config), or to None if a tensor is known but not needed. `transposed` names those stored
    [in, out]. Names that begin with a prefix may also stand without it: checkpoints of the network
    alone, without a head, have none. `own_head` names an output layer that is the embedding if, and
    only if, the checkpoint lacks it; "": as the config states.
    """

    name: str
    model_types: tuple[str, ...]  # `model_type` in config.json; `general.architecture` in GGUF
    configure: Callable[[Mapping[str, Any]], ModelConfig]  # config.json -> ModelConfig
    names: Mapping[str, str | tuple[str, ...] | None]
    transposed: frozenset[str] = field(default_factory=frozenset)
    prefix: str = ""
    own_head: str = ""


def _bart() -> Family:
    from model.families.bart import BART

    return BART


def _bert() -> Family:
    from model.families.bert import BERT

    return BERT


def _distilbert() -> Family:
    from model.families.distilbert import FAMILY

    return FAMILY


def _gpt2() -> Family:
    from model.families.gpt2 import FAMILY

    return FAMILY


def _llama() -> Family:
    from model.families.llama import FAMILY

    return FAMILY


def _marian() -> Family:
    from model.families.bart import MARIAN

    return MARIAN


def _mistral() -> Family:
    from model.families.mistral import FAMILY

    return FAMILY


def _modernbert() -> Family:
    from model.families.modernbert import FAMILY

    return FAMILY


def _nomic_bert() -> Family:
    from model.families.nomic_bert import FAMILY

    return FAMILY


def _qwen2() -> Family:
    from model.families.qwen2 import FAMILY

    return FAMILY


def _qwen3() -> Family:
    from model.families.qwen3 import FAMILY

    return FAMILY


def _roberta() -> Family:
    from model.families.bert import ROBERTA

    return ROBERTA


def _smollm3() -> Family:
    from model.families.smollm3 import FAMILY

    return FAMILY


def _t5() -> Family:
    from model.families.t5 import FAMILY

    return FAMILY


FAMILIES: dict[str, Callable[[], Family]] = {
    "bart": _bart,
    "bert": _bert,
    "distilbert": _distilbert,
    "gpt2": _gpt2,
    "llama": _llama,
    "marian": _marian,
    "mistral": _mistral,
    "mt5": _t5,
    "modernbert": _modernbert,
    "nomic-bert": _nomic_bert,
    "nomic_bert": _nomic_bert,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "roberta": _roberta,
    "smollm3": _smollm3,
    "t5": _t5,
    "xlm-roberta": _roberta,
}
"""`model_type` -> family."""

ENCODERS = frozenset(
    {"bert", "distilbert", "modernbert", "nomic-bert", "nomic_bert", "roberta", "xlm-roberta"}
)
"""Those of `FAMILIES` whose attention is bidirectional: they generate no text."""


def family_of(model_type: str) -> Family:
    """Raises KeyError, whose first argument is a sentence that names the supported ones."""
    if model_type not in FAMILIES:
        raise KeyError(f"model_type must be one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]()
