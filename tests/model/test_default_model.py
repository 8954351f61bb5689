"""The default model on its real weights: our network against transformers', in float32."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import load_model
from model.runners import RunnerOptions
from model.runners.torch import TorchRunner
from model.text.tokenizer import Tokenizer
from tests.support.builders import Piece, make_batch

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "1, 1, 2, 3, 5, 8, 13,",
    "The three laws of robotics are",
    "Water boils at a temperature of",
    "Dear Sir or Madam,\n\nI am writing to",
    "SELECT name FROM users WHERE",
    "La capitale de l'Espagne est",
    "Die Hauptstadt von Deutschland ist",
    "Q: What is 7 times 8?\nA:",
    "The mitochondria is the",
    "# Heading\n\n- first\n- second\n-",
    "To be, or not to be,",
    "In 1969, humans first",
    "    indented text    with   spaces",
    "<p>Hello <b>world</b></p>",
    "Émile a mangé une pomme à l'été",
    "The quick brown fox jumps over the lazy dog. " * 8,
    "x = 3\ny = 4\nprint(x + y)  # prints",
]


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_log_probabilities_equal_transformers(default_model: Path) -> None:
    """20 prompts, every position: within 0.01, through the paged path that serves."""
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            default_model.parent, gguf_file=default_model.name, dtype=torch.float32
        ).eval()
    tokenizer = Tokenizer.from_checkpoint(default_model)
    model = load_model(default_model, dtype=torch.float32)
    options = RunnerOptions(dtype="float32", num_blocks=64)
    runner = TorchRunner(model.config, model.weights, options=options, digest=model.digest)
    assert len(PROMPTS) == 20
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        with torch.inference_mode():
            logits = theirs(torch.tensor([ids])).logits[0]
        expected = torch.log_softmax(logits.double(), dim=-1)
        following = dict(enumerate(ids[1:]))
        piece = Piece(tokens=ids, blocks=range(40), count=len(ids), scores=following)
        output = runner.run(make_batch([piece], vocab_size=model.config.vocab_size))
        scored = expected[range(len(ids) - 1), ids[1:]].numpy()
        assert np.abs(output.score_logprobs_Q - scored).max() < 0.01
        assert output.tokens_R[0] == int(expected[-1].argmax())
