"""Each family against transformers, on tiny random checkpoints; and what families refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import load_model
from model.config import RopeScaling
from model.families import FAMILIES, family_of
from model.runners import RunnerOptions
from model.runners.torch import TorchRunner
from model.transformer import Transformer
from tests.support.builders import Piece, make_batch

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPT2: dict[str, Any] = {
    "vocab_size": 131,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-head-dim": ("llama", {"head_dim": 16}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rope_theta": 100_000.0}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 256}),
    "llama-linear": ("llama", {"rope_parameters": {**LINEAR_ROPE, "rope_theta": 500.0}}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral-unlimited": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-windowed": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-biased": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "smollm3": ("smollm3", {}),
    "smollm3-windowed": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
    ),
    "gpt2": ("gpt2", {}),
    "gpt2-wide": ("gpt2", {"n_inner": 40}),
}
TEXT = np.random.default_rng(0).integers(3, 131, 60).tolist()
DECODED = 12


def reference(kind: str) -> Any:
    """A random model of transformers, with biases and norms that are not all 0 and 1."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, fields = KINDS[kind]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "dtype": "float32"}
    fields = {**(GPT2 if family == "gpt2" else SIZES), **special, **fields}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).eval()
    for name, parameter in model.named_parameters():
        is_vector = parameter.dim() == 1
        with torch.no_grad():
            noise = torch.randn_like(parameter)
            if is_vector:
                parameter.add_(noise * 0.2)
            else:
                parameter.copy_(noise * (1.0 if "embed" in name or "wte" in name else 0.25))
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind: str, tmp_path: Path) -> None:
    """Same logits within 1e-4 and the same greedy tokens, without a cache and paged."""
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    ours = Transformer(loaded.config)
    ours.load_state_dict(loaded.weights)
    with torch.no_grad():
        expected = theirs(torch.tensor([TEXT])).logits[0]
        given = ours(torch.tensor(TEXT))
    assert expected.std() > 0.1, "a reference that says nothing would equal anything"
    assert (given - expected).abs().max() < 1e-4

    options = RunnerOptions(dtype="float32", device="cpu", block_size=4, num_blocks=40)
    runner = TorchRunner(loaded.config, loaded.weights, options=options, digest=loaded.digest)
    with torch.no_grad():
        answer = theirs.generate(
            torch.tensor([TEXT]),
            max_new_tokens=DECODED,
            min_new_tokens=DECODED,
            do_sample=False,
            eos_token_id=None,
        )[0, len(TEXT) :].tolist()
    assert greedy_whole(ours, DECODED) == answer
    assert greedy_paged(runner, DECODED, chunk=17) == answer
    logprobs = expected.log_softmax(-1)[torch.arange(59), torch.tensor(TEXT[1:])]
    scores = dict(enumerate(TEXT[1:]))
    piece = Piece(tokens=TEXT, count=60, blocks=range(15), sample=False, scores=scores)
    output = runner.run(make_batch([piece], vocab_size=131))
    np.testing.assert_allclose(output.score_logprobs_Q, logprobs, atol=2e-4)


def greedy_whole(network: Transformer, count: int) -> list[int]:
    """The likeliest tokens, each from the whole text computed again."""
    tokens = list(TEXT)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(network(torch.tensor(tokens))[-1].argmax()))
    return tokens[len(TEXT) :]


def greedy_paged(runner: TorchRunner, count: int, *, chunk: int) -> list[int]:
    """The likeliest tokens, step by step over blocks that are not in order."""
    tokens, done = list(TEXT), 0
    blocks = [(7 * block + 3) % 40 for block in range(20)]
    while len(tokens) < len(TEXT) + count:
        size = min(chunk, len(tokens) - done)
        done += size
        piece = Piece(tokens=tokens[:done], count=size, blocks=blocks, sample=done == len(tokens))
        output = runner.run(make_batch([piece], vocab_size=131))
        tokens += output.tokens_R.tolist()
    return tokens[len(TEXT) :]


def test_the_table_knows_each_family_by_its_model_types() -> None:
    for model_type in FAMILIES:
        assert model_type in family_of(model_type).model_types
    with pytest.raises(KeyError, match="must be one of bart, bert, distilbert, gpt2, llama"):
        family_of("mamba")


def test_both_spellings_of_rotary_settings() -> None:
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
    old = {**SIZES, "rope_theta": 500.0, "rope_scaling": scaling}
    older = {**old, "rope_scaling": {**scaling, "type": scaling["rope_type"]}}
    del older["rope_scaling"]["rope_type"]
    new = {**SIZES, "rope_parameters": LLAMA3_ROPE}
    both = {**new, "rope_scaling": older["rope_scaling"]}
    configs = [family_of("llama").configure(fields) for fields in (old, older, new, both)]
    assert configs[0] == configs[1] == configs[2] == configs[3]
    assert configs[0].rope_theta == 500.0
    assert configs[0].rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=32
    )


def test_a_silent_file_means_the_familys_own_defaults() -> None:
    def configured(model_type: str, **fields: Any) -> Any:
        return family_of(model_type).configure({**SIZES, **fields})

    assert not configured("llama").tied_head
    assert configured("llama", num_key_value_heads=None).num_kv_heads == 4
    assert configured("mistral").sliding_window == 4096
    assert configured("qwen2", sliding_window=9).sliding_window is None
    assert configured("qwen3").head_dim == 128
    smollm3 = configured("smollm3")
    assert (smollm3.tied_head, smollm3.rope_theta) == (True, 2e6)
    assert smollm3.rope_free_layers == {3}
    assert family_of("gpt2").configure(GPT2).tied_head


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor"),
    ("llama", {"rope_scaling": {"factor": 2.0}}, "rope_scaling: there is a factor and no rope_ty"),
    ("llama", {"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope_scaling"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling must be an object"),
    (
        "llama",
        {"rope_parameters": LLAMA3_ROPE, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        "rope_parameters and rope_scaling differ",
    ),
    (
        "llama",
        {"rope_parameters": LLAMA3_ROPE, "rope_scaling": {**LLAMA3_ROPE, "rope_theta": 1000.0}},
        "rope_parameters and rope_scaling differ",
    ),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_parameters"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_param"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"vocab_size": "many"}, "vocab_size"),
    ("llama", {"hidden_size": None}, "hidden_size"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("qwen2", {"attention_bias": False}, "attention_bias"),
    ("qwen2", {"use_sliding_window": True, "layer_types": ["linear_attention"] * 4}, "layer_types"),
    ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("gpt2", {"activation_function": "relu"}, "activation_function"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
]


@pytest.mark.parametrize(("model_type", "fields", "named"), REFUSED)
def test_refuses_what_the_network_lacks(
    model_type: str, fields: dict[str, Any], named: str
) -> None:
    sizes = GPT2 if model_type == "gpt2" else {**SIZES, "sliding_window": 8}
    family_of(model_type).configure(sizes)
    with pytest.raises(ValueError, match=named):
        family_of(model_type).configure(json.loads(json.dumps({**sizes, **fields})))
