"""Bidirectional attention in Triton, and encoders on it: against torch, and the law of bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from model.checkpoint import load_model
from model.checkpoint.sentence_transformers import SentenceSettings
from model.config import Pooling
from model.kernels.attention import Partials, attention_programs, paged_attention
from model.kernels.work_list import WorkList
from model.runners import torch_encoding
from model.runners.encoding import Encoding, describe
from model.runners.packed_encoding import PackedStates, is_supported
from model.runners.torch_encoding import TorchEncoder
from model.transformer import plain_attention
from tests.model.test_encoders import inputs, reference
from tests.support.builders import DEVICE

pytestmark = pytest.mark.slow
MORE = ("bert-labels", "modernbert", "nomic")


def test_every_call_uses_the_device_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--device cuda:1`, kernels were launched on the first GPU."""
    entered: list[torch.device] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        entered.append(tensor.device)
        yield
        entered.append(torch.device("meta"))

    monkeypatch.setattr("torch.cuda.device_of", device_of)
    weight = torch.zeros(2, 2)
    network: Any = SimpleNamespace(embed=SimpleNamespace(weight=weight), blocks=nn.Module())
    packed = PackedStates(network)
    monkeypatch.setattr(packed, "_states", lambda batch: [weight] * len(entered))
    assert len(packed.states([])) == 1
    assert entered == [weight.device, torch.device("meta")]


