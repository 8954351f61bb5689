"""nomic-bert: BERT with rotary positions, a gated SiLU MLP, and norms as its only biases.

Config fields: `NomicBertConfig` of transformers, and those that the checkpoints' own code named
after GPT-2's.
"""

from __future__ import annotations

from dataclasses import replace

from model.config import ModelConfig, Position
from model.families import Family
from model.families.bert import both, encoder
from model.families.hugging_face import Config, classifier, refuse, rotary, whole

_RENAMED = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
    "activation_function": "hidden_act",
}
_LAYER = "encoder.layers.{i}"


def configure(config: Config) -> ModelConfig:
    """Raises ValueError for what the network does not have."""
    fields = {_RENAMED.get(name, name): value for name, value in config.items()}
    refuse(
        fields,
        hidden_act=("silu", "swiglu"),
        prenorm=(False,),
        use_rms_norm=(False, None),
        rotary_emb_fraction=(1, None),
        rotary_emb_interleaved=(False, None),
        rotary_emb_scale_base=(None,),
        qkv_proj_bias=(False,),
        mlp_fc1_bias=(False,),
        mlp_fc2_bias=(False,),
        num_experts=(None, 0),
    )
    model = encoder({**fields, "hidden_act": "silu"}, family="nomic-bert")
    trained = fields.get("max_trained_positions")  # beyond them, frequencies would be scaled
    longest = model.max_model_len
    if trained is not None:
        longest = min(longest, whole(fields, "max_trained_positions"))
    theta, scaling = rotary(fields, theta=1000.0)
    return replace(
        model,
        max_model_len=longest,
        position=Position.ROTARY,
        rope_theta=theta,
        rope_scaling=scaling,
        gated_mlp=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        classifier=classifier(config, "NomicBertForSequenceClassification"),
    )


FAMILY = Family(
    name="nomic-bert",
    model_types=("nomic_bert", "nomic-bert"),
    configure=configure,
    names={
        "nomic_bert.embeddings.word_embeddings.weight": "embed.weight",
        "nomic_bert.embeddings.token_type_embeddings.weight": "types.weight",
        **both("nomic_bert.emb_ln", "embed_norm"),
        f"nomic_bert.{_LAYER}.attn.Wqkv.weight": tuple(
            f"blocks.{{i}}.attention.{part}.weight" for part in "qkv"
        ),
        f"nomic_bert.{_LAYER}.attn.out_proj.weight": "blocks.{i}.attention.out.weight",
        **both(f"nomic_bert.{_LAYER}.norm1", "blocks.{i}.attention_norm"),
        f"nomic_bert.{_LAYER}.mlp.fc12.weight": "blocks.{i}.mlp.gate.weight",
        f"nomic_bert.{_LAYER}.mlp.fc11.weight": "blocks.{i}.mlp.up.weight",
        f"nomic_bert.{_LAYER}.mlp.fc2.weight": "blocks.{i}.mlp.down.weight",
        **both(f"nomic_bert.{_LAYER}.norm2", "blocks.{i}.mlp_norm"),
        **both("nomic_bert.pooler.dense", "classifier.dense"),
        **both("classifier", "classifier.out"),
    },
    prefix="nomic_bert.",
)
