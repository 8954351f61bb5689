"""Measures the GPU engine against the roof of the chip: `python -m loadtest.gpu_bench`.

    ceilings      bytes/s of a copy, operations/s of a matrix product: what the rest is held against
    kernels       attention over batch and context, products of few rows, in GB/s and share of copy
    steps         decode steps at several batch sizes: time, share of roof, host time, busy share
    exact         the matrix of ways through the runner, and what exactness costs
    w1            256 sequences offline: on the runner, and through the service's engine
    http          the same workload through `quire serve` and our client
    transformers  its continuous batching on the same model and workload, in the same run

`--only` takes a list of these. Tables are printed and the JSON file written after each part, so
that a run that is cut off leaves what it had. Roof: the bytes a step must read, over the bandwidth
of the data sheet. `--smoke` is the whole thing in miniature, on a CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from loadtest.gpu_models import (
    LLAMA31_8B,
    QWEN3_600M,
    TINY,
    RandomWeights,
    Shape,
    hugging_face_config,
)
from loadtest.gpu_offline import Offline, Workload, w1
from model.runners import RunnerOptions, StepHandle

DATASHEET = 4.8e12  # bytes/s of an H200
MINUTES = 9

Row = dict[str, Any]


@dataclass(kw_only=True)
class Bench:
    """What all parts share, and what they found."""

    smoke: bool
    device: torch.device
    out: Path
    deadline: float
    tables: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def models(self) -> list[Shape]:
        if self.smoke:
            return [Shape("tiny", TINY)]
        return [Shape("Qwen3-0.6B", QWEN3_600M), Shape("Llama-3.1-8B", LLAMA31_8B)]

    @property
    def batches(self) -> tuple[int, ...]:
        return (1, 2) if self.smoke else (1, 8, 32, 128, 256)

    def add(self, table: str, row: Row) -> None:
        """Keeps a row, prints it and writes everything found so far."""
        rows = self.tables.setdefault(table, [])
        rows.append(row)
        if len(rows) == 1:
            print(f"\n{table}\n" + "  ".join(f"{name:>14}" for name in row))
        print("  ".join(f"{_text(value):>14}" for value in row.values()), flush=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.tables, indent=1), encoding="utf-8")

    def seconds(self, work: Callable[[], object], *, repeats: int = 20) -> float:
        """Median time of one call, on the device."""
        if self.device.type == "cpu":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        work()
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1000)
        return statistics.median(times)

    def replayed(self, work: Callable[[], object]) -> float:
        """Time of one call, eight of which are recorded and replayed: without gaps of the host."""
        if self.device.type == "cpu":
            return self.seconds(work)
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(8):
                work()
        return self.seconds(graph.replay) / 8

    def runner(self, shape: Shape, **overrides: Any) -> Any:  # noqa: ANN401 - CudaRunner, imported late
        """A runner with random weights, warm."""
        from model.runners.cuda import CudaRunner

        product = overrides.pop("product", None)
        fields: Row = {
            "dtype": "float32" if self.smoke else "bfloat16",
            "device": self.device.type,
            "block_size": 4 if self.smoke else 64,
            "num_blocks": 64 if self.smoke else None,
            "max_sequences": max(self.batches),
            "max_batch_tokens": 16 if self.smoke else 8192,
            "memory_share": 0.9,
            **overrides,
        }
        runner = CudaRunner(
            shape.config,
            RandomWeights(shape.config, self.device),
            options=RunnerOptions(**fields),
            digest="random",
            **({} if product is None else {"product": product}),
        )
        runner.warm_up()
        return runner


def ceilings(bench: Bench) -> None:
    """A large copy and a large product, on random data."""
    size = 2**16 if bench.smoke else 2**31
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copy = 2 * size / bench.seconds(lambda: target.copy_(source))
    side = 64 if bench.smoke else 8192
    dtype = torch.float32 if bench.smoke else torch.bfloat16
    a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
    product = 2 * side**3 / bench.seconds(lambda: a @ b)
    bench.add("ceilings", {"copy GB/s": copy / 1e9, "product TFLOP/s": product / 1e12})


def kernels(bench: Bench) -> None:
    """Attention of decoded tokens, then products of few rows."""
    from model.kernels.matmul import multiply, multiply_by_library

    copy = _copy_rate(bench)
    grid = [(2, 40)] if bench.smoke else [
        (1, 65536), (8, 8192), (32, 2048), (128, 1024), (256, 1024), (256, 2048), (32, 16384)
    ]  # fmt: skip
    for shape in bench.models:
        for batch, context in grid:
            seconds, moved = _attention_time(bench, shape, batch, context)
            rate = moved / seconds
            bench.add(
                "kernel: attention",
                {
                    "model": shape.name,
                    "batch": batch,
                    "context": context,
                    "us": seconds * 1e6,
                    "GB/s": rate / 1e9,
                    "of copy": rate / copy,
                },
            )
    dtype = torch.float32 if bench.smoke else torch.bfloat16
    for shape in bench.models:
        config = shape.config
        for name, N, K in (
            ("qkv", config.query_size + 2 * config.kv_size, config.hidden_size),
            ("out", config.hidden_size, config.query_size),
            ("gate-up", 2 * config.intermediate_size, config.hidden_size),
            ("down", config.hidden_size, config.intermediate_size),
            ("head", config.vocab_size, config.hidden_size),
        ):
            copies = max(1, min(16, 2**28 // (2 * N * K)))  # more than the L2 cache holds
            weights = [torch.randn(N, K, device=bench.device, dtype=dtype) for _ in range(copies)]
            for M in bench.batches:
                x = torch.randn(M, K, device=bench.device, dtype=dtype)
                ours = bench.replayed(partial(_multiply_all, multiply, x, weights)) / copies
                library = partial(_multiply_all, multiply_by_library, x, weights)
                theirs = bench.replayed(library) / copies
                bench.add(
                    "kernel: product",
                    {
                        "model": shape.name,
                        "weight": name,
                        "rows": M,
                        "us": ours * 1e6,
                        "library us": theirs * 1e6,
                        "GB/s": 2 * N * K / ours / 1e9,
                        "of copy": 2 * N * K / ours / copy,
                    },
                )


def steps(bench: Bench) -> None:
    """Decode steps, one ahead of the host."""
    for shape in bench.models:
        runner = bench.runner(shape)
        context = 8 if bench.smoke else 512
        for batch in bench.batches:
            count = 3 if bench.smoke else 40
            workload = Workload(name="steps", lengths=((context, count),) * batch)
            busy: list[Any] = []
            budget = 16 if bench.smoke else 8192
            Offline(runner, budget=budget).run(workload)  # fills the pool
            outcome = Offline(runner, budget=budget).run(
                workload, start_at=context, around=_timed(bench, busy)
            )
            step = outcome.seconds / outcome.steps
            moved = shape.weight_bytes + outcome.kv_tokens / outcome.steps * shape.kv_bytes
            bench.add(
                "steps",
                {
                    "model": shape.name,
                    "batch": batch,
                    "ms": step * 1e3,
                    "tokens/s": outcome.tokens / outcome.seconds,
                    "of roof": moved / DATASHEET / step,
                    "host us": statistics.median(outcome.host_seconds) * 1e6,
                    "busy": _busy(busy) / outcome.seconds if busy else None,
                },
            )
        _free(runner)


def exact(bench: Bench) -> None:
    """Bits over many ways, and decode steps by the library's products beside ours."""
    from model.kernels.matmul import multiply_by_library
    from model.runners.exactness import Trial, try_exactness

    for shape in bench.models:
        runner = bench.runner(shape)
        trials = (
            [Trial(prompt=9, answer=2, beside=(1,), chunks=(4,))]
            if bench.smoke
            else [
                Trial(prompt=40, beside=(1, 7, 15, 16, 31, 63, 127, 255), chunks=(1, 7, 17, 33)),
                Trial(prompt=1100, answer=8, beside=(1, 16), chunks=(64, 130, 512, 777)),
            ]
        )
        for trial in trials:
            for way, equal in try_exactness(runner, trial).items():
                row = {"model": shape.name, "prompt": trial.prompt, "way": way, "equal": equal}
                bench.add("exact", row)
        ours = _decode_rate(bench, runner)
        _free(runner)
        runner = bench.runner(shape, product=multiply_by_library)
        theirs = _decode_rate(bench, runner)
        _free(runner)
        for batch, rate in ours.items():
            bench.add(
                "cost of exactness",
                {
                    "model": shape.name,
                    "batch": batch,
                    "exact tokens/s": rate,
                    "library tokens/s": theirs[batch],
                    "cost": 1 - rate / theirs[batch],
                },
            )


