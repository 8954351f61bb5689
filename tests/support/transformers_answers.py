"""The answers that `transformers` computes from a folder that training wrote."""

from __future__ import annotations

from pathlib import Path

import torch

from model.text.tokenizer import Tokenizer


def greedy_logprobs(folder: Path, prompt: str, num: int) -> list[float]:
    """Log probabilities of the tokens of a decoder's greedy answer."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    tokens, found = Tokenizer.from_checkpoint(folder).encode(prompt), []
    with torch.no_grad():
        for _ in range(num):
            best = network(torch.tensor([tokens])).logits[0, -1].log_softmax(-1).max(-1)
            tokens.append(int(best.indices))
            found.append(float(best.values))
    return found
