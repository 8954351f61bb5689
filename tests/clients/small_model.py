"""Small checkpoints for what the default model cannot do: `small_model.py KIND SOURCE TARGET`.

Their tokenizer is that of SOURCE, a GGUF file. The network is a small block with a context of 128K
tokens, whose weights are made for the answers of its KIND:

agent       for the long prompts of agents. If the prompt has the token "times", the text "ok";
            otherwise a call of a shell tool with the command "times". So an agent that runs its
            tools gets the text in the second turn.
thinker     "ok" after a thought. Its chat template opens the thinking.

It runs in the server's environment, which has gguf.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Tensors = dict[str, np.ndarray[Any, Any]]

HIDDEN, WIDTH, CONTEXT = 64, 64, 131_072
COMMAND, ANSWER = "times", "ok"
OPENING = ("<", "tool", "_", "call", ">")  # the tokens of <tool_call>
SHELLS = ("B", "exec")  # tokens that begin the names of shell tools
LINE_BREAK, BLANK = "\u010a", "\u0120"  # as byte-level vocabularies spell them
THOUGHT = ("H", "</", "think", ">")  # tokens
THINKING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
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


def main(kind: str, source: Path, target: Path) -> None:
    """Writes TARGET."""
    read = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(target), ARCHITECTURE)
    for name, field in read.fields.items():
        if name.startswith("tokenizer."):
            value = field.contents()
            if kind == "thinker" and name == "tokenizer.chat_template":
                value = THINKING_TEMPLATE
            part = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, field.types[0], sub_type=part)
    for name, size in _SIZES.items():
        writer.add_uint32(f"{ARCHITECTURE}.{name}", size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e6)
    vocabulary: list[str] = read.fields["tokenizer.ggml.tokens"].contents()
    end = int(read.fields["tokenizer.ggml.eos_token_id"].contents())
    tensors = {"agent": _agent, "thinker": _thinker}[kind](vocabulary, end)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _thinker(vocabulary: list[str], end: int) -> Tensors:
    """A chain: each token depends on the last one. The chat template ends with a line break."""
    ids = {token: index for index, token in enumerate(vocabulary)}
    one, other, *links = np.eye(HIDDEN, dtype=np.float32)
    embedding = np.tile(one + other, (len(vocabulary), 1))
    output = np.zeros_like(embedding)
    output[end] = 8 * other
    chain = (LINE_BREAK, *THOUGHT, ANSWER)
    for link, token, following in zip(links, chain, chain[1:], strict=False):
        embedding[ids[token]] = one + link
        output[ids[following]] = 8 * link
    return _network(embedding, output)


def _agent(vocabulary: list[str], end: int) -> Tensors:
    """One head looks for the command in the context; all else depends on the last token.

    Axes of the residual stream: `one` is set for all tokens, `found` if the command is in the
    context; the others are classes of tokens. The grammar of tools does the rest: what it forces
    needs no preference.
    """
    ids = {token: index for index, token in enumerate(vocabulary)}
    one, found, other, start, said, *links = np.eye(HIDDEN, dtype=np.float32)
    embedding = np.tile(one + other, (len(vocabulary), 1))
    embedding[ids[LINE_BREAK]] = one + start
    embedding[ids[COMMAND]] = one + said
    output = np.zeros_like(embedding)
    output[end] = 8 * other
    output[ids[ANSWER]] = 4 * start + 4 * found  # the chat template ends with a line break
    output[ids[OPENING[0]]] = 8 * start - 8 * found
    for link, token, following in zip(links, OPENING, OPENING[1:], strict=False):
        embedding[ids[token]] = one + link
        output[ids[following]] = 8 * link
    for token in SHELLS:
        output[ids[token]] = 2 * one
    output[ids[COMMAND]] = 4 * one - 8 * said
    output[ids[BLANK + '"']] = 3 * one
    output[ids['"']] = one + 8 * said
    output[ids["}"]] = output[ids["}}"]] = 1.5 * one
    blank = np.zeros((HIDDEN, HIDDEN), np.float32)
    query, key, value, product = blank.copy(), blank.copy(), blank.copy(), blank.copy()
    query[-2], key[-2] = 6 * one, 6 * said  # the pair of dimensions that turns least
    value[0], product[:, 0] = said, 0.2 * found
    return _network(embedding, output, query=query, key=key, value=value, product=product)


def _network(
    embedding: np.ndarray[Any, Any], output: np.ndarray[Any, Any], **attention: Any
) -> Tensors:
    """The checkpoint of a block. What is not given is 0."""
    blank, ones = np.zeros((HIDDEN, HIDDEN), np.float32), np.ones(HIDDEN, np.float32)
    query, key, value, product = (
        attention.get(name, blank) for name in ("query", "key", "value", "product")
    )
    return {
        "token_embd.weight": embedding,
        "output.weight": output,
        "output_norm.weight": ones,
        "blk.0.attn_norm.weight": ones,
        "blk.0.ffn_norm.weight": ones,
        "blk.0.attn_q.weight": query,
        "blk.0.attn_k.weight": key,
        "blk.0.attn_v.weight": value,
        "blk.0.attn_output.weight": product,
        "blk.0.ffn_gate.weight": blank,
        "blk.0.ffn_up.weight": blank,
        "blk.0.ffn_down.weight": blank,
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