def offline(bench: Bench) -> None:
    """W1 on the runner, one step ahead, and through the service's engine."""
    for shape in bench.models[:1]:
        runner = bench.runner(shape)
        workload = _w1(bench)
        budget = 16 if bench.smoke else 8192
        Offline(runner, budget=budget).run(_w1(bench, short=True))  # clocks up, kernels loaded
        outcome = Offline(runner, budget=budget).run(workload)
        moved = outcome.steps * shape.weight_bytes + outcome.kv_tokens * shape.kv_bytes
        _add_w1(bench, "runner", workload, outcome.seconds, moved / DATASHEET)
        seconds = _through_engine(runner, workload, budget)
        _add_w1(bench, "engine", workload, seconds, moved / DATASHEET)
        _free(runner)


def http(bench: Bench) -> None:
    """W1 over HTTP, all requests at once."""
    from loadtest.gpu_http import over_http

    shape, workload = bench.models[0], _w1(bench)
    if bench.smoke:
        shape = Shape("tiny", replace(TINY, vocab_size=300))
    flags = ["--runner", "torch" if bench.device.type == "cpu" else "cuda"]
    if not bench.smoke:
        flags += ["--max-sequences", "256", "--max-batch-tokens", "8192", "--block-size", "64"]
        flags += ["--kv-memory", "40GiB"]
    with TemporaryDirectory() as folder:
        seconds = over_http(shape, workload, Path(folder), flags=flags)
    _add_w1(bench, "HTTP", workload, seconds, None)


