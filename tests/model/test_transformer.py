"""The network: what it is made of, what a token may see, and that both ways through it agree."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from model.attention import ATTENTION
from model.config import Activation, ModelConfig, Norm, Position, RopeScaling
from model.kvcache import KVCache, blocks_within, bytes_per_block
from model.layers import rotate, rotation
from model.transformer import Transformer
from tests.support.builders import (
    Piece,
    found_compiling,
    make_batch,
    tiny_model_config,
    tiny_weights,
)

GPT2: dict[str, Any] = {
    "norm": Norm.LAYER,
    "position": Position.LEARNED,
    "activation": Activation.GELU_TANH,
    "gated_mlp": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "tied_head": True,
    "num_kv_heads": 4,
}
FLAVOURS: dict[str, dict[str, Any]] = {
    "llama": {},
    "biased": {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "tied_head": True},
    "scaled": {
        "rope_scaling": RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16
        )
    },
    "windowed": {"sliding_window": 5, "full_attention_layers": frozenset({1})},
    "qk_norm": {"qk_norm": True, "head_dim": 16},
    "rope_free": {"rope_free_layers": frozenset({0})},
    "gpt2": GPT2,
}
# Triton's interpreter is slow.
BACKENDS = [
    pytest.param(name, marks=[pytest.mark.slow] if name.startswith("triton") else [])
    for name in ATTENTION
]


def network(config: ModelConfig, *, seed: int = 0) -> Transformer:
    model = Transformer(config)
    model.load_state_dict(tiny_weights(config, seed=seed))
    return model.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_stepwise_equals_whole(flavour: str, backend: str) -> None:
    """Texts cut into random chunks and run through the cache give the logits of whole texts."""
    config = tiny_model_config(**FLAVOURS[flavour])
    model = network(config)
    rng = np.random.default_rng(7)
    texts = [rng.integers(0, config.vocab_size, length).tolist() for length in (1, 9, 26)]
    tables = [[5], [3, 9, 1], [0, 8, 2, 7, 4, 6, 10]]
    cache = KVCache(config, block_size=4, num_blocks=11, dtype=torch.float32, device=DEVICE)
    cache.pool.fill_(torch.nan)
    attention = ATTENTION[backend]()
    done, logits = [0] * 3, [torch.empty(0, config.vocab_size)] * 3
    while any(done[i] < len(texts[i]) for i in range(3)):
        open_texts = [i for i in range(3) if done[i] < len(texts[i])]
        counts = [int(rng.integers(1, min(20, len(texts[i]) - done[i]) + 1)) for i in open_texts]
        pieces = [
            Piece(tokens=texts[i][: done[i] + count], count=count, blocks=tables[i])
            for i, count in zip(open_texts, counts, strict=True)
        ]
        states = model.step(make_batch(pieces), cache, attention)
        rows = torch.split(model.logits(states), counts)
        for i, count, row in zip(open_texts, counts, rows, strict=True):
            logits[i] = torch.cat((logits[i], row))
            done[i] += count
    for text, given in zip(texts, logits, strict=True):
        expected = model(torch.tensor(text))
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)


DEVICE = torch.device("cpu")


def test_a_batch_of_texts_equals_each_alone() -> None:
    model = network(tiny_model_config())
    texts = torch.randint(0, 97, (3, 10), generator=torch.Generator().manual_seed(0))
    for text, logits in zip(texts, model(texts), strict=True):
        torch.testing.assert_close(model(text), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_no_token_sees_the_future(flavour: str) -> None:
    model = network(tiny_model_config(**FLAVOURS[flavour]))
    text = torch.arange(1, 13)
    changed = text.clone()
    changed[7] = 50
    before, after = model(text), model(changed)
    assert torch.equal(before[:7], after[:7])
    assert not torch.allclose(before[7:], after[7:], atol=1e-2)


def test_a_window_hides_what_is_older() -> None:
    """In one layer, a query sees `window` tokens, itself included, and not one more."""
    model = network(tiny_model_config(num_layers=1, sliding_window=4))
    text = torch.arange(1, 11)
    for position, seen in ((6, True), (5, False)):
        changed = text.clone()
        changed[position] = 60
        differs = not torch.equal(model(text)[9], model(changed)[9])
        assert differs == seen


def test_rotated_products_depend_on_the_distance_alone() -> None:
    config = tiny_model_config(head_dim=16)
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def product(i: int, j: int) -> float:
        turned = [
            rotate(x, rotation(torch.tensor([p]), config)).flatten() for x, p in ((q, i), (k, j))
        ]
        return float(turned[0] @ turned[1])

    assert math.isclose(product(9, 4), product(105, 100), abs_tol=1e-4)
    assert not math.isclose(product(9, 4), product(9, 5), abs_tol=1e-2)


@pytest.mark.slow
def test_learns_a_small_batch_by_heart() -> None:
    """An ordinary module: gradients reach every parameter and the loss falls to nothing."""
    torch.manual_seed(0)
    config = tiny_model_config(qk_norm=True, qkv_bias=True)
    model = Transformer(config)
    texts = torch.randint(0, config.vocab_size, (4, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = torch.tensor(torch.inf)
    for _ in range(60):
        logits = model(texts[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert loss < 0.05


def test_parameters_have_the_canonical_names() -> None:
    llama = set(Transformer(tiny_model_config(num_layers=1)).state_dict())
    assert llama == {
        "embed.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.out.weight",
        "blocks.0.mlp_norm.weight",
        "blocks.0.mlp.gate_up.weight",
        "blocks.0.mlp.down.weight",
        "norm.weight",
        "head.weight",
    }
    gpt2 = set(Transformer(tiny_model_config(num_layers=1, **GPT2)).state_dict())
    assert gpt2 == {
        "embed.weight",
        "position.weight",
        *(
            f"blocks.0.{layer}.{kind}"
            for layer in (
                "attention_norm",
                "attention.qkv",
                "attention.out",
                "mlp_norm",
                "mlp.up",
                "mlp.down",
            )
            for kind in ("weight", "bias")
        ),
        "norm.weight",
        "norm.bias",
    }


def test_blocks_are_counted_in_bytes() -> None:
    config = tiny_model_config()  # 2 layers, 2 heads of 8
    size = bytes_per_block(config, 4, dtype=torch.float32)
    assert size == 2 * 2 * 4 * 2 * 8 * 4
    assert blocks_within(5 * size + 1, config, block_size=4, dtype=torch.float32) == 5
    with pytest.raises(ValueError, match=str(size)):
        blocks_within(size - 1, config, block_size=4, dtype=torch.float32)


@pytest.mark.slow
def test_shapes_alone_do_not_load_the_compiler() -> None:
    """Drawing an embedding on the meta device imported torch._dynamo: a second of each start."""
    program = (
        "import json, sys, torch\n"
        "from model.transformer import Transformer\n"
        "from tests.support.builders import tiny_model_config\n"
        "with torch.device('meta'):\n"
        "    Transformer(tiny_model_config())\n"
        "print(json.dumps('torch._dynamo' in sys.modules))\n"
    )
    assert found_compiling(program) is False
