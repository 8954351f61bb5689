"""TorchRunner: the network in plain torch, on any device. The reference of the other runners.

In bfloat16 on a CPU its linear layers are packed for oneDNN. Torch's kernels choose the order of
their sums by the shape of the step, so answers are equal within rounding, not bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from model.attention import ATTENTION, Attention
from model.attention.compressed import CompressedAttention
from model.batch import Batch, Ints, SamplingBatch, SourceBatch, StepOutput
from model.compression import Anchors, compressed_config, parse_compression
from model.config import ModelConfig
from model.encoder_decoder import network_of
from model.kvcache import KVCache, blocks_within
from model.layers import PackedLinear, load_weights, pack_linears
from model.parallel.shares import sum_sublayers
from model.runners import RunnerOptions
from model.runners.adapted import add_adapters
from model.runners.logprobs import Logprobs, score_rows, scored_on_host, step_output
from model.sampler import sample
from model.segments import segments_batch
from model.transformer import Transformer
from model.weights import Weights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class TorchRunner:
    """Owns the network and the KV pool. Raises ValueError for unsupported options.

    `reduce` sums over the ranks of tensor parallelism.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        options: RunnerOptions,
        digest: str,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        device = choose_device(options.device)
        dtype = choose_dtype(options.dtype, device)
        compression = parse_compression(options.kv_compression)
        config = compressed_config(config, compression)
        self._compression = compression
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)
        self.config = config
        self.block_size = options.block_size
        self.num_blocks = options.num_blocks or blocks_within(
            options.kv_memory, config, block_size=options.block_size, dtype=dtype
        )
        kind = f"torch-{device.type}-{_SHORT[dtype]}"
        if compression is not None:
            kind += f"-{compression.name}"
        self.numeric_class = f"{kind}-{torch.__version__}-{digest[:12]}"
        self.exact = False
        self._options = options
        self._network = build_network(config, weights, dtype=dtype, device=device)
        if config.tied_head and packs_linears(device, dtype):
            # The embedding itself stays plain, because it is read by rows.
            self._network.head = PackedLinear(self._network.embed.weight, None)
        self._adapters = add_adapters(self._network, options.adapters, dtype=dtype, device=device)
        if reduce is not None:
            sum_sublayers(self._network, reduce)
        self._attention: Attention = (
            ATTENTION["torch_paged"]()
            if compression is None
            else CompressedAttention(compression, config)
        )
        self._cache = KVCache(
            config,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            dtype=dtype,
            device=device,
        )

    def run(self, batch: Batch) -> StepOutput:
        with torch.inference_mode():
            self._adapters.begin(batch, self._network.embed.weight.device)
            hidden_TC = self._network.step(batch, self._cache, self._attention)
            sampled = sample(self._logits(hidden_TC, batch.sample_rows_R), batch.sampling)
            scored = scored_on_host(score_rows(batch, lambda rows: self._logits(hidden_TC, rows)))
        logprobs = Logprobs.from_tensors(
            sampled.logprobs_R, sampled.top_ids_RN, sampled.top_logprobs_RN
        )
        return step_output(sampled.tokens_R.int().cpu().numpy(), logprobs, scored)

    def warm_up(self) -> None:
        """Runs one decoded token and the largest chunk, over blocks that are still free."""
        room = min(self.num_blocks * self.block_size, self.config.max_model_len)
        for length in {1, min(room, self._options.max_batch_tokens)}:
            batch = _prompt(length, self.config, block_size=self.block_size)
            if isinstance(self._compression, Anchors):
                batch = replace(batch, segments=segments_batch([((), range(length), ())]))
            self.run(batch)

    def close(self) -> None:
        del self._network, self._cache

    def _logits(self, hidden_TC: torch.Tensor, rows: Ints) -> torch.Tensor:
        """Logits of some rows, [len(rows), V]."""
        if not rows.size:
            return hidden_TC.new_empty((0, self.config.vocab_size))
        picked = torch.tensor(rows, device=hidden_TC.device)
        return self._network.logits(hidden_TC[picked])


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU if torch finds one. Raises ValueError if the device is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device {name} is not available") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 if the device computes in it. Raises ValueError for unknown names."""
    if name == "auto":
        fast = device.type != "cpu" or _cpu_multiplies_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    if name not in _DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(_DTYPES)} for the torch runner")
    return _DTYPES[name]


def _cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; without them bfloat16 is slower than float32.

    Known on Linux on x86 only; False elsewhere.
    """
    facts = Path("/proc/cpuinfo")
    flags = set(facts.read_text().split()) if facts.exists() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def build_network(
    config: ModelConfig, weights: Weights, *, dtype: torch.dtype, device: torch.device
) -> Transformer:
    """The network with its weights; in bfloat16 on a CPU its linear layers are packed."""
    with torch.device("meta"):  # shapes without memory
        network = network_of(config)
    load_weights(network, weights, dtype=dtype, device=device)
    network.requires_grad_(requires_grad=False)
    if packs_linears(device, dtype):
        pack_linears(network)
    return network


def packs_linears(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether linear layers are packed for oneDNN."""
    return device.type == "cpu" and dtype is torch.bfloat16 and PackedLinear.available()


def _prompt(length: int, config: ModelConfig, *, block_size: int) -> Batch:
    """One sequence that starts at block 0, sampled greedily at its end. A source lies in the same
    blocks: what is computed is not read.
    """
    empty, zero = np.zeros(0, np.int32), np.zeros(1, np.int32)
    table = np.arange(-(-length // block_size), dtype=np.int32)[None]
    tokens, lens = np.zeros(length, np.int32), np.array([length], np.int32)
    new = np.ones(1, np.bool_)
    source = SourceBatch(lens_S=lens, table_SB=table, is_new_S=new, tokens_U=tokens)
    return Batch(
        tokens_T=tokens,
        positions_T=np.arange(length, dtype=np.int32),
        query_starts_S1=np.array([0, length], np.int32),
        context_lens_S=lens,
        block_table_SB=table,
        batch_slots_S=zero,
        sample_rows_R=np.array([length - 1], np.int32),
        sampling=SamplingBatch.plain(1, vocab_size=config.vocab_size),
        score_rows_Q=empty,
        score_ids_Q=empty,
        sources=source if config.encoder else None,
    )
