"""all-minilm-l6-v2 with its real weights: against transformers, and against others' vectors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from model.batch import Floats
from model.checkpoint.fetch import ALL_MINILM_L6_V2, default_cache, resolve
from model.runners.encoding import EncoderTokenizer, EncodingRunner, load_encoder

pytestmark = pytest.mark.slow

# The first numbers of the example in Ollama's docs/api.md, "Generate Embeddings".
PUBLISHED = {
    "Why is the sky blue?": (
        0.010071029, -0.0017594862, 0.05007221, 0.04692972, 0.054916814, 0.008599704, 0.105441414,
        -0.025878139, 0.12958129, 0.031952348,
    ),
    "Why is the grass green?": (
        -0.0098027075, 0.06042469, 0.025257962, -0.006364387, 0.07272725, 0.017194884, 0.09032035,
        -0.051705178, 0.09951512, 0.09072481,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve(ALL_MINILM_L6_V2.alias, cache=default_cache())


@pytest.fixture(scope="module", params=["float32", "int8"])
def loaded(
    folder: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[EncodingRunner, EncoderTokenizer, str]]:
    runner, tokenizer = load_encoder(folder, dtype=request.param, threads=2)
    yield runner, tokenizer, request.param
    runner.close()


def texts() -> list[str]:
    """200 texts in 20 languages: ten pieces of a sentence each, of 1 to all its words."""
    path = Path(__file__).parents[1] / "data" / "languages.json"
    sentences = json.loads(path.read_text(encoding="utf-8"))
    found = []
    for sentence in sentences.values():
        words = sentence.split()
        for part in range(10):
            end = max(1, len(words) * (part + 1) // 10)
            found.append(" ".join(words[part // 3 : end] or words[:1]))
    return found


@pytest.fixture(scope="module")
def references(folder: Path) -> list[Floats]:
    """Mean of the last states of transformers' BERT, of length 1, for each text."""
    from transformers import AutoModel

    encodings = load_encoder(folder, threads=1)[1].encode_batch(texts())

    theirs = AutoModel.from_pretrained(folder).eval()
    found = []
    with torch.no_grad():
        for encoding in encodings:
            states = theirs(torch.tensor([encoding.ids])).last_hidden_state[0]
            found.append(torch.nn.functional.normalize(states.mean(dim=0), dim=0).numpy())
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_200_texts_in_20_languages(
    references: list[Floats], loaded: tuple[EncodingRunner, EncoderTokenizer, str]
) -> None:
    """Cosine above 0.99999 to transformers in float32, above 0.999 in 8 bits."""
    runner, tokenizer, dtype = loaded
    encodings = tokenizer.encode_batch(texts())
    assert len(encodings) == 200
    ours = runner.encode(encodings)
    cosines = [float(a @ b) for a, b in zip(ours, references, strict=True)]
    assert min(cosines) > (0.99999 if dtype == "float32" else 0.999)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)


def test_vectors_that_others_published(
    loaded: tuple[EncodingRunner, EncoderTokenizer, str],
) -> None:
    runner, tokenizer, dtype = loaded
    for text, published in PUBLISHED.items():
        (vector,) = runner.encode([tokenizer.encode(text)])
        np.testing.assert_allclose(
            vector[:10], published, atol=2e-3 if dtype == "float32" else 6e-3
        )
