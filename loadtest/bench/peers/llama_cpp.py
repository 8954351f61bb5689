"""llama.cpp's own HTTP server, from the `xllamacpp` package, until SIGTERM.

The wheels are built for any x86-64 machine; llama.cpp built on the machine itself may be faster.
"""

from __future__ import annotations

import argparse
import signal


def main() -> None:
    """Serves one GGUF file on 127.0.0.1."""
    import xllamacpp

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--parallel", type=int, required=True, help="concurrent requests")
    parser.add_argument("--context", type=int, required=True, help="tokens per request")
    options = parser.parse_args()

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


if __name__ == "__main__":
    main()
