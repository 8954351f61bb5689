"""A tiny random model and batches for it, with defaults: for every test that wants the real engine.

Nothing here replaces what is tested: the weights are random, all else is the real thing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from model.batch import Batch, SamplingBatch
from model.config import ModelConfig, Position
from model.encoder_decoder import network_of

# Where kernels run in tests, and in which narrow type: interpreted, products in bf16 are wrong.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal noise on that device; the same for equal seeds of torch."""
    return torch.randn(shape).to(device=DEVICE, dtype=dtype)


def found_compiling(program: str) -> Any:
    """What a program finds in a process where Triton compiles instead of interpreting."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, env=variables
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def tiny_model_config(**overrides: Any) -> ModelConfig:
    """Two small Llama blocks; any field can be set."""
    fields: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_model_len": 512,
        **overrides,
    }
    return ModelConfig(**fields)


def tiny_seq2seq_config(**overrides: Any) -> ModelConfig:
    """A small T5: an encoder of one block, a decoder of two."""
    fields: dict[str, Any] = {
        "family": "t5",
        "num_kv_heads": 4,
        "position": Position.RELATIVE,
        "num_buckets": 8,
        "max_distance": 20,
        "scaled_scores": False,
        **overrides,
    }
    encoder = tiny_model_config(
        **{**fields, "num_layers": 1, "bidirectional": True, "tied_head": True}
    )
    return tiny_model_config(**fields, encoder=encoder, start_ids=(0,), end_id=1)


def tiny_weights(config: ModelConfig, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float32 weights under canonical names, fused; equal for equal seeds.

    Large enough that the next token depends on the whole context.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in network_of(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name in sorted(shapes):
        shape = shapes[name]
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            embedding = name in {"embed.weight", "position.weight"}
            weights[name] = noise if embedding else noise * 2 / shape[1] ** 0.5
        else:
            weights[name] = noise * 0.1 + (1 if "norm.weight" in name else 0)
    return weights


def slowly(*values: object) -> list[Any]:
    """A few further values of a parameter, for `make test`; many are `at_length`."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def at_length(*values: object) -> list[Any]:
    """Further values of a parameter, or of several in tuples, for `make longer` alone."""
    cases = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*case, marks=pytest.mark.longer) for case in cases]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one sequence computes in a step: `count` tokens up to and with position `end - 1`."""

    tokens: Sequence[int]  # of the whole sequence so far
    blocks: Sequence[int]
    count: int = 1
    sample: bool = True
    drafts: int = 0  # its last tokens; the row before them and theirs sample
    scores: dict[int, int] = field(default_factory=dict)  # offset in the piece -> its next token
    seat: int | None = None
    adapter: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)  # columns that are not the default


def make_batch(
    pieces: Sequence[Piece], *, vocab_size: int = 97, num_top: int = 0, score_num_top: int = 0
) -> Batch:
    """The batch of a step, greedy where a piece's `sampling` says nothing else."""
    width = max(len(piece.blocks) for piece in pieces)
    starts = np.cumsum([0] + [piece.count for piece in pieces])
    sampled = [
        (piece, int(starts[index + 1]) - 1 - piece.drafts + row, row)
        for index, piece in enumerate(pieces)
        if piece.sample
        for row in range(1 + piece.drafts)
    ]
    scored = [
        (int(starts[index]) + offset, token)
        for index, piece in enumerate(pieces)
        for offset, token in piece.scores.items()
    ]
    return Batch(
        tokens_T=_ints([t for piece in pieces for t in piece.tokens[-piece.count :]]),
        positions_T=_ints(
            [
                position
                for piece in pieces
                for position in range(len(piece.tokens) - piece.count, len(piece.tokens))
            ]
        ),
        query_starts_S1=_ints(starts),
        context_lens_S=_ints([len(piece.tokens) for piece in pieces]),
        block_table_SB=_ints(
            [[*piece.blocks, *[0] * (width - len(piece.blocks))] for piece in pieces]
        ),
        batch_slots_S=_ints(
            [i if piece.seat is None else piece.seat for i, piece in enumerate(pieces)]
        ),
        adapters_S=_ints([p.adapter for p in pieces] if any(p.adapter for p in pieces) else []),
        sample_rows_R=_ints([row for _, row, _ in sampled]),
        sampling=make_sampling(
            [p.sampling | {"index": p.sampling.get("index", 0) + after} for p, _, after in sampled],
            vocab_size=vocab_size,
            top=num_top,
        ),
        score_rows_Q=_ints([row for row, _ in scored]),
        score_ids_Q=_ints([token for _, token in scored]),
        score_num_top=score_num_top,
    )


def make_sampling(
    rows: Sequence[dict[str, Any]], *, vocab_size: int = 97, top: int = 0
) -> SamplingBatch:
    """Columns named as in SamplingParams; without penalties and biases. Greedy by default."""

    def column(name: str, default: float) -> list[Any]:
        return [row.get(name, default) for row in rows]

    def floats(name: str, default: float) -> Any:
        return np.array(column(name, default), np.float32)

    return SamplingBatch(
        seeds_R=np.array(column("seed", 0), np.uint64),
        choices_R=_ints(column("choice", 0)),
        indices_R=_ints(column("index", 0)),
        temperatures_R=floats("temperature", 0.0),
        top_ks_R=_ints(column("top_k", vocab_size)),
        top_ps_R=floats("top_p", 1.0),
        min_ps_R=floats("min_p", 0.0),
        presence_R=floats("presence_penalty", 0.0),
        frequency_R=floats("frequency_penalty", 0.0),
        repetition_R=floats("repetition_penalty", 1.0),
        penalty_rows_P=_ints([]),
        penalty_ids_P=_ints([]),
        penalty_counts_P=_ints([]),
        bias_rows_E=_ints([]),
        bias_ids_E=_ints([]),
        bias_values_E=np.zeros(0, np.float32),
        wants_logprobs_R=np.array([row.get("logprobs", False) for row in rows], np.bool_),
        num_top=top,
    )


def _ints(values: Any) -> Any:
    return np.asarray(values, dtype=np.int32)
