"""What Triton compiles, and when: never during traffic, and at the start in parallel.

In processes of their own, because in this one Triton interprets. Nothing is computed there:
launches are noted by the specialisation that Triton would compile, for a GPU that is not there.
"""

from __future__ import annotations

import pytest

from tests.support.builders import found_compiling

pytestmark = pytest.mark.slow

TRAFFIC = r"""
import json, warnings
warnings.simplefilter("ignore")
from dataclasses import replace
import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from model.runners.cuda.compile_ahead import TargetDriver, recorded

driver.set_active(TargetDriver(GPUTarget("cuda", 90, 32)))

def zeros_of(allocate):  # nothing is computed, and token 0 is a token
    return lambda *args, **kwargs: allocate(*args, **kwargs).zero_()

torch.empty, torch.empty_like = zeros_of(torch.empty), zeros_of(torch.empty_like)

from model.runners import RunnerOptions
from model.runners.cuda.build import build_runner
from model.adapters import Adapter, Factors
from tests.support.builders import Piece, make_batch, tiny_model_config, tiny_weights

def workload(rng, runner):
    # Chunks, drafts and decoded rows in any mixture, with anything that a client may ask for.
    verified = 40  # rows that may sample
    most = int(rng.integers(1, 300 if rng.integers(2) else 24))
    decode, pieces = bool(rng.integers(2)), []
    for slot in rng.permutation(40)[: rng.integers(1, 41)].tolist():
        count = 1 if decode else int(rng.choice([1, 1, rng.integers(1, 60)]))
        if most < count:
            break
        most -= count
        context = count + int(rng.integers(0, 60))
        sampling = {
            "temperature": float(rng.choice([0, 0.7])), "seed": slot, "index": int(rng.integers(9)),
            "logprobs": rng.integers(8) == 0,
        }
        if rng.integers(2):
            sampling |= {"top_k": 3, "top_p": 0.9}
        sample = decode or bool(rng.integers(2))
        drafts = min(int(rng.integers(0, 4)), count - 1) if sample else 0
        verified -= 1 + drafts
        if verified < 0:
            break
        scores = {0: 1} if rng.integers(8) == 0 and not decode else {}
        pieces.append(Piece(
            tokens=[1] * context, count=count, blocks=rng.integers(0, 16, 40).tolist(), seat=slot,
            sample=sample, drafts=drafts, scores=scores, sampling=sampling,
            adapter=int(rng.integers(len(runner._options.adapters) + 1)),
        ))
    batch = make_batch(pieces or [Piece(tokens=[1], blocks=[0])], num_top=2, score_num_top=2)
    rows = len(batch.sampling.seeds_R)
    if rows and rng.integers(4) == 0:
        row = np.array([rows - 1], np.int32)
        mask = np.full((1, -(-runner.config.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        batch = replace(batch, sampling=replace(
            batch.sampling, mask_rows_M=row, masks_MW=mask, bias_rows_E=row,
            bias_ids_E=row * 0, bias_values_E=row.astype(np.float32),
        ))
    return batch

new, compiled = [], []
for window in (None, 40):
    config = tiny_model_config(
        num_layers=1, hidden_size=512, intermediate_size=528, head_dim=16, max_model_len=160,
        sliding_window=window, qk_norm=window is None, vocab_size=5003,
    )
    weights = {name: weight.bfloat16() for name, weight in tiny_weights(config).items()}
    adapters = tuple(
        Adapter(digest="", factors={
            name: Factors(np.zeros((rank, w.shape[1]), "f"), np.zeros((len(w), rank), "f"))
            for name, w in weights.items() if "blocks." in name and w.ndim == 2
        }) for rank in (3, 20)
    )
    options = RunnerOptions(
        dtype="bfloat16", device="cpu", block_size=4, num_blocks=40, max_sequences=40,
        max_batch_tokens=300, adapters=adapters if window is None else (),
    )
    runner = None
    def start():
        global runner
        runner = build_runner(
            config, weights, options=options, digest="none", check=None,
            mixed_graphs=window is None,
        )
        runner.warm_up()
    known = recorded(start)
    rng = np.random.default_rng(0)
    def traffic():
        for _ in range(100):
            runner.run(workload(rng, runner))
    found = recorded(traffic)
    compiled.append(len(known))
    new += sorted({name.split(" ")[0] for name in found.keys() - known.keys()})
print(json.dumps([compiled, new]))
"""


def test_traffic_compiles_nothing() -> None:
    """A hundred random steps of two models each, after the start: every variant is known. One of
    them launches mixed steps kernel by kernel.

    Triton compiles a kernel anew if a pointer is aligned otherwise, a size is 1 or a multiple of
    16, or a constant differs; each of them stopped all sequences for seconds.
    """
    compiled, new = found_compiling(TRAFFIC)
    assert min(compiled) > 40
    assert not new


PARALLEL = r"""
import json, tempfile, warnings
warnings.simplefilter("ignore")
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from model.kernels import activation, inputs, norm
from model.kernels.matmul import Product
from model.runners.cuda.compile_ahead import TargetDriver, compile_ahead

knobs.cache.dir = tempfile.mkdtemp()
import os
os.environ["TRITON_CACHE_DIR"] = knobs.cache.dir  # that of the processes
driver.set_active(TargetDriver(GPUTarget("cuda", 90, 32)))
def work():
    ints = torch.zeros(64, dtype=torch.int32)
    state = torch.zeros(3, 32, dtype=torch.int32)
    inputs.change(state, ints, ints)
    inputs.advance(state, ints[:2], ints[:2], stored=0)
    inputs.advance(state, ints[:2], ints[:2], stored=1)
    inputs.embed(ints, torch.zeros(5, 24, dtype=torch.bfloat16))
    norm.add_rms_norm(torch.zeros(2, 24), Product(torch.zeros(2, 24)), torch.zeros(24), eps=1e-5)

hits = []
done = compile_ahead(work, processes=2)
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
run = JITFunction.run
JITFunction.run = lambda self, *args, warmup, **kwargs: run(self, *args, warmup=True, **kwargs)
work()
JITFunction.run = run  # from here on a launch would fail, even of what is compiled
print(json.dumps([done, hits, compile_ahead(work)]))
"""


@pytest.mark.kernels
def test_variants_are_compiled_in_parallel_once() -> None:
    """By two processes, for the very launches that follow: these find all of it in the cache.

    None is launched meanwhile, not even what was compiled before: it would read indices that no
    other kernel has written.
    """
    assert found_compiling(PARALLEL) == [5, [True] * 5, 0]