class Texts:
    """Texts of given lengths: queries packed, keys and values in blocks drawn at random."""

    def __init__(
        self, lengths: list[int], *, heads: tuple[int, int, int], block_size: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        H, K, D = heads
        self.lengths, self.block_size = lengths, block_size
        self.q, self.k, self.v = (
            torch.randn(sum(lengths), count, D).to(DEVICE) for count in (H, K, K)
        )
        needed = [-(-length // block_size) for length in lengths]
        drawn = np.random.default_rng(seed).permutation(2 * sum(needed)).tolist()
        self.table = torch.zeros((len(lengths), max(needed)), dtype=torch.int32)
        pools = torch.full((2, 2 * sum(needed) * block_size, K, D), torch.nan)
        row = 0
        for index, (length, count) in enumerate(zip(lengths, needed, strict=True)):
            blocks, drawn = drawn[:count], drawn[count:]
            self.table[index, :count] = torch.tensor(blocks)
            slots = [blocks[n // block_size] * block_size + n % block_size for n in range(length)]
            pools[:, slots] = torch.stack((self.k, self.v))[:, row : row + length].cpu()
            row += length
        self.pools = pools.to(DEVICE)

    def attend(self, window: int | None, picked: list[int]) -> list[torch.Tensor]:
        """What the kernel computes of some of the texts, in one step."""
        lengths = [self.lengths[index] for index in picked]
        starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=DEVICE)
        (H, D), K = self.q.shape[1:], self.k.shape[1]
        work = WorkList(
            max_rows=sum(lengths), max_sequences=len(lengths), max_context=max(lengths),
            group=H // K, device=DEVICE, most_parts=0,
        )  # fmt: skip
        contexts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        slots = torch.tensor(picked, dtype=torch.int32, device=DEVICE)
        work.fill(starts, contexts, slots, window=window, causal=False)
        texts = self.q.split(self.lengths)
        found = paged_attention(
            torch.cat([texts[index] for index in picked]), self.pools[0], self.pools[1],
            self.table.to(DEVICE), work=work,
            partials=Partials(work, num_heads=H, head_dim=D, device=DEVICE),
            block_size=self.block_size, scale=0.2, window=window,
            programs=attention_programs(DEVICE), causal=False,
        )  # fmt: skip
        return [*found.split(lengths)]

    def expected(self, window: int | None) -> list[torch.Tensor]:
        parts = zip(*(rows.split(self.lengths) for rows in (self.q, self.k, self.v)), strict=True)
        return [
            plain_attention(q, k, v, layer=0, scale=0.2, window=window, causal=False)
            for q, k, v in parts
        ]


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.kernels) for seed in range(3, 60))]
)
def test_attention_to_both_sides(seed: int) -> None:
    """Equal to the sums as defined, and each text to itself alone, bit by bit; in any order."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 80, rng.integers(2, 4)).tolist()
    kv_heads, group = int(rng.choice([1, 2])), int(rng.choice([1, 2, 3]))
    heads = (kv_heads * group, kv_heads, [16, 32, 64, 24][seed % 4])
    texts = Texts(lengths, heads=heads, block_size=[1, 16, 4][seed % 3], seed=seed)
    window = int(rng.integers(1, 70)) if seed % 2 else None
    check(texts, window, order=rng.permutation(len(lengths)).tolist())


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.kernels), 9, 600])
def test_texts_of_several_splits(window: int | None) -> None:
    check(Texts([530, 1], heads=(1, 1, 16), block_size=1, seed=0), window, order=[1, 0])


def check(texts: Texts, window: int | None, *, order: list[int]) -> None:
    found = texts.attend(window, order)
    for ours, index in zip(found, order, strict=True):
        expected = texts.expected(window)[index]
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(texts.attend(window, [index])[0], ours)


def encoder(kind: str, folder: Path, **options: Any) -> TorchEncoder:
    # Torch's functions on a CPU work on 16 numbers at a time, and otherwise on the rest of a step:
    # heads of 32 have rotary tables without a rest.
    sizes = {"hidden_size": 64, "num_attention_heads": 2}
    theirs = reference(kind, num_hidden_layers=1 + (kind == "modernbert"), **sizes)
    theirs.save_pretrained(folder)
    loaded = load_model(folder, dtype="float32")
    assert is_supported(loaded.config)
    info = describe(loaded.config, SentenceSettings(pooling=Pooling.MEAN, normalised=True))
    return TorchEncoder(
        loaded.config, loaded.weights, info=info, digest="0" * 64, dtype="float32",
        device=DEVICE.type, **options,
    )  # fmt: skip


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize(
    "kind", ["bert", *(pytest.param(kind, marks=pytest.mark.kernels) for kind in MORE)]
)
def test_encoders_on_the_kernels(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vectors are those of plain torch within rounding, alone and in a batch the same bits.

    On a CPU torch's GELU has other bits for a view, which the gate of ModernBERT is unless it has a
    single row.
    """
    shortest = 2 if kind == "modernbert" else 1
    monkeypatch.setattr(torch_encoding, "CHECKED", (5, shortest, 20))
    packed = encoder(kind, tmp_path, packed=True)
    plain = encoder(kind, tmp_path)
    assert "triton" in packed.numeric_class
    texts = inputs(types=kind.startswith(("bert", "nomic")))
    batch = [each for each in texts if len(each.ids) >= shortest][:5]
    found = packed.encode(batch)
    for ours, theirs in zip(found, plain.encode(batch), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=2e-5)
    order = [4, 0, 2]
    again = packed.encode([batch[index] for index in order])
    assert [each.tobytes() for each in again] == [found[index].tobytes() for index in order]
    assert packed.encode([batch[3]])[0].tobytes() == found[3].tobytes()


def test_a_batch_whose_bits_depend_on_it_is_not_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The check at startup: a product that sums otherwise for more rows is found out, and told."""
    from model.kernels.matmul import Product
    from model.runners import packed_encoding

    def by_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        y = torch.nn.functional.linear(x, weight, bias)
        return Product(y * (1 + 1e-6 * (len(x) > 100)))

    monkeypatch.setattr(packed_encoding, "multiply", by_rows)
    runner = encoder("bert", tmp_path, packed=True)
    assert "torch" in runner.numeric_class.split("-")
    assert "inputs are computed one by one" in caplog.text
    (vector,) = runner.encode([Encoding((5, 6, 7))])
    assert vector.shape == (64,)
    assert runner.encode([]) == []


def test_a_gpu_without_enough_memory_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model.runners import packed_encoding

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines.")

    monkeypatch.setattr(packed_encoding, "multiply", exhausted)
    with pytest.raises(ValueError, match=r"^the GPU has too little memory: .* 2 GiB; [^\n]*$"):
        encoder("bert", tmp_path, packed=True)