def peer(bench: Bench) -> None:
    """Continuous batching of transformers on the same model and lengths."""
    import transformers

    shape, workload = bench.models[0], _w1(bench)
    if bench.smoke:
        return  # its paged attention wants a GPU
    config = hugging_face_config(shape.config)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(bench.device):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.set_default_dtype(torch.float32)
    model.set_attn_implementation("paged|sdpa")
    generation = transformers.GenerationConfig(
        do_sample=True,
        temperature=workload.temperature,
        top_k=0,
        max_new_tokens=max(answer for _, answer in workload.lengths),
        eos_token_id=-1,
        pad_token_id=0,
    )
    with model.continuous_batching_context_manager(generation_config=generation) as manager:
        began = time.perf_counter()
        for prompt, answer in workload.lengths:
            tokens = torch.randint(0, shape.config.vocab_size, (prompt,)).tolist()
            manager.add_request(tokens, max_new_tokens=answer)
        generated = 0
        for _ in workload.lengths:
            result = manager.get_result(timeout=120)
            if result is None:
                raise RuntimeError("transformers gave no result for two minutes")
            generated += len(result.generated_tokens)
        seconds = time.perf_counter() - began
    if generated != workload.tokens_out:
        print(f"transformers generated {generated} tokens of {workload.tokens_out}")
    bench.add(
        "W1",
        {
            "by": "transformers",
            "seconds": seconds,
            "tokens/s": generated / seconds,
            "of roof": None,
        },
    )
    del model
    _free(None)


