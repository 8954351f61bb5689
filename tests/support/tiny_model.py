"""A Llama of two layers with random weights, and its tokenizer, as files of both kinds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog, don't you think we'll see IT'S THE END?",
    "1 12 123 1234 12345 2024-11-22 3.14159 100000000",
    "def f(x):\n    return x + 1\n\n\nclass A:\n\tpass\r\n\r\n",
    "你好世界 привет мир مرحبا 😀 👩‍👩‍👧 é e\u0301 naïve",
    "      spaces   and\t\ttabs  \n  \n",
] * 20
SIZES = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "width": 96}


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A Llama of two layers with random weights, under the names that config.json folders use."""

    tokenizer: Tokenizer
    weights: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = field(repr=False)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def rows(self) -> int:
        """Rows of the embedding, which may be more than the vocabulary has tokens."""
        return len(self.weights["model.embed_tokens.weight"])

    def with_rows(self, rows: int) -> TinyModel:
        """The same model with an embedding of another size."""
        embedding = np.random.default_rng(1).standard_normal((rows, SIZES["hidden"]), np.float32)
        return replace(self, weights={**self.weights, "model.embed_tokens.weight": embedding})

    def config(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "vocab_size": self.rows,
            "hidden_size": SIZES["hidden"],
            "num_hidden_layers": SIZES["layers"],
            "num_attention_heads": SIZES["heads"],
            "num_key_value_heads": SIZES["kv_heads"],
            "head_dim": SIZES["head_dim"],
            "intermediate_size": SIZES["width"],
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "eos_token_id": 2,
        }

    def write_folder(self, folder: Path) -> Path:
        """config.json, model.safetensors and the tokenizer's files."""
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config()))
        save_file(self.weights, folder / "model.safetensors")
        self.tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        return folder

    def write_gguf(
        self,
        path: Path,
        *,
        pre: str = "smollm",
        storage: str = "F32",
        extra: Mapping[str, np.ndarray[Any, Any]] | None = None,
        vocabulary: Callable[[gguf.GGUFWriter], None] | None = None,
        split: int = 0,
        metadata: Mapping[str, gguf.GGUFValue] | None = None,
    ) -> Path:
        """The same model as llama.cpp's converter writes it: rotary rows interleaved.

        `vocabulary` writes the tokenizer's metadata; by default, those of the model's own. With
        `split`, files of so many tensors each are written beside `path`, and none there.
        `metadata` replaces or adds entries.
        """
        writer = gguf.GGUFWriter(str(path), "llama", split_max_tensors=split)
        writer.add_block_count(SIZES["layers"])
        writer.add_context_length(128)
        writer.add_embedding_length(SIZES["hidden"])
        writer.add_feed_forward_length(SIZES["width"])
        writer.add_head_count(SIZES["heads"])
        writer.add_head_count_kv(SIZES["kv_heads"])
        writer.add_rope_dimension_count(SIZES["head_dim"])
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        if vocabulary is None:
            self._add_vocabulary(writer, pre)
        else:
            vocabulary(writer)
        writer.kv_data[0].update(metadata or {})
        kind = gguf.GGMLQuantizationType[storage]
        for name, values in self.weights.items():
            stored = _interleaved(name, values)
            if stored.ndim == 2:
                writer.add_tensor(
                    _gguf_name(name), gguf.quants.quantize(stored, kind), raw_dtype=kind
                )
            else:
                writer.add_tensor(_gguf_name(name), stored)
        for name, values in (extra or {}).items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _add_vocabulary(self, writer: gguf.GGUFWriter, pre: str) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        body = json.loads(self.tokenizer.to_str())
        tokens = sorted(body["model"]["vocab"], key=body["model"]["vocab"].__getitem__)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in body["model"]["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(value=False)
        writer.add_chat_template(TEMPLATE)


def _interleaved(name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    heads = SIZES["heads"] if "q_proj" in name else SIZES["kv_heads"] if "k_proj" in name else 0
    if not heads:
        return values
    halves = values.reshape(heads, 2, -1, values.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _gguf_name(name: str) -> str:
    replaced = {
        "model.layers.": "blk.",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for theirs, ours in replaced.items():
        name = name.replace(theirs, ours)
    return name


def build_tiny_model(
    splitter: pre_tokenizers.PreTokenizer, *, specials: Sequence[str] = SPECIALS
) -> TinyModel:
    use_regex = isinstance(splitter, pre_tokenizers.Digits)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    rng = np.random.default_rng(0)
    hidden, width = SIZES["hidden"], SIZES["width"]
    query, key = SIZES["heads"] * SIZES["head_dim"], SIZES["kv_heads"] * SIZES["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (tokenizer.get_vocab_size(), hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(SIZES["layers"]):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.input_layernorm.weight": (hidden,),
            f"{block}.post_attention_layernorm.weight": (hidden,),
            f"{block}.self_attn.q_proj.weight": (query, hidden),
            f"{block}.self_attn.k_proj.weight": (key, hidden),
            f"{block}.self_attn.v_proj.weight": (key, hidden),
            f"{block}.self_attn.o_proj.weight": (hidden, query),
            f"{block}.mlp.gate_proj.weight": (width, hidden),
            f"{block}.mlp.up_proj.weight": (width, hidden),
            f"{block}.mlp.down_proj.weight": (hidden, width),
        }
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return TinyModel(tokenizer=tokenizer, weights=weights)
