"""Decoders in GGUF files that state a pooling: equal to the same model in a folder that embeds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers, processors

from model.batch import Floats
from model.checkpoint import CheckpointError
from model.checkpoint.gguf_vocabulary import PRE_TOKENIZERS
from model.config import Pooling
from model.runners.encoding import is_encoder, load_encoder
from tests.model.test_encoders import reference, write_modules
from tests.support.gguf_encoders import write_encoder
from tests.support.tiny_model import TinyModel, build_tiny_model

pytestmark = pytest.mark.slow

END, TURN = "<|endoftext|>", "<|im_end|>"
TEXTS = [
    "a", "the quick brown fox", "12 and 345", "caf\u00e9 \u4f60\u597d \U0001f600", " two\n\nlines ",
    f"text that spells {END} or {TURN}",
]  # fmt: skip
MODES = {1: "mean_tokens", 2: "cls_token", 3: "lasttoken"}


def write_qwen3(path: Path, mode: str = "lasttoken") -> Path:
    """A random Qwen3 with the files of sentence-transformers, as Qwen3-Embedding has them."""
    splitter = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["qwen2"][0]), "isolated")
    tokenizer = build_tiny_model(splitter, specials=(END, TURN)).tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, 0)]
    )
    path.mkdir(exist_ok=True)
    rows = tokenizer.get_vocab_size()
    reference("qwen3", hidden_size=64, num_attention_heads=4, vocab_size=rows).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    write_modules(path, {f"pooling_mode_{mode}": True}, kinds=("Normalize",))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("qwen3"))


def vectors(path: Path, texts: list[str], *, runner: str = "auto") -> list[Floats]:
    encoder, tokenizer = load_encoder(path, runner=runner, dtype="float32", threads=1)
    found = encoder.encode(tokenizer.encode_batch(texts))
    encoder.close()
    return found


@pytest.mark.parametrize("number", MODES)
@pytest.mark.parametrize("runner", ["native", "torch"])
def test_bits_are_those_of_the_folder(
    folder: Path, tmp_path: Path, number: int, runner: str
) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(folder / name)
    write_modules(tmp_path, {f"pooling_mode_{MODES[number]}": True}, kinds=("Normalize",))
    path = write_encoder(folder, tmp_path / "model.gguf", pooling=number)
    assert is_encoder(path)
    found, expected = vectors(path, TEXTS, runner=runner), vectors(tmp_path, TEXTS, runner=runner)
    assert [each.tobytes() for each in found] == [each.tobytes() for each in expected]
    assert len({each.tobytes() for each in found}) == len(TEXTS)


def test_vectors_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModel

    path = write_encoder(folder, tmp_path / "model.gguf", pooling=3)
    runner, tokenizer = load_encoder(path, dtype="float32", threads=1)
    theirs = AutoModel.from_pretrained(folder)
    for text in TEXTS:
        encoding = tokenizer.encode(text)
        assert encoding.ids[-1] == 0, "the end, from which the embedding is taken"
        with torch.no_grad():
            state = theirs(torch.tensor([encoding.ids])).last_hidden_state[0, -1].numpy()
        (ours,) = runner.encode([encoding])
        assert float(ours @ state) / float(np.linalg.norm(state)) > 0.999999


def test_tokens_are_those_of_the_folder(folder: Path, tmp_path: Path) -> None:
    """Text that spells a special token is text in both."""
    path = write_encoder(folder, tmp_path / "model.gguf", pooling=3)
    _, ours = load_encoder(path)
    _, theirs = load_encoder(folder)
    draw = random.Random(1)
    alphabet = f"abc 19.\n\u00e9\u4e00'{END}"
    texts = ["".join(draw.choices(alphabet, k=draw.randint(0, 40))) for _ in range(500)]
    for text in [*TEXTS, *texts]:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.encode_pair(text, "a") == theirs.encode_pair(text, "a"), text
        assert ours.encode(text, truncate_to=3) == theirs.encode(text, truncate_to=3), text
    assert [ours.token_text(id_) for id_ in range(80)] == [
        theirs.token_text(id_) for id_ in range(80)
    ]


@pytest.mark.parametrize(("number", "embeds"), [(None, False), (0, False), (1, True), (3, True)])
def test_a_decoder_embeds_if_the_file_states_a_pooling(
    tiny_model: TinyModel, tmp_path: Path, number: int | None, *, embeds: bool
) -> None:
    """Llama, too, whose rotary rows are stored in another order."""
    import gguf

    entry = gguf.GGUFValue(value=number, type=gguf.GGUFValueType.UINT32)
    metadata = {} if number is None else {"llama.pooling_type": entry}
    path = tiny_model.write_gguf(tmp_path / "model.gguf", metadata=metadata)
    assert is_encoder(path) == embeds
    if embeds:
        folder = tiny_model.write_folder(tmp_path / "folder")
        write_modules(folder, {f"pooling_mode_{MODES[number or 0]}": True}, kinds=("Normalize",))
        for ours, theirs in zip(vectors(path, TEXTS), vectors(folder, TEXTS), strict=True):
            assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("key", ["general.name", "general.basename"])
def test_qwen3_embedding_has_its_prompts_and_its_end(
    folder: Path, tmp_path: Path, key: str
) -> None:
    """Files of before llama.cpp's converter knew the model lack the end of a text."""
    extra: dict[str, Any] = {key: "Qwen3 Embedding 0.6B", "tokenizer.ggml.add_eos_token": None}
    extra |= {"tokenizer.ggml.eos_token_id": 1}
    path = write_encoder(folder, tmp_path / "model.gguf", pooling=3, extra=extra)
    runner, tokenizer = load_encoder(path)
    assert {*runner.info.prompts} == {"query", "document"}
    assert runner.info.prompts["query"].endswith("\nQuery:")
    assert (runner.info.pooling, runner.info.normalised) == (Pooling.LAST, True)
    assert tokenizer.encode("a").ids[-1] == 0
    unnamed = write_encoder(
        folder, tmp_path / "unnamed.gguf", pooling=3, extra=extra | {key: "Other"}
    )
    runner, tokenizer = load_encoder(unnamed)
    assert (runner.info.prompts, tokenizer.num_special) == ({}, 0)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"qwen3.pooling_type": 4}, "pooling_type 4 is not supported; 0 to 3 are. Classifiers"),
        ({"qwen3.attention.causal": False}, "qwen3 is supported as a decoder only"),
        ({"tokenizer.ggml.model": "t5"}, "the vocabulary type 't5' is not supported"),
    ],
)
def test_wrong_files_are_refused(
    folder: Path, tmp_path: Path, extra: dict[str, Any], message: str
) -> None:
    path = write_encoder(folder, tmp_path / "model.gguf", pooling=3, extra=extra)
    with pytest.raises(CheckpointError, match=message):
        load_encoder(path)


def test_the_beside_lying_files_do_not_count(folder: Path, tmp_path: Path) -> None:
    """A GGUF file states its pooling itself."""
    (tmp_path / "modules.json").write_text(json.dumps({"wrong": True}))
    path = write_encoder(folder, tmp_path / "model.gguf", pooling=None)
    assert not is_encoder(path)
