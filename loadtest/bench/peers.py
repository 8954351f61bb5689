"""The servers that are compared: Quire in three ways, and its peers. One entry each.

A peer is given what its own documentation says is best for this: all cores or the better number of
threads, as many parallel requests as there are clients, no thinking about an end token.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from loadtest.bench.requantise import path_of
from loadtest.bench.servers import Plan, Server, find_program

_NAME = "compared"  # Quire wants a request to name its model; llama.cpp ignores the name
_WHOLE = {"model": _NAME, "ignore_eos": True, "stream_options": {"include_usage": True}}
_LLAMA_CPP_TYPES = ("Q4_0", "Q4_1", "Q8_0")
_LLAMA_CPP_FASTEST = "Q4_0"  # repacked when loading, for the machine's widest instructions
_LAST_CPU = (os.cpu_count() or 1) - 1


def _quire(*flags: str) -> Callable[[Plan, int], list[str]]:
    def command(plan: Plan, port: int) -> list[str]:
        base = [sys.executable, "-m", "service", "serve", "--model", str(plan.model)]
        where = ["--host", "127.0.0.1", "--port", str(port), "--admin-port", "0"]
        return [*base, "--model-name", _NAME, *where, *flags, *plan.quire_flags]

    return command


def _quire_redis(plan: Plan, port: int) -> list[str]:
    base = [sys.executable, "-m", "loadtest.bench.quire_redis", "--port", str(port)]
    return [*base, "--model", str(plan.model), "--model-name", _NAME, "--", *plan.quire_flags]


def _weights(plan: Plan, kind: str) -> Path:
    return path_of(plan.model, kind, folder=plan.folder / "models")


def _requantise(kind: str) -> Callable[[Plan], list[str]]:
    def command(plan: Plan) -> list[str]:
        paths = [str(plan.model), str(_weights(plan, kind))]
        return [sys.executable, "-m", "loadtest.bench.requantise", *paths, kind]

    return command


def _llama_cpp(kind: str) -> Server:
    def command(plan: Plan, port: int) -> list[str]:
        model = ["--model", str(_weights(plan, kind))]
        sizes = ["--parallel", str(plan.clients), "--context", str(plan.context)]
        where = ["--port", str(port), "--threads", str(plan.threads)]
        return [sys.executable, "-m", "loadtest.bench.llama_server", *model, *where, *sizes]

    return Server(
        name=f"llama.cpp-{kind.lower()}",
        modules=("xllamacpp", "gguf"),
        command=command,
        fields=lambda _: _WHOLE,
        conversion=_requantise(kind),
        tries_threads=True,
        once=kind != _LLAMA_CPP_FASTEST,
    )


def _llama_cpp_python(plan: Plan, port: int) -> list[str]:
    base = [sys.executable, "-m", "llama_cpp.server", "--model", str(_weights(plan, "Q4_0"))]
    sizes = ["--n_ctx", str(plan.context), "--n_threads", str(plan.threads)]
    return [*base, "--host", "127.0.0.1", "--port", str(port), *sizes]


def _never_ends(plan: Plan) -> Mapping[str, object]:
    import gguf

    end = gguf.GGUFReader(plan.model).fields["tokenizer.ggml.eos_token_id"].contents()
    return {"logit_bias": {str(end): -100}}


def _openvino(kind: str) -> Server:
    def command(plan: Plan, port: int) -> list[str]:
        base = [sys.executable, "-m", "loadtest.bench.openvino_server", "--port", str(port)]
        return [*base, "--model", str(_weights(plan, kind)), "--parallel", str(plan.clients)]

    return Server(
        name=f"openvino-{kind.lower()}",
        modules=("openvino_genai", "gguf"),
        command=command,
        fields=lambda _: _WHOLE,
        conversion=_requantise(kind),
        once=kind != "Q4_0",
    )


def _folder(plan: Plan) -> Path:
    return plan.folder / "models" / f"{plan.model.stem}-bfloat16"


def _to_folder(plan: Plan) -> list[str]:
    return [
        sys.executable,
        "-m",
        "loadtest.bench.transformers_folder",
        str(plan.model),
        str(_folder(plan)),
    ]


def _transformers(plan: Plan, port: int) -> list[str]:
    base = [find_program("transformers") or "transformers", "serve", str(_folder(plan))]
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    return [*base, *where, "--continuous-batching"]


def _vllm(plan: Plan, port: int) -> list[str]:
    base = [find_program("vllm") or "vllm", "serve", str(_folder(plan)), "--dtype", "bfloat16"]
    sizes = ["--max-model-len", str(plan.context), "--max-num-seqs", str(plan.clients)]
    where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", _NAME]
    return [*base, *sizes, *where]


_SERVERS = (
    Server(
        name="quire",
        modules=("service",),
        command=_quire(),
        health="/health/ready",
        fields=lambda _: _WHOLE,
    ),
    Server(
        name="quire-redis",
        modules=("service",),
        programs=("redis-server",),
        command=_quire_redis,
        health="/health/ready",
        fields=lambda _: _WHOLE,
    ),
    # These answers repeat themselves, which drafts thrive on. Without drafts a token costs a step.
    Server(
        name="quire-plain",
        modules=("service",),
        command=_quire("--no-speculate"),
        health="/health/ready",
        fields=lambda _: _WHOLE,
    ),
    Server(
        name="quire-torch",
        modules=("service",),
        command=_quire("--runner", "torch", "--dtype", "bfloat16"),
        health="/health/ready",
        fields=lambda _: _WHOLE,
        once=True,
    ),
    *map(_llama_cpp, _LLAMA_CPP_TYPES),
    Server(
        name="llama-cpp-python",
        modules=("llama_cpp", "sse_starlette", "gguf"),
        command=_llama_cpp_python,
        health="/v1/models",
        fields=_never_ends,
        conversion=_requantise("Q4_0"),
        once=True,
    ),
    *map(_openvino, ("Q4_0", "Q8_0")),
    Server(
        name="transformers",
        modules=("transformers", "torch"),
        programs=("transformers",),
        command=_transformers,
        fields=lambda plan: {
            "model": str(_folder(plan)),
            "generation_config": '{"do_sample": false}',
        },
        sends_done=False,
        conversion=_to_folder,
        once=True,
    ),
    Server(
        name="vllm",
        modules=("transformers", "torch"),  # for the conversion
        programs=("vllm",),
        command=_vllm,
        fields=lambda _: _WHOLE,
        variables={"VLLM_CPU_OMP_THREADS_BIND": f"0-{_LAST_CPU}", "VLLM_CPU_KVCACHE_SPACE": "2"},
        conversion=_to_folder,
        once=True,
        start_timeout=420.0,
    ),
)

SERVERS: Mapping[str, Server] = {server.name: server for server in _SERVERS}
