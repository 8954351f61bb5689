"""Attention maps: rows of weights over the past, the same as any other reading of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import attention_recorder
from model.attention_maps import AttentionMaps
from model.attention_recorder import Recorder
from model.checkpoint import load_model, open_checkpoint
from model.transformer import Transformer
from tests.support.builders import tiny_model_config, tiny_weights

TEXT = np.random.default_rng(0).integers(3, 100, 40).tolist()
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "smollm3": {"no_rope_layer_interval": 2},
}


def padded(rows: list[list[float]]) -> torch.Tensor:
    """Rows over the past -> [T, T] with zeros ahead."""
    return torch.tensor([row + [0.0] * (len(rows) - len(row)) for row in rows])


@pytest.fixture(scope="module", params=["folder", "gguf"])
def maps(request: Any, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> AttentionMaps:
    folder: Path = tmp_path_factory.mktemp("maps")
    if request.param == "gguf":
        return AttentionMaps(open_checkpoint(tiny_model.write_gguf(folder / "tiny.gguf")))
    return AttentionMaps(open_checkpoint(tiny_model.write_folder(folder)))


def test_every_row_is_shared_out_over_the_past(maps: AttentionMaps) -> None:
    for layer, head in ((None, None), (0, None), (None, 3), (1, 2)):
        rows = maps.read(TEXT, layer=layer, head=head)
        assert [len(row) for row in rows] == list(range(1, len(TEXT) + 1))
        assert all(weight >= 0 for row in rows for weight in row)
        assert [sum(row) for row in rows] == pytest.approx([1.0] * len(TEXT), abs=1e-5)


@pytest.mark.slow
def test_a_mean_is_the_mean_of_its_parts(maps: AttentionMaps) -> None:
    layers, heads = range(maps.num_layers), range(maps.num_heads)
    parts = torch.stack([
        torch.stack([padded(maps.read(TEXT[:20], layer=layer, head=head)) for head in heads])
        for layer in layers
    ])  # fmt: skip
    assert not torch.allclose(parts[0, 0], parts[0, 1], atol=1e-2), "heads differ"
    for layer in (None, *layers):
        for head in (None, *heads):
            expected = parts if layer is None else parts[layer : layer + 1]
            expected = expected if head is None else expected[:, head : head + 1]
            given = padded(maps.read(TEXT[:20], layer=layer, head=head))
            torch.testing.assert_close(given, expected.mean(dim=(0, 1)), atol=1e-6, rtol=1e-5)


def test_what_comes_later_changes_nothing(maps: AttentionMaps) -> None:
    """A text's map is the beginning of a longer text's."""
    whole = maps.read(TEXT)
    for length in (1, 2, 17):
        for short, long in zip(maps.read(TEXT[:length]), whole, strict=False):
            assert short == pytest.approx(long, abs=1e-5)


def test_nothing_of_the_network_stays(maps: AttentionMaps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part has weights while it computes and only then: at most one has them at a time."""
    made: list[Transformer] = []
    build = attention_recorder._network

    def watched(*model: Any) -> Transformer:
        made.append(build(*model))
        return made[-1]

    monkeypatch.setattr(attention_recorder, "_network", watched)
    alive: list[set[str]] = []

    class Watching(Recorder):
        def __call__(self, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
            network = made[-1]
            alive.append({
                name.rpartition(".attention")[0].rpartition(".mlp")[0] or name
                for name, parameter in network.named_parameters()
                if parameter.device.type != "meta"
            })  # fmt: skip
            return super().__call__(*tensors, **options)

    monkeypatch.setattr(attention_recorder, "Recorder", Watching)
    maps.read(TEXT)
    blocks = [{name.split(".")[1] for name in names} for names in alive]
    assert blocks == [{str(layer)} for layer in range(maps.num_layers)]
    assert {parameter.device.type for parameter in made[-1].parameters()} == {"meta"}


def test_a_recorder_changes_nothing_that_it_listens_to() -> None:
    config = tiny_model_config(sliding_window=5, full_attention_layers=frozenset({1}))
    network = Transformer(config)
    network.load_state_dict(tiny_weights(config))
    tokens_T, positions_T = torch.tensor(TEXT) % config.vocab_size, torch.arange(len(TEXT))
    with torch.inference_mode():
        recorder = Recorder(layer=0, head=None)
        heard = network.logits(network.hidden(tokens_T, positions_T, attend=recorder))
        torch.testing.assert_close(heard, network(tokens_T), atol=0, rtol=0)
    ago = positions_T[:, None] - positions_T
    assert torch.equal(recorder.mean() > 0, (ago >= 0) & (ago < 5)), "what the window shows"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_equals_what_transformers_attends_to(kind: str, tmp_path: Path) -> None:
    """Grouped heads, windows, layers without positions: weight for weight, layer by head."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]})
    peer = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in peer.parameters():
        parameter.data.mul_(4.0 if parameter.dim() == 2 else 1.0)  # sharper than at the start
    peer.save_pretrained(tmp_path)
    with torch.inference_mode():
        theirs = peer(torch.tensor([TEXT]), output_attentions=True).attentions
    maps = AttentionMaps(open_checkpoint(tmp_path))
    assert (maps.num_layers, maps.num_heads) == (3, 4)
    assert load_model(tmp_path).config == maps.config
    for layer in range(3):
        for head in range(4):
            ours = padded(maps.read(TEXT, layer=layer, head=head))
            torch.testing.assert_close(ours, theirs[layer][0, head], atol=1e-5, rtol=0)
    everything = torch.stack([layer[0] for layer in theirs]).mean(dim=(0, 1))
    torch.testing.assert_close(padded(maps.read(TEXT)), everything, atol=1e-5, rtol=0)
    assert everything.max() > 0.2, "sharp enough to tell rows apart"