PARTS: dict[str, Callable[[Bench], None]] = {
    "ceilings": ceilings,
    "kernels": kernels,
    "steps": steps,
    "exact": exact,
    "w1": offline,
    "http": http,
    "transformers": peer,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts asked for; a part that fails is reported and the next begun."""
    parser = argparse.ArgumentParser(prog="gpu_bench", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("results/gpu_bench.json"))
    parser.add_argument("--smoke", action="store_true", help="in miniature, also on a CPU")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.smoke:
        print("no GPU here; --smoke runs in miniature", file=sys.stderr)
        return 2
    bench = Bench(
        smoke=given.smoke,
        device=device,
        out=given.out,
        deadline=time.monotonic() + 60 * MINUTES - 30,
    )
    failed = 0
    gc.freeze()
    for name in given.only.split(","):
        if time.monotonic() > bench.deadline:
            print(f"\n{name}: left out, the time is used up")
            continue
        began = time.monotonic()
        try:
            PARTS[name](bench)
        except (RuntimeError, ValueError, ImportError, TypeError, AttributeError) as error:
            failed += 1
            print(f"\n{name} failed: {type(error).__name__}: {error}"[:2000], file=sys.stderr)
        print(f"({name}: {time.monotonic() - began:.0f} s)", flush=True)
    return min(failed, 1)


def _w1(bench: Bench, *, short: bool = False) -> Workload:
    if bench.smoke:
        return w1(sequences=2, least=3, most=6)
    return w1(sequences=256, least=100, most=140) if short else w1()


def _add_w1(bench: Bench, by: str, workload: Workload, seconds: float, roof: float | None) -> None:
    bench.add(
        "W1",
        {
            "by": by,
            "seconds": seconds,
            "tokens/s": workload.tokens_out / seconds,
            "of roof": None if roof is None else roof / seconds,
        },
    )


def _through_engine(runner: Any, workload: Workload, budget: int) -> float:  # noqa: ANN401
    """The same through scheduler, packer and detokeniser."""
    from service.engine.loop import EngineLoop, Work
    from service.engine.observer import NullObserver
    from service.engine.plan import EngineConfig
    from service.messages import GenerationRequest, SamplingParams

    vocab_size = runner.config.vocab_size
    loop = EngineLoop(
        runner,
        config=EngineConfig(
            max_batch_tokens=budget,
            max_sequences=len(workload.lengths),
            max_prompt_chunk=budget,
            prefix_cache=False,
        ),
        token_bytes=[b"a"] * vocab_size,
        eos_ids=frozenset(),
        deliver=lambda _: None,
        observer=NullObserver(),
    )
    for index, (prompt, answer) in enumerate(workload.lengths):
        request = GenerationRequest(
            id=str(index),
            prompt_ids=tuple(n * 7919 % vocab_size for n in range(prompt)),
            sampling=SamplingParams(seed=index, temperature=workload.temperature),
            max_tokens=answer,
            ignore_eos=True,
        )
        loop.add(Work(request=request))
    began = time.perf_counter()
    while loop.busy:
        loop.step()
    return time.perf_counter() - began


def _multiply_all(
    product: Callable[..., object], x: torch.Tensor, weights: Sequence[torch.Tensor]
) -> None:
    for weight in weights:
        product(x, weight)


def _decode_rate(bench: Bench, runner: Any) -> dict[int, float]:  # noqa: ANN401
    rates = {}
    context, count = (8, 3) if bench.smoke else (512, 40)
    for batch in bench.batches:
        workload = Workload(name="decode", lengths=((context, count),) * batch)
        repeats = 1 if bench.smoke else 3
        run = Offline(runner, budget=16 if bench.smoke else 8192).run
        run(workload)  # fills the pool
        outcomes = [run(workload, start_at=context) for _ in range(repeats)]
        rates[batch] = statistics.median(o.tokens / o.seconds for o in outcomes)
    return rates


def _attention_time(bench: Bench, shape: Shape, batch: int, context: int) -> tuple[float, int]:
    """Seconds of one layer's attention, and the bytes of K and V that it reads."""
    from model.attention.triton_paged import attention_programs
    from model.kernels.attention import Partials, WorkList, paged_attention

    config, device, block_size = shape.config, bench.device, 64
    dtype = torch.float32 if bench.smoke else torch.bfloat16
    blocks = -(-context // block_size)
    pool = torch.randn(
        2, batch * blocks * block_size, config.num_kv_heads, config.head_dim,
        device=device, dtype=dtype,
    )  # fmt: skip
    table = torch.randperm(batch * blocks, device=device).int().view(batch, blocks)
    rows = torch.arange(batch + 1, device=device, dtype=torch.int32)
    work = WorkList(
        max_rows=batch,
        max_sequences=batch,
        max_context=context,
        group=config.num_heads // config.num_kv_heads,
        device=device,
    )
    contexts = torch.full((batch,), context, device=device, dtype=torch.int32)
    work.fill(rows, contexts, rows[:-1], window=None)
    partials = Partials(work, num_heads=config.num_heads, head_dim=config.head_dim, device=device)
    queries = torch.randn(batch, config.num_heads, config.head_dim, device=device, dtype=dtype)
    seconds = bench.replayed(
        lambda: paged_attention(
            queries,
            pool[0],
            pool[1],
            table,
            work=work,
            partials=partials,
            block_size=block_size,
            scale=config.head_dim**-0.5,
            window=None,
            programs=attention_programs(device),
            merges=batch,
        )
    )
    return seconds, 2 * batch * context * config.kv_size * dtype.itemsize


def _copy_rate(bench: Bench) -> float:
    if "ceilings" not in bench.tables:
        ceilings(bench)
    return float(bench.tables["ceilings"][0]["copy GB/s"]) * 1e9


def _timed(
    bench: Bench, spans: list[Any]
) -> Callable[[Callable[[], StepHandle]], StepHandle] | None:
    """Events around what each launch puts on the device."""
    if bench.device.type == "cpu":
        return None

    def around(launch: Callable[[], StepHandle]) -> StepHandle:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        handle = launch()
        end.record()
        spans.append((begin, end))
        return handle

    return around


def _busy(spans: list[Any]) -> float:
    torch.cuda.synchronize()
    return float(sum(begin.elapsed_time(end) for begin, end in spans)) / 1000


def _free(runner: Any) -> None:  # noqa: ANN401
    if runner is not None:
        runner.close()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1e5 else str(value)


if __name__ == "__main__":
    sys.exit(main())
