"""DistilBERT: BERT without token types, under its own names. Its classifier has a ReLU.

Config fields: `DistilBertConfig` of transformers.
"""

from __future__ import annotations

from dataclasses import replace

from model.config import Activation, ModelConfig
from model.families import Family
from model.families.bert import both, encoder, unneeded
from model.families.hugging_face import Config, classifier, refuse

_RENAMED = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
}
_LAYER = "distilbert.transformer.layer.{i}"


def configure(config: Config) -> ModelConfig:
    """Raises ValueError for what the network does not have."""
    refuse(config, sinusoidal_pos_embds=(False, None, True))  # they are stored as learned ones are
    fields = {_RENAMED.get(name, name): value for name, value in config.items()}
    model = encoder({**fields, "layer_norm_eps": 1e-12}, family="distilbert")
    head = classifier(config, "DistilBertForSequenceClassification")
    if head is not None:
        head = replace(head, activation=Activation.RELU)
    return replace(model, num_types=0, classifier=head)


FAMILY = Family(
    name="distilbert",
    model_types=("distilbert",),
    configure=configure,
    names={
        "distilbert.embeddings.word_embeddings.weight": "embed.weight",
        "distilbert.embeddings.position_embeddings.weight": "position.weight",
        **both("distilbert.embeddings.LayerNorm", "embed_norm"),
        **both(f"{_LAYER}.attention.q_lin", "blocks.{i}.attention.q"),
        **both(f"{_LAYER}.attention.k_lin", "blocks.{i}.attention.k"),
        **both(f"{_LAYER}.attention.v_lin", "blocks.{i}.attention.v"),
        **both(f"{_LAYER}.attention.out_lin", "blocks.{i}.attention.out"),
        **both(f"{_LAYER}.sa_layer_norm", "blocks.{i}.attention_norm"),
        **both(f"{_LAYER}.ffn.lin1", "blocks.{i}.mlp.up"),
        **both(f"{_LAYER}.ffn.lin2", "blocks.{i}.mlp.down"),
        **both(f"{_LAYER}.output_layer_norm", "blocks.{i}.mlp_norm"),
        **both("pre_classifier", "classifier.dense"),
        **both("classifier", "classifier.out"),
        **unneeded("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    },
    prefix="distilbert.",
)
