"""GGUF files: equal to safetensors of the same model, exact dequantisation, refusals."""

from __future__ import annotations

import hashlib
import math
import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from model.checkpoint import CheckpointError, four_bit, load_model, open_checkpoint, open_model
from model.checkpoint.dequantize import dequantize
from model.checkpoint.eight_bit import as_eight_bit
from model.checkpoint.four_bit import as_four_bit
from model.checkpoint.gguf import GgufCheckpoint
from model.checkpoint.gguf_config import rope_scaling, translate
from model.checkpoint.gguf_header import STORAGE, GgufHeader, Storage, TensorEntry
from model.checkpoint.gguf_parts import read_headers
from model.packed_weights import from_blocks, is_matrix
from tests.support.weights import dequantized

QUANTISED = [storage for storage in STORAGE.values() if storage.values > 1]


def test_equals_the_same_model_in_safetensors(tiny_model: Any, tmp_path: Path) -> None:
    ours = load_model(tiny_model.write_gguf(tmp_path / "tiny.gguf"))
    theirs = load_model(tiny_model.write_folder(tmp_path / "folder"))
    assert ours.config == theirs.config
    assert ours.weights.keys() == theirs.weights.keys()
    for name, tensor in theirs.weights.items():
        assert torch.equal(ours.weights[name], tensor), name


@pytest.mark.parametrize("storage", STORAGE.values(), ids=lambda storage: storage.name)
def test_storage_table_is_ggufs(storage: Storage) -> None:
    kind = gguf.GGMLQuantizationType[storage.name]
    assert STORAGE[int(kind)] == storage
    assert gguf.GGML_QUANT_SIZES[kind] == (storage.values, storage.size)


@pytest.mark.slow
@pytest.mark.parametrize("storage", QUANTISED, ids=lambda storage: storage.name)
def test_dequantisation_equals_ggufs(storage: Storage) -> None:
    rng = np.random.default_rng(storage.size)
    blocks = rng.integers(0, 256, (5000, storage.size), np.uint8)
    blocks[:, 1] &= 0x3B  # half-precision scales: neither infinite nor not a number
    blocks[:, 3] &= 0x3B
    blocks[:, -1] &= 0x3B
    blocks[:, -3] &= 0x3B
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[storage.name])
    np.testing.assert_array_equal(dequantize(blocks, storage.name), expected)


@pytest.mark.parametrize("storage", ["F16", "BF16", "Q8_0", "Q4_1", "Q4_0", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_reads_stored_types(
    tiny_model: Any, tmp_path: Path, storage: str, dtype: torch.dtype | None
) -> None:
    exact = tiny_model.weights["model.layers.1.mlp.down_proj.weight"]
    path = tiny_model.write_gguf(tmp_path / "tiny.gguf", storage=storage)
    tensor = load_model(path, dtype=dtype).weights["blocks.1.mlp.down.weight"]
    kind = gguf.GGMLQuantizationType[storage]
    expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(exact, kind), kind))
    stored = {"F16": torch.float16, "BF16": torch.bfloat16}.get(storage, torch.float32)
    assert tensor.dtype == (dtype or stored)
    assert torch.equal(tensor, expected.to(dtype or stored))


