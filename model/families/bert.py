"""BERT and RoBERTa (XLM-R, too): learned positions, norms behind the sublayers, GELU, biases.

MiniLM, bge, e5 and gte are BERTs; multilingual-e5 and bge-m3 are XLM-Rs. RoBERTa's first positions
in the table stand for padding; its classifier has two layers of its own instead of BERT's pooler.
Config fields: `BertConfig` and `RobertaConfig` of transformers.
"""

from __future__ import annotations

from dataclasses import replace

from model.config import Activation, ModelConfig, Norm, Position
from model.families import Family
from model.families.hugging_face import Config, classifier, real, refuse, whole

_ACTIVATIONS = {
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
}


def activation(config: Config, field: str) -> Activation:
    """The nonlinearity that a field names; GELU if the file is silent."""
    name = config.get(field, "gelu")
    if name not in _ACTIVATIONS:
        raise ValueError(f"{field} = {name!r} is not supported; {', '.join(_ACTIVATIONS)} are")
    return _ACTIVATIONS[str(name)]


def both(theirs: str, ours: str) -> dict[str, str]:
    """Names of a weight and its bias."""
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}


def _network(prefix: str) -> dict[str, str | None]:
    layer = f"{prefix}encoder.layer.{{i}}"
    return {
        f"{prefix}embeddings.word_embeddings.weight": "embed.weight",
        f"{prefix}embeddings.position_embeddings.weight": "position.weight",
        f"{prefix}embeddings.token_type_embeddings.weight": "types.weight",
        f"{prefix}embeddings.position_ids": None,
        **both(f"{prefix}embeddings.LayerNorm", "embed_norm"),
        **both(f"{layer}.attention.self.query", "blocks.{i}.attention.q"),
        **both(f"{layer}.attention.self.key", "blocks.{i}.attention.k"),
        **both(f"{layer}.attention.self.value", "blocks.{i}.attention.v"),
        **both(f"{layer}.attention.output.dense", "blocks.{i}.attention.out"),
        **both(f"{layer}.attention.output.LayerNorm", "blocks.{i}.attention_norm"),
        **both(f"{layer}.intermediate.dense", "blocks.{i}.mlp.up"),
        **both(f"{layer}.output.dense", "blocks.{i}.mlp.down"),
        **both(f"{layer}.output.LayerNorm", "blocks.{i}.mlp_norm"),
    }


def unneeded(*names: str) -> dict[str, str | None]:
    """Heads of the tasks that the network was trained for first."""
    return {f"{name}.{kind}": None for name in names for kind in ("weight", "bias")}


def encoder(config: Config, *, family: str, offset: int = 0) -> ModelConfig:
    """BERT and its kin without their classifiers. `offset`: as `ModelConfig.position_offset`."""
    refuse(
        config,
        position_embedding_type=("absolute", None),
        is_decoder=(False, None),
        add_cross_attention=(False, None),
        quantization_config=(None,),
    )
    hidden, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    return ModelConfig(
        family=family,
        vocab_size=whole(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=whole(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=whole(config, "intermediate_size"),
        max_model_len=whole({"max_position_embeddings": 512, **config}, "max_position_embeddings")
        - offset,
        norm=Norm.LAYER,
        norm_eps=real(config, "layer_norm_eps", default=1e-12),
        position=Position.LEARNED,
        activation=activation(config, "hidden_act"),
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_head=True,
        bidirectional=True,
        post_norm=True,
        embed_norm=True,
        position_offset=offset,
        num_types=_num_types(config),
    )


def _num_types(config: Config) -> int:
    types = config.get("type_vocab_size", 2)
    return 0 if types == 0 else whole({"type_vocab_size": types}, "type_vocab_size")


def configure_bert(config: Config) -> ModelConfig:
    """Raises ValueError for what the network does not have."""
    model = encoder(config, family="bert")
    return replace(model, classifier=classifier(config, "BertForSequenceClassification"))


def configure_roberta(config: Config) -> ModelConfig:
    """Raises ValueError for what the network does not have."""
    padding = config.get("pad_token_id", 1)
    if type(padding) is not int or padding < 0:
        raise ValueError("pad_token_id must be a whole number from 0")
    model = encoder(config, family="roberta", offset=padding + 1)
    names = ("RobertaForSequenceClassification", "XLMRobertaForSequenceClassification")
    return replace(model, classifier=classifier(config, *names))


BERT = Family(
    name="bert",
    model_types=("bert",),
    configure=configure_bert,
    names={
        **_network("bert."),
        **both("bert.pooler.dense", "classifier.dense"),
        **both("classifier", "classifier.out"),
        **unneeded(
            "cls.predictions",
            "cls.predictions.decoder",
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.seq_relationship",
        ),
    },
    prefix="bert.",
)

ROBERTA = Family(
    name="roberta",
    model_types=("roberta", "xlm-roberta"),
    configure=configure_roberta,
    names={
        **_network("roberta."),
        **both("classifier.dense", "classifier.dense"),
        **both("classifier.out_proj", "classifier.out"),
        **unneeded(
            "roberta.pooler.dense", "lm_head", "lm_head.decoder", "lm_head.dense",
            "lm_head.layer_norm",
        ),
    },
    prefix="roberta.",
)  # fmt: skip
