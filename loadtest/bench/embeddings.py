"""Embeddings beside sentence-transformers and ONNX Runtime, in one process, from the same weights.

Clients send one text each, wait for the vector and send the next: a system embeds all texts that
wait as one batch, tokenising included. Systems take turns and rest in between: a peer's threads
spin for a while after a batch and would slow down the next system. The peers are optional:
`pip install onnxruntime onnx sentence-transformers`. ONNX Runtime gets the model exported by torch,
and pads a batch to its longest text, as sentence-transformers does.
"""

from __future__ import annotations

import argparse
import importlib
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.batch import Floats
from model.checkpoint.fetch import ALL_MINILM_L6_V2, default_cache, resolve
from model.runners.encoding import EncoderTokenizer, load_encoder

Embed = Callable[[Sequence[str]], Any]
MIXED = (8, 254)  # words of a text of the mixture
REST = 0.5  # seconds until the threads of the system before have stopped spinning
SPECIAL = 2  # tokens around a text
# Each is one token of BERT's vocabulary.
WORDS = (
    "the", "sea", "river", "stone", "house", "light", "music", "paper", "train", "north", "winter",
    "bread", "glass", "letter", "garden", "water", "story", "market", "night", "bridge", "window",
)  # fmt: skip


@dataclass(slots=True)
class Measured:
    """Batches of one system."""

    wall: list[float] = field(default_factory=list)  # seconds per batch
    cpu: float = 0.0  # seconds
    texts: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=ALL_MINILM_L6_V2.alias)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 128, 256], help="per text")
    parser.add_argument("--batches", type=int, default=6, help="per turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each system")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> None:
    """Prints a row per system, number of clients and length as soon as it is measured."""
    path = resolve(options.model, cache=default_cache())
    systems = {
        "quire float32": quire(path, "float32", options.threads),
        "quire int8": quire(path, "int8", options.threads),
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name, peer in (("onnxruntime", onnx_runtime), ("sentence-transformers", sentences)):
            try:
                systems[name] = peer(path, options.threads, Path(scratch))
            except ImportError as missing:
                print(f"{name} is left out: {missing.name} is not installed")
        compare(systems, options)


def compare(systems: dict[str, Embed], options: argparse.Namespace) -> None:
    print("| clients | tokens | system | texts/s | CPU ms per text | p50 ms | p99 ms | cosine |")
    print("|---:|---:|---|---:|---:|---:|---:|---:|")
    draw = random.Random(options.seed)
    for clients in options.clients:
        for tokens in (*options.tokens, None):
            turns = [
                [[text(draw, tokens) for _ in range(clients)] for _ in range(options.batches + 1)]
                for _ in range(options.repeats)
            ]
            for name, (measured, cosine) in measure(systems, turns).items():
                p50, p99 = (1000 * float(np.quantile(measured.wall, q)) for q in (0.5, 0.99))
                print(
                    f"| {clients} | {tokens or 'mixed'} | {name} "
                    f"| {measured.texts / sum(measured.wall):.1f} "
                    f"| {1000 * measured.cpu / measured.texts:.2f} | {p50:.1f} | {p99:.1f} "
                    f"| {cosine:.5f} |",
                    flush=True,
                )


def measure(
    systems: dict[str, Embed], turns: Sequence[Sequence[Sequence[str]]]
) -> dict[str, tuple[Measured, float]]:
    """Each system over its turns, whose first batches warm up; and its least cosine to ours."""
    found = {name: Measured() for name in systems}
    least = dict.fromkeys(systems, 1.0)
    for batches in turns:
        expected: list[Any] = []
        for name, embed in systems.items():
            time.sleep(REST)
            for number, batch in enumerate(batches):
                vectors, wall, cpu = timed(embed, batch)
                if len(expected) == number:
                    expected.append(vectors)
                least[name] = min(
                    least[name], float((vectors * expected[number]).sum(axis=1).min())
                )
                if number:
                    found[name].wall.append(wall)
                    found[name].cpu += cpu
                    found[name].texts += len(batch)
    return {name: (found[name], least[name]) for name in systems}


def timed(embed: Embed, batch: Sequence[str]) -> tuple[Any, float, float]:
    """The vectors, and the seconds of the clock and of the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    vectors = np.asarray(embed(batch))
    return vectors, time.perf_counter() - wall, time.process_time() - cpu


def text(draw: random.Random, tokens: int | None) -> str:
    """Words of one token each; None: a number of them from the mixture."""
    count = draw.randint(*MIXED) if tokens is None else tokens - SPECIAL
    return " ".join(draw.choices(WORDS, k=count))


def quire(path: Path, dtype: str, threads: int) -> Embed:
    runner, tokenizer = load_encoder(path, dtype=dtype, threads=threads)
    return lambda texts: runner.encode(
        tokenizer.encode_batch(texts, truncate_to=tokenizer.max_tokens)
    )


def sentences(path: Path, threads: int, _scratch: Path) -> Embed:
    library = importlib.import_module("sentence_transformers")
    importlib.import_module("torch").set_num_threads(threads)
    model = library.SentenceTransformer(str(path), device="cpu")
    return lambda texts: model.encode(
        list(texts), batch_size=len(texts), show_progress_bar=False, normalize_embeddings=True
    )


def onnx_runtime(path: Path, threads: int, scratch: Path) -> Embed:
    library = importlib.import_module("onnxruntime")
    importlib.import_module("onnx")  # what torch exports by
    file = exported(path, scratch)
    settings = library.SessionOptions()
    settings.intra_op_num_threads = threads
    session = library.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    longest = load_encoder(path, runner="torch", threads=threads)[1]

    def embed(texts: Sequence[str]) -> Floats:
        ids, mask = padded(longest, texts)
        (states,) = session.run(None, {"ids": ids, "mask": mask})
        summed = (states * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1)[:, None]
        vectors: Floats = summed / np.linalg.norm(summed, axis=1, keepdims=True)
        return vectors

    return embed


def padded(tokenizer: EncoderTokenizer, texts: Sequence[str]) -> tuple[Any, Any]:
    rows = [e.ids for e in tokenizer.encode_batch(texts, truncate_to=tokenizer.max_tokens)]
    width = max(map(len, rows))
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    return ids, mask


def exported(path: Path, scratch: Path) -> str:
    """The ONNX file of the network, of any number and length of texts."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    model.requires_grad_(requires_grad=False)

    class States(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, ids: Any, mask: Any) -> Any:  # noqa: ANN401
            return model(input_ids=ids, attention_mask=mask).last_hidden_state

    example = torch.ones((2, 8), dtype=torch.int64)
    file = str(scratch / "model.onnx")
    sizes = {0: "texts", 1: "tokens"}
    torch.onnx.export(
        States(), (example, example), file, input_names=["ids", "mask"], output_names=["states"],
        dynamic_axes={"ids": sizes, "mask": sizes, "states": sizes}, dynamo=False,
    )  # fmt: skip
    return file
