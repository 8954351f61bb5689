"""Continuous batching of `transformers` on the models and lengths of W1, in the same run.

It uses flash attention if that is installed, else torch's own with masks. Like our runner it
captures its CUDA graphs before it is timed. If time runs out, only the tokens of finished outputs
are counted.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from loadtest.bench.gpu.bench import Bench
from loadtest.bench.gpu.models import hugging_face_config
from loadtest.bench.gpu.offline import Workload
from loadtest.bench.gpu.w1 import add_row, workload_of

_STOP = 10  # seconds for it to end


def measure(bench: Bench) -> None:
    """Both models, the larger one if time permits."""
    import transformers

    workload = workload_of(bench)
    for shape in bench.models:
        bench.check_time()
        config = hugging_face_config(shape.config)
        with torch.device(bench.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=bench.dtype).eval()
        seconds, tokens, kind = _generate(bench, model, workload)
        by = f"transformers, {kind}" + ("" if tokens == workload.tokens_out else ", cut off")
        add_row(bench, shape, by, seconds=seconds, tokens=tokens)
        del model
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _generate(
    bench: Bench,
    model: Any,  # noqa: ANN401 - transformers has no types
    workload: Workload,
) -> tuple[float, int, str]:
    """Seconds, tokens of finished outputs, and the kind of attention."""
    import transformers

    generation = transformers.GenerationConfig(
        do_sample=True,
        temperature=workload.temperature,
        top_k=0,
        max_new_tokens=max(output for _, output in workload.lengths),
        eos_token_id=-1,
        pad_token_id=0,
    )
    batching = transformers.ContinuousBatchingConfig(
        allow_block_sharing=False,
        num_blocks=8 if bench.smoke else None,
        max_batch_tokens=32 if bench.smoke else None,
    )
    manager = model.init_continuous_batching(
        generation_config=generation, continuous_batching_config=batching
    )
    kind = str(model.config._attn_implementation)  # noqa: SLF001 - it has no other name
    manager.warmup()
    manager.start()
    try:
        _outputs(bench, manager, Workload(name="first", lengths=((8, 8),) * 2))
        seconds, tokens = _outputs(bench, manager, workload)
    finally:
        manager.stop(block=True, timeout=_STOP, hard_stop=True)
    return seconds, tokens, kind


def _outputs(bench: Bench, manager: Any, workload: Workload) -> tuple[float, int]:  # noqa: ANN401
    """Sends all requests. Returns seconds until the end and tokens of finished outputs."""
    began = time.perf_counter()
    vocab_size = manager.model.config.vocab_size
    for prompt, output in workload.lengths:
        manager.add_request(torch.randint(0, vocab_size, (prompt,)).tolist(), max_new_tokens=output)
    tokens = 0
    for _ in workload.lengths:
        result = manager.get_result(timeout=max(0.1, bench.left - _STOP))
        if result is None:
            break
        if result.error is not None:
            raise RuntimeError(f"transformers failed: {result.error}")
        tokens += len(result.generated_tokens)
    if not tokens:
        raise RuntimeError("transformers finished no output in time")
    return time.perf_counter() - began, tokens