@pytest.mark.parametrize("storage", QUANTISED, ids=lambda storage: storage.name)
def test_reads_every_quantised_type(tmp_path: Path, storage: Storage) -> None:
    kind = gguf.GGMLQuantizationType[storage.name]
    rng = np.random.default_rng(storage.size)
    blocks = rng.integers(0, 256, (3, 512 // storage.values * storage.size), np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):  # random scales may be infinite
        loaded = open_checkpoint(tmp_path / "x.gguf").load("blk.0.ffn_up.weight")
        expected = gguf.quants.dequantize(blocks, kind)
    assert loaded.shape == (3, 512)
    np.testing.assert_array_equal(loaded, expected)


def test_names_the_tensor_type_that_is_missing(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    blocks = np.zeros((2, 17), np.uint8)
    kind = gguf.GGMLQuantizationType.MXFP4
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"'blk.0.ffn_up.weight' .* type 39 \(MXFP4\)"):
        open_checkpoint(tmp_path / "x.gguf")


def test_digest_is_of_every_byte(tiny_model: Any, tmp_path: Path) -> None:
    path = tiny_model.write_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    digest = open_checkpoint(path).digest
    assert digest == hashlib.sha256(whole).hexdigest()
    for at in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert open_checkpoint(path).digest != digest


def test_own_head_is_absent_when_tied_and_present_when_not(tiny_model: Any, tmp_path: Path) -> None:
    head = np.ones((tiny_model.vocab_size, 64), np.float32)
    path = tiny_model.write_gguf(tmp_path / "tiny.gguf", extra={"output.weight": head})
    model = load_model(path)
    assert not model.config.tied_head
    assert torch.equal(model.weights["head.weight"], torch.from_numpy(head))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"blk.0.surprise.weight": np.zeros(4, np.float32)}, "unexpected tensors"),
        ({"blk.7.attn_norm.weight": np.zeros(64, np.float32)}, "unexpected tensors"),
        ({"blk.0.attn_norm.bias": np.zeros(64, np.float32)}, "unexpected tensors"),
        ({"rope_freqs.weight": np.full(8, 3, np.float32)}, "frequency scaling"),
        ({"rope_freqs.weight": np.zeros((2, 4), np.float32)}, "malformed"),
        ({"output.weight": np.zeros((3, 64), np.float32)}, "wrong shape"),
    ],
)
def test_refuses_tensors_that_do_not_belong(
    tiny_model: Any, tmp_path: Path, extra: dict[str, Any], message: str
) -> None:
    path = tiny_model.write_gguf(tmp_path / "tiny.gguf", extra=extra)
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


def test_recovers_llama_3_rope_scaling(tiny_model: Any, tmp_path: Path) -> None:
    """Against the formula written out by wavelengths, at Llama 3.1's own sizes."""
    for factor, theta in ((8.0, 500_000.0), (32.0, 500_000.0)):
        factors = []
        for index in range(64):
            wavelength = 2 * math.pi * theta ** (2 * index / 128)
            smooth = (8192 / wavelength - 1) / 3
            if wavelength < 8192 / 4:
                factors.append(1.0)
            elif wavelength > 8192:
                factors.append(factor)
            else:
                factors.append(1 / ((1 - smooth) / factor + smooth))
        stored = np.array(factors, np.float32).tolist()
        scaling = rope_scaling(stored, theta=theta)
        assert scaling is not None
        assert scaling["factor"] == factor
        with pytest.raises(CheckpointError):
            rope_scaling(stored, theta=10_000.0)
    ones = {"rope_freqs.weight": np.ones(8, np.float32)}
    path = tiny_model.write_gguf(tmp_path / "tiny.gguf", extra=ones)
    assert load_model(path).config.rope_scaling is None


def test_translates_gpt2() -> None:
    def entry(*shape: int) -> TensorEntry:
        return TensorEntry(shape=shape, storage=STORAGE[0], start=0, size=0)

    header = GgufHeader(
        file_name="x.gguf",
        metadata={
            "general.architecture": "gpt2",
            "gpt2.block_count": 2,
            "gpt2.embedding_length": 8,
            "gpt2.attention.head_count": 2,
            "gpt2.context_length": 16,
            "gpt2.feed_forward_length": 32,
            "gpt2.attention.layer_norm_epsilon": 1e-5,
        },
        tensors={"token_embd.weight": entry(40, 8), "output.weight": entry(40, 8)},
    )
    assert translate(header) == {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_embd": 8,
        "n_inner": 32,
        "n_head": 2,
        "n_positions": 16,
        "vocab_size": 40,
        "tie_word_embeddings": False,
        "layer_norm_epsilon": 1e-5,
    }


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def _text(value: str) -> bytes:
    return _u64(len(value.encode())) + value.encode()


def _file(*, tensors: bytes = b"", count: int = 0, entries: bytes = b"", keys: int = 0) -> bytes:
    return b"GGUF" + _u32(3) + _u64(count) + _u64(keys) + entries + tensors


