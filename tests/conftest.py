"""Fixtures of the whole suite: the default model, and a tiny model in both file formats."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import hypothesis
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

import model.text.tokenizer
from model.checkpoint.fetch import default_cache, resolve
from service.startup import load_tokenizer
from tests.cluster.redis_process import RedisServer
from tests.support.one_order import one_order
from tests.support.waiting import PATIENCE

__all__ = ["one_order"]  # a fixture

ROOT = Path(__file__).parent.parent
if not torch.cuda.is_available():
    # Kernels then run in Triton's interpreter, which it decides when it is first imported, by
    # whatever test comes first. Child processes inherit it and, without a GPU, use no kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A run in a shell's background ignores Ctrl-C, and so would the processes that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no fault: by default an example has 0.2 s.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog, don't you think we'll see IT'S THE END?",
    "1 12 123 1234 12345 2024-11-22 3.14159 100000000",
    "def f(x):\n    return x + 1\n\n\nclass A:\n\tpass\r\n\r\n",
    "你好世界 привет мир مرحبا 😀 👩‍👩‍👧 é e\u0301 naïve",
    "      spaces   and\t\ttabs  \n  \n",
] * 20
SIZES = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "width": 96}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Modules of which no test will run are not even imported: what they need takes seconds to."""
    wanted: str = config.getoption("markexpr")
    paths = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    unwanted = [_marks(path) & set(re.findall(r"not (\w+)", wanted)) for path in paths]
    return True if unwanted and all(unwanted) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test begins first: at the end it would keep one core busy and the others idle."""
    items.sort(key=lambda item: item.name != "test_mypy_finds_nothing")


def _marks(path: Path) -> set[str]:
    """Those of a whole module."""
    given = re.search(r"^pytestmark = (\[.*?\]|.*?)$", path.read_text(), re.DOTALL | re.MULTILINE)
    return set(re.findall(r"pytest\.mark\.(\w+)", given[1])) if given else set()


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's file, pulled on first use."""
    return resolve("", cache=default_cache())


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A Llama of two layers with random weights, under the names that config.json folders use."""

    tokenizer: Tokenizer
    weights: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = field(repr=False)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def rows(self) -> int:
        """Rows of the embedding, which may be more than the vocabulary has tokens."""
        return len(self.weights["model.embed_tokens.weight"])

    def with_rows(self, rows: int) -> TinyModel:
        """The same model with an embedding of another size."""
        embedding = np.random.default_rng(1).standard_normal((rows, SIZES["hidden"]), np.float32)
        return replace(self, weights={**self.weights, "model.embed_tokens.weight": embedding})

    def config(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "vocab_size": self.rows,
            "hidden_size": SIZES["hidden"],
            "num_hidden_layers": SIZES["layers"],
            "num_attention_heads": SIZES["heads"],
            "num_key_value_heads": SIZES["kv_heads"],
            "head_dim": SIZES["head_dim"],
            "intermediate_size": SIZES["width"],
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "eos_token_id": 2,
        }

    def write_folder(self, folder: Path) -> Path:
        """config.json, model.safetensors and the tokenizer's files."""
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config()))
        save_file(self.weights, folder / "model.safetensors")
        self.tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        return folder

    def write_gguf(
        self,
        path: Path,
        *,
        pre: str = "smollm",
        storage: str = "F32",
        extra: Mapping[str, np.ndarray[Any, Any]] | None = None,
        vocabulary: Callable[[gguf.GGUFWriter], None] | None = None,
        split: int = 0,
        metadata: Mapping[str, gguf.GGUFValue] | None = None,
    ) -> Path:
        """The same model as llama.cpp's converter writes it: rotary rows interleaved.

        `vocabulary` writes the tokenizer's metadata; by default, those of the model's own. With
        `split`, files of so many tensors each are written beside `path`, and none there.
        `metadata` replaces or adds entries.
        """
        writer = gguf.GGUFWriter(str(path), "llama", split_max_tensors=split)
        writer.add_block_count(SIZES["layers"])
        writer.add_context_length(128)
        writer.add_embedding_length(SIZES["hidden"])
        writer.add_feed_forward_length(SIZES["width"])
        writer.add_head_count(SIZES["heads"])
        writer.add_head_count_kv(SIZES["kv_heads"])
        writer.add_rope_dimension_count(SIZES["head_dim"])
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        if vocabulary is None:
            self._add_vocabulary(writer, pre)
        else:
            vocabulary(writer)
        writer.kv_data[0].update(metadata or {})
        kind = gguf.GGMLQuantizationType[storage]
        for name, values in self.weights.items():
            stored = _interleaved(name, values)
            if stored.ndim == 2:
                writer.add_tensor(
                    _gguf_name(name), gguf.quants.quantize(stored, kind), raw_dtype=kind
                )
            else:
                writer.add_tensor(_gguf_name(name), stored)
        for name, values in (extra or {}).items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _add_vocabulary(self, writer: gguf.GGUFWriter, pre: str) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        body = json.loads(self.tokenizer.to_str())
        tokens = sorted(body["model"]["vocab"], key=body["model"]["vocab"].__getitem__)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in body["model"]["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(value=False)
        writer.add_chat_template(TEMPLATE)


def _interleaved(name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    heads = SIZES["heads"] if "q_proj" in name else SIZES["kv_heads"] if "k_proj" in name else 0
    if not heads:
        return values
    halves = values.reshape(heads, 2, -1, values.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _gguf_name(name: str) -> str:
    replaced = {
        "model.layers.": "blk.",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for theirs, ours in replaced.items():
        name = name.replace(theirs, ours)
    return name


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that the test may harm."""
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """One tiny model a session; nothing changes it."""
    return build_tiny_model(pre_tokenizers.Digits(individual_digits=True))


@pytest.fixture(scope="session")
def tiny_tokenizer(
    tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> model.text.tokenizer.Tokenizer:
    """Its tokenizer, read from its files as any model's is."""
    return load_tokenizer(tiny_model.write_folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def tiny_model_split_by() -> Callable[[str], TinyModel]:
    """Tiny models whose tokenizer.json splits text by a regular expression."""
    return lambda pattern: build_tiny_model(pre_tokenizers.Split(Regex(pattern), "isolated"))


def build_tiny_model(
    splitter: pre_tokenizers.PreTokenizer, *, specials: Sequence[str] = SPECIALS
) -> TinyModel:
    use_regex = isinstance(splitter, pre_tokenizers.Digits)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    rng = np.random.default_rng(0)
    hidden, width = SIZES["hidden"], SIZES["width"]
    query, key = SIZES["heads"] * SIZES["head_dim"], SIZES["kv_heads"] * SIZES["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (tokenizer.get_vocab_size(), hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(SIZES["layers"]):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.input_layernorm.weight": (hidden,),
            f"{block}.post_attention_layernorm.weight": (hidden,),
            f"{block}.self_attn.q_proj.weight": (query, hidden),
            f"{block}.self_attn.k_proj.weight": (key, hidden),
            f"{block}.self_attn.v_proj.weight": (key, hidden),
            f"{block}.self_attn.o_proj.weight": (hidden, query),
            f"{block}.mlp.gate_proj.weight": (width, hidden),
            f"{block}.mlp.up_proj.weight": (width, hidden),
            f"{block}.mlp.down_proj.weight": (hidden, width),
        }
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return TinyModel(tokenizer=tokenizer, weights=weights)


@pytest.fixture(scope="session")
def server_url(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server with the default model, as `make serve` starts it, on free ports."""
    with serving(*default(default_model), log=tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def default(model: Path) -> tuple[str, ...]:
    """The options of a server with the default model."""
    return "--model-name", "smollm2-135m-instruct", "--model", str(model)


@contextlib.contextmanager
def serving(*options: str, log: Path, program: Sequence[str] = ("service",)) -> Iterator[str]:
    """The URL of a server that `python -m PROGRAM serve OPTIONS` runs meanwhile."""
    ports = [free_port(), free_port()]
    command = [sys.executable, "-m", *program, "serve", *options]
    command += ["--port", str(ports[0]), "--admin-port", str(ports[1])]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{ports[0]}"
    try:
        wait_until_ready(url, process, log=log)
        yield url
    finally:
        process.terminate()
        assert process.wait(timeout=PATIENCE) == 0, log.read_text()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_ready(url: str) -> bool:
    """The answer of the readiness probe; False without one. Each socket is closed on return: one
    that the garbage collector closes is an error of whatever test runs then.
    """
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=PATIENCE) as reply:
            return bool(reply.status == 200)
    except urllib.error.HTTPError as refusal:
        refusal.close()
    except OSError:
        pass
    return False


def wait_until_ready(url: str, process: subprocess.Popen[bytes], *, log: Path) -> None:
    """Waits for the readiness probe; fails at once where the process ended."""
    ends = time.monotonic() + 4 * PATIENCE
    while time.monotonic() < ends:
        assert process.poll() is None, log.read_text()
        if is_ready(url):
            return
        time.sleep(0.1)
    raise AssertionError(f"not ready in time:\n{log.read_text()}")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of torch wait for one another, and on a busy machine each wait is long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
