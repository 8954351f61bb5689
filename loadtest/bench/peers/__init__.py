"""The servers to compare: Quire in several configurations, and its peers.

Each peer runs as its documentation recommends for this load: all cores or the best number of
threads, as many parallel requests as there are clients, no end token.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from loadtest.bench.peers.convert import path_of
from loadtest.bench.servers import Command, Plan, Server, find_program

_NAME = "compared"  # Quire requires the model's name; llama.cpp ignores it
_BODY = {"model": _NAME, "ignore_eos": True, "stream_options": {"include_usage": True}}
_FASTEST = "Q4_0"  # llama.cpp repacks it when loading, for the machine's widest instructions
_LAST_CPU = (os.cpu_count() or 1) - 1


def _python(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def _weights(plan: Plan, kind: str) -> Path:
    return path_of(plan.model, kind, folder=plan.folder / "models")


def _folder(plan: Plan) -> Path:
    return plan.folder / "models" / f"{plan.model.stem}-bfloat16"


def _converted(kind: str) -> Callable[[Plan], list[str]]:
    def command(plan: Plan) -> list[str]:
        target = _folder(plan) if kind == "bfloat16" else _weights(plan, kind)
        return _python("loadtest.bench.peers.convert", plan.model, target, kind)

    return command


def _quire(name: str, *flags: str, once: bool = False) -> Server:
    def command(plan: Plan, port: int) -> list[str]:
        address = ("--host", "127.0.0.1", "--port", port, "--admin-port", 0)
        model = ("--model", plan.model, "--model-name", _NAME)
        return _python("service", "serve", *model, *address, *flags, *plan.quire_flags)

    return _quire_server(name, command, once=once)


def _quire_server(
    name: str, command: Command, *, programs: tuple[str, ...] = (), once: bool = False
) -> Server:
    return Server(
        name=name,
        modules=("service",),
        programs=programs,
        command=command,
        health="/health/ready",
        fields=lambda _: _BODY,
        once=once,
    )


def _quire_redis(plan: Plan, port: int) -> list[str]:
    model = ("--port", port, "--model", plan.model, "--model-name", _NAME)
    return _python("loadtest.bench.peers.quire_redis", *model, "--", *plan.quire_flags)


def _llama_cpp(kind: str) -> Server:
    def command(plan: Plan, port: int) -> list[str]:
        model = ("--model", _weights(plan, kind), "--port", port, "--threads", plan.threads)
        sizes = ("--parallel", plan.clients, "--context", plan.context)
        return _python("loadtest.bench.peers.llama_cpp", *model, *sizes)

    return Server(
        name=f"llama.cpp-{kind.lower()}",
        modules=("xllamacpp", "gguf"),
        command=command,
        fields=lambda _: _BODY,
        conversion=_converted(kind),
        tries_threads=True,
        once=kind != _FASTEST,
    )


def _llama_cpp_python(plan: Plan, port: int) -> list[str]:
    sizes = ("--n_ctx", plan.context, "--n_threads", plan.threads)
    address = ("--host", "127.0.0.1", "--port", port)
    return _python("llama_cpp.server", "--model", _weights(plan, _FASTEST), *address, *sizes)


def _no_end_token(plan: Plan) -> Mapping[str, object]:
    import gguf

    end = gguf.GGUFReader(plan.model).fields["tokenizer.ggml.eos_token_id"].contents()
    return {"logit_bias": {str(end): -100}}


def _openvino(kind: str) -> Server:
    def command(plan: Plan, port: int) -> list[str]:
        model = ("--port", port, "--model", _weights(plan, kind), "--parallel", plan.clients)
        return _python("loadtest.bench.peers.openvino", *model)

    return Server(
        name=f"openvino-{kind.lower()}",
        modules=("openvino_genai", "gguf"),
        command=command,
        fields=lambda _: _BODY,
        conversion=_converted(kind),
        once=kind != "Q4_0",
    )


def _transformers(plan: Plan, port: int) -> list[str]:
    base = [find_program("transformers") or "transformers", "serve", str(_folder(plan))]
    address = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    return [*base, *address, "--continuous-batching"]


def _vllm(plan: Plan, port: int) -> list[str]:
    base = [find_program("vllm") or "vllm", "serve", str(_folder(plan)), "--dtype", "bfloat16"]
    sizes = ["--max-model-len", str(plan.context), "--max-num-seqs", str(plan.clients)]
    address = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", _NAME]
    return [*base, *sizes, *address]


_SERVERS = (
    _quire("quire"),
    _quire_server("quire-redis", _quire_redis, programs=("redis-server",)),
    # The outputs repeat themselves, which favours drafts. Without drafts a token costs a step.
    _quire("quire-plain", "--no-speculate"),
    _quire("quire-torch", "--runner", "torch", "--dtype", "bfloat16", once=True),
    *map(_llama_cpp, ("Q4_0", "Q4_1", "Q8_0")),
    Server(
        name="llama-cpp-python",
        modules=("llama_cpp", "sse_starlette", "gguf"),
        command=_llama_cpp_python,
        health="/v1/models",
        fields=_no_end_token,
        conversion=_converted(_FASTEST),
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
        conversion=_converted("bfloat16"),
        once=True,
    ),
    Server(
        name="vllm",
        modules=("transformers", "torch"),  # for the conversion
        programs=("vllm",),
        command=_vllm,
        fields=lambda _: _BODY,
        variables={"VLLM_CPU_OMP_THREADS_BIND": f"0-{_LAST_CPU}", "VLLM_CPU_KVCACHE_SPACE": "2"},
        conversion=_converted("bfloat16"),
        once=True,
        start_timeout=420.0,
    ),
)

SERVERS: Mapping[str, Server] = {server.name: server for server in _SERVERS}
