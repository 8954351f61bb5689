"""A workload over HTTP: a checkpoint of random weights, `quire serve` on it, our client.

The tokenizer has one token per byte and names for the other ids, so a prompt of n letters has n
tokens and each id that random weights may produce has a text.
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from loadtest.bench.gpu.models import Shape, hugging_face_config
from loadtest.bench.gpu.offline import Workload
from loadtest.bench.servers import Plan, Server, running
from service.bench.client import Outcome, Target, complete

_NAME = "measured"


def over_http(
    shape: Shape,
    workload: Workload,
    folder: Path,
    *,
    flags: Sequence[str],
    start_timeout: float = 300.0,
) -> float:
    """Seconds of the workload, all requests at once. Raises RuntimeError if a request fails."""
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
        context=max(prompt + output for prompt, output in workload.lengths),
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
    """config.json, random weights and tokenizer of a model, as a hub has them."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    config = hugging_face_config(shape.config)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = shape.config.vocab_size
    names = [*letters, *(f"<{index}>" for index in range(max(0, size - len(letters))))][:size]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": names[-1]}))


async def _all(target: Target, workload: Workload) -> list[Outcome]:
    generator = random.Random(1)
    prompts = [
        "".join(generator.choices(string.ascii_lowercase, k=prompt))
        for prompt, _ in workload.lengths
    ]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(complete(target, prompt, max_tokens=output))
            for prompt, (_, output) in zip(prompts, workload.lengths, strict=True)
        ]
    return [task.result() for task in tasks]