def _tensor(name: str, sizes: list[int], kind: int, offset: int) -> bytes:
    return _text(name) + _u32(len(sizes)) + b"".join(map(_u64, sizes)) + _u32(kind) + _u64(offset)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGUF" + _u32(1) + _u64(0) + _u64(0),
        b"GGUF" + struct.pack(">I", 3) + _u64(0) + _u64(0),
        b"GGUF" + _u32(3) + _u64(2**63) + _u64(0),
        b"GGUF" + _u32(3) + _u64(0) + _u64(2**64 - 1),
        _file(entries=_u64(2**62), keys=1),
        _file(entries=_text("k") + _u32(8) + _u64(2**64 - 1), keys=1),
        _file(entries=_text("k") + _u32(99), keys=1),
        _file(entries=_text("k") + _u32(9) + _u32(8) + _u64(1) + _u64(2**40) + b"ab", keys=1),
        _file(entries=_text("k") + _u32(9) + _u32(4) + _u64(2**40), keys=1),
        _file(entries=_text("k") + _u32(9) + _u32(4) + _u64(2**19), keys=1),
        _file(entries=_text("k") + _u32(9) + _u32(8) + _u64(2**19), keys=1),
        _file(entries=_text("k") + _u32(9) + _u32(9) + _u64(1), keys=1),
        _file(entries=_text("k") + _u32(8) + _u64(2) + b"\xff\xff", keys=1),
        _file(entries=2 * (_text("k") + _u32(0) + b"\1"), keys=2),
        _file(entries=_text("general.alignment") + _u32(4) + _u32(0), keys=1),
        _file(tensors=_tensor("t", [2**32, 2**32], 0, 0), count=1),
        _file(tensors=_tensor("t", [4, 2**64 - 1], 0, 0), count=1),
        _file(tensors=_tensor("t", [0], 0, 0), count=1),
        _file(tensors=_tensor("t", [], 0, 0), count=1),
        _file(tensors=_tensor("t", [1] * 9, 0, 0), count=1),
        _file(tensors=_tensor("t", [4], 77, 0), count=1),
        _file(tensors=_tensor("t", [31], 8, 0) + bytes(200), count=1),
        _file(tensors=_tensor("t", [4], 0, 2**64 - 32), count=1),
        _file(tensors=_tensor("t", [4], 0, 0), count=1),
        _file(tensors=_tensor("a", [8], 0, 0) + _tensor("b", [8], 0, 16) + bytes(200), count=2),
        _file(tensors=2 * _tensor("a", [1], 0, 0) + bytes(200), count=2),
    ],
)
def test_refuses_malformed_heads_at_once(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(CheckpointError) as refused:
        read_headers(path)
    taken, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 1
    assert peak < 2 * 1024**2
    assert "bad.gguf" in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


def refusal(path: Path) -> str:
    """Why a checkpoint is refused; nothing where it loads."""
    try:
        load_model(path)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_mutations_load_or_are_refused(tiny_model: Any, tmp_path: Path, seed: int) -> None:
    """Flipped and missing bytes: nothing but a model or a CheckpointError, and little memory."""
    path = tiny_model.write_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    head = whole.index(b"output_norm.weight")  # beyond it lies mostly data
    rng = random.Random(seed)
    for _ in range(25):
        mutated = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.choice([rng.randrange(700), rng.randrange(head - 400, head + 1200)])
            mutated[at] = rng.choice([mutated[at] ^ 1 << rng.randrange(8), 0, 0xFF])
        if rng.random() < 0.2:
            del mutated[rng.randrange(len(mutated)) :]
        path.write_bytes(mutated)
        tracemalloc.start()
        assert str(tmp_path) not in refusal(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 * 1024**2


@pytest.mark.slow
def test_reads_the_default_model(default_model: Path) -> None:
    model = load_model(default_model, dtype=torch.bfloat16)
    assert model.digest.startswith("b179c952")
    assert model.config.num_layers == 30
    assert sum(tensor.numel() for tensor in model.weights.values()) == 134_515_008
    reader = gguf.GGUFReader(default_model)
    stored = {tensor.name: tensor for tensor in reader.tensors}["blk.3.ffn_down.weight"]
    expected = gguf.quants.dequantize(stored.data, stored.tensor_type)
    ours = model.weights["blocks.3.mlp.down.weight"]
    assert torch.equal(ours, torch.from_numpy(expected).bfloat16())


@pytest.mark.parametrize("storage", ["Q4_0", "Q4_1", "Q4_K"])
def test_blocks_of_four_bits_keep_their_codes(storage: str) -> None:
    """Q4_K's scales are rounded to half precision; those of the others are exact."""
    size = next(known.size for known in STORAGE.values() if known.name == storage)
    rng = np.random.default_rng(size)
    blocks = rng.integers(0, 256, (3000, size), np.uint8)
    blocks[:, [1, 3]] &= 0x3B
    found = dequantized(four_bit.CONVERSIONS[storage](blocks).reshape(len(blocks), -1))
    expected = dequantize(blocks, storage)
    if storage == "Q4_K":
        half = np.finfo(np.float16)
        error = np.abs(found - expected)
        assert (error <= half.eps * (np.abs(expected) + 2 * 1.2 * 63) / 2).all()
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999999
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("storage", ["Q4_0", "Q4_1"])
def test_layers_are_read_in_four_bits(tiny_model: Any, tmp_path: Path, storage: str) -> None:
    """The same numbers as dequantised ones, rotary pairs and fused matrices included."""
    path = tiny_model.write_gguf(tmp_path / "tiny.gguf", storage=storage)
    floats, blocks = open_model(path).weights, open_model(path, four_bit=True).weights
    matrices = 0
    for name, values in floats.items():
        found = blocks[name]
        if name.startswith("blocks.") and values.ndim == 2:
            assert found.dtype == np.uint8
            found = dequantized(np.ascontiguousarray(found))
            matrices += 1
        np.testing.assert_array_equal(found, values)
    assert matrices > 0


def test_layers_are_read_in_eight_bits(tiny_model: Any, tmp_path: Path) -> None:
    """The same numbers as dequantised ones, also rounded; what is no matrix has the dtype."""
    path = tiny_model.write_gguf(tmp_path / "tiny.gguf", storage="Q8_0")
    for dtype in ("float32", "bfloat16"):
        plain = load_model(path, dtype=dtype).weights
        found = load_model(path, dtype=dtype, eight_bit=True).weights
        packed = {name for name, weight in found.items() if weight.dtype == torch.uint8}
        assert packed == {name for name in plain if is_matrix(name)} != set()
        for name, values in plain.items():
            weight = from_blocks(found[name]).to(values.dtype) if name in packed else found[name]
            assert torch.equal(weight, values), name


def test_other_storage_is_not_read_in_eight_bits(tiny_model: Any, tmp_path: Path) -> None:
    path = tiny_model.write_gguf(tmp_path / "tiny.gguf", storage="Q4_0")
    with pytest.raises(CheckpointError, match="is stored as Q4_0; all layers must be Q8_0"):
        load_model(path, eight_bit=True)
    folder = tiny_model.write_folder(tmp_path / "folder")
    with pytest.raises(CheckpointError, match="only GGUF files of type Q8_0"):
        load_model(folder, eight_bit=True)


def test_other_storage_is_not_read_in_four_bits(tiny_model: Any, tmp_path: Path) -> None:
    path = tiny_model.write_gguf(tmp_path / "tiny.gguf", storage="Q5_0")
    with pytest.raises(CheckpointError, match="is stored as Q5_0; all layers must be one of Q4_0"):
        open_model(path, four_bit=True)
    folder = tiny_model.write_folder(tmp_path / "folder")
    with pytest.raises(CheckpointError, match="only GGUF files"):
        open_model(folder, four_bit=True)


@pytest.mark.parametrize("storage", ["Q4_0", "Q8_0"])
def test_a_scale_that_is_not_finite_is_refused(
    tiny_model: Any, tmp_path: Path, storage: str
) -> None:
    path = tiny_model.write_gguf(tmp_path / "tiny.gguf", storage=storage)
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, GgufCheckpoint)
    entry = checkpoint.header.tensors["blk.1.ffn_down.weight"]
    data = bytearray(path.read_bytes())
    data[entry.start : entry.start + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    blocks = (as_four_bit if storage == "Q4_0" else as_eight_bit)(open_checkpoint(path))
    with pytest.raises(CheckpointError, match="a scale is not finite"):
        blocks.load("blk.1.ffn_down.weight")
