"""Builders of results without measurements."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from loadtest.bench.document import Document
from loadtest.bench.measure import Kind, Result, Sizes
from model.native.roof import Roof, Weights
from service.bench.client import Summary
from service.doctor.machine import Machine

MakeResult = Callable[..., Result]
MakeDocument = Callable[..., Document]


@pytest.fixture
def make_result() -> MakeResult:
    def make(
        server: str = "a",
        kind: Kind = Kind.DECODE,
        level: float = 1.0,
        *,
        repeat: int = 0,
        speed: float = 10.0,
        first: float = 0.1,
        failures: int = 0,
        good: int = 0,
        client_cpu: float = 0.1,
        prompt_tokens: int = 100,
        start: float = 1.0,
        server_cpu: float = 1.0,
        load: float = 0.0,
    ) -> Result:
        """Ten requests in ten seconds."""
        summary = Summary(
            requests=10,
            failures=failures,
            errors=("broken",) if failures else (),
            prompt_tokens=prompt_tokens,
            completion_tokens=int(10 * speed),
            wall=10.0,
            tokens_per_second=speed,
            time_to_first_p50=first if failures < 10 else math.nan,
            time_per_token_p50=0.01,
            gap_p50=0.01,
            gap_p99=0.02,
        )
        return Result(
            server=server, kind=kind, level=level, repeat=repeat, summary=summary, good=good,
            server_cpu=server_cpu, client_cpu=client_cpu, rss_peak=10**8, start_seconds=start,
            load_before=load,
        )  # fmt: skip

    return make


@pytest.fixture
def make_document() -> MakeDocument:
    def make(servers: list[str], results: list[Result], **fields: object) -> Document:
        """A machine that reads 100 weights in 0.1 s and multiplies fast."""
        roof = Roof(variant="fast", bytes_a_second=1000.0, products_a_second=1e5)
        machine = Machine(
            processor="Abacus <2>", cpus=2, flags=["avx2"], memory=2**33, system="Linux",
            packages={"quire-llm": "1"},
        )  # fmt: skip
        everything: dict[str, object] = {
            "date": "2030-01-02", "machine": machine, "model": "small & quick.gguf",
            "weights": Weights(layers=80, head=20),
            "sizes": Sizes(clients=(1, 8), chat_clients=(8,)), "roofs": [roof] * 3,
            "servers": servers, "results": results,
        }  # fmt: skip
        return Document(**everything | fields)  # type: ignore[arg-type]  # any field of it

    return make


@pytest.fixture
def small_gguf(tmp_path: Path) -> Path:
    """Two Q4_1 matrices, a Q8_0 embedding, a norm, and fields of several types."""
    rng, kinds = np.random.default_rng(0), gguf.GGMLQuantizationType
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_block_count(2)
    writer.add_rope_freq_base(1e4)
    writer.add_token_list(["a", "é", "<end>"])
    writer.add_token_types([1, 1, 3])
    writer.add_add_bos_token(False)
    for name, shape, kind in (
        ("token_embd.weight", (3, 64), kinds.Q8_0),
        ("blk.0.ffn_up.weight", (32, 64), kinds.Q4_1),
        ("blk.1.ffn_up.weight", (32, 64), kinds.Q4_1),
        ("blk.0.ffn_norm.weight", (64,), kinds.F32),
    ):
        data = rng.standard_normal(shape).astype(np.float32)
        if kind != kinds.F32:
            data = gguf.quants.quantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
