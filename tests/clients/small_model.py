"""A checkpoint for clients whose prompts are long: `python small_model.py SOURCE TARGET`.

Its tokenizer and chat template are those of SOURCE, a GGUF file. Its network is a small block with
a context of 128K tokens, made so that each answer is the same: "ok" and the end. It runs in the
server's environment, which has gguf.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, WIDTH, CONTEXT = 64, 64, 131_072
ANSWER = "ok"
ARCHITECTURE = "llama"
_SIZES = {
    "block_count": 1,
    "context_length": CONTEXT,
    "embedding_length": HIDDEN,
    "feed_forward_length": WIDTH,
    "attention.head_count": 1,
    "attention.head_count_kv": 1,
    "rope.dimension_count": HIDDEN,
}


def main(source: Path, target: Path) -> None:
    """Writes TARGET."""
    read = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(target), ARCHITECTURE)
    for name, field in read.fields.items():
        if name.startswith("tokenizer."):
            value = field.contents()
            kind = field.types[0]
            part = field.types[-1] if kind is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, kind, sub_type=part)
    for name, size in _SIZES.items():
        writer.add_uint32(f"{ARCHITECTURE}.{name}", size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e6)
    vocabulary: list[str] = read.fields["tokenizer.ggml.tokens"].contents()
    end = int(read.fields["tokenizer.ggml.eos_token_id"].contents())
    for name, values in _tensors(vocabulary, end).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(vocabulary: list[str], end: int) -> dict[str, np.ndarray[Any, Any]]:
    """Attention and feed-forward add nothing, so the next token depends on the last one alone: the
    answer after a line break, with which the chat template ends, and the end after any other.
    """
    line_break, answer = vocabulary.index("Ċ"), vocabulary.index(ANSWER)
    axes = np.eye(2, HIDDEN, dtype=np.float32)
    embedding = np.tile(axes[0], (len(vocabulary), 1))
    embedding[line_break] = axes[1]
    output = np.zeros_like(embedding)
    output[end], output[answer] = 8 * axes
    ones, square = np.ones(HIDDEN, np.float32), np.zeros((HIDDEN, HIDDEN), np.float32)
    return {
        "token_embd.weight": embedding,
        "output.weight": output,
        "output_norm.weight": ones,
        "blk.0.attn_norm.weight": ones,
        "blk.0.ffn_norm.weight": ones,
        "blk.0.attn_q.weight": square,
        "blk.0.attn_k.weight": square,
        "blk.0.attn_v.weight": square,
        "blk.0.attn_output.weight": square,
        "blk.0.ffn_gate.weight": np.zeros((WIDTH, HIDDEN), np.float32),
        "blk.0.ffn_up.weight": np.zeros((WIDTH, HIDDEN), np.float32),
        "blk.0.ffn_down.weight": np.zeros((HIDDEN, WIDTH), np.float32),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
