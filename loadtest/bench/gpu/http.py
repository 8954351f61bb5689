"""The workload over HTTP: a checkpoint of random weights, `quire serve` over it, our client.

The tokenizer has a byte a token and names for the rest, so a prompt of n letters has n tokens and
every id that random weights choose has a text.
"""

from __future__ import annotations

import asyncio
import json
import random
import string
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from loadtest.bench.gpu.models import RandomWeights, Shape, hugging_face_config
from loadtest.bench.gpu.offline import Workload
from loadtest.bench.servers import Plan, Server, running
from loadtest.client import Outcome, Target, complete

_NAME = "measured"


def over_http(
    shape: Shape,
    workload: Workload,
    folder: Path,
    *,
    flags: Sequence[str],
    start_timeout: float = 300.0,
) -> float:
    """Seconds of the workload with all clients at once. Raises RuntimeError for failed requests."""
    write_checkpoint(shape, folder / "model")
    server = Server(
        name="quire",
        command=lambda plan, port: [
            *(sys.executable, "-m", "service", "serve", "--model", str(plan.model)),
            *("--model-name", _NAME, "--port", str(port), "--admin-port", "0", *plan.quire_flags),
        ],
        start_timeout=start_timeout,
        fields=lambda _: {
            "model": _NAME,
            "ignore_eos": True,
            "temperature": workload.temperature,
            "stream_options": {"include_usage": True},
        },
    )
    plan = Plan(
        model=folder / "model",
        threads=1,
        clients=len(workload.lengths),
        context=max(prompt + answer for prompt, answer in workload.lengths),
        folder=folder,
        quire_flags=flags,
    )
    with running(server, plan) as served:
        short = Workload(name="first", lengths=((8, 8),))
        asyncio.run(_all(served.target, short))
        began = time.perf_counter()
        outcomes = asyncio.run(_all(served.target, workload))
        seconds = time.perf_counter() - began
    errors = {outcome.error for outcome in outcomes if outcome.error}
    if errors:
        raise RuntimeError(f"requests failed: {', '.join(sorted(errors))}")
    return seconds


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """config.json, weights and tokenizer of a model as it comes from a hub."""
    folder.mkdir(parents=True, exist_ok=True)
    config = hugging_face_config(shape.config)
    config.architectures = [
        {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[shape.config.family]
    ]
    config.save_pretrained(folder)
    save_file(_checkpoint_tensors(shape), folder / "model.safetensors")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = shape.config.vocab_size
    names = [*letters, *(f"<{index}>" for index in range(max(0, size - len(letters))))][:size]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": names[-1]}))


def _checkpoint_tensors(shape: Shape) -> dict[str, torch.Tensor]:
    """Random weights under the names, and in the parts, that checkpoints have."""
    config = shape.config
    whole = RandomWeights(config, torch.device("cpu"))
    fused = {
        "attention.qkv": (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            [config.query_size, config.kv_size, config.kv_size],
        ),
        "mlp.gate_up": (
            ("mlp.gate_proj", "mlp.up_proj"),
            [config.intermediate_size, config.intermediate_size],
        ),
    }
    plain = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.out": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "mlp.down": "mlp.down_proj",
    }
    outer = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    tensors = {}
    for name in whole:
        tensor = whole[name].bfloat16()
        path = name.removesuffix(".weight")
        if not path.startswith("blocks."):
            tensors[f"{outer[path]}.weight"] = tensor
            continue
        _, layer, module = path.split(".", 2)
        prefix = f"model.layers.{layer}"
        if module in fused:
            parts, sizes = fused[module]
            for part, slice_ in zip(parts, torch.split(tensor, sizes), strict=True):
                tensors[f"{prefix}.{part}.weight"] = slice_.contiguous()
        else:
            tensors[f"{prefix}.{plain[module]}.weight"] = tensor
    return tensors


async def _all(target: Target, workload: Workload) -> list[Outcome]:
    generator = random.Random(1)
    prompts = [
        "".join(generator.choices(string.ascii_lowercase, k=prompt))
        for prompt, _ in workload.lengths
    ]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(complete(target, prompt, max_tokens=answer))
            for prompt, (_, answer) in zip(prompts, workload.lengths, strict=True)
        ]
    return [task.result() for task in tasks]
