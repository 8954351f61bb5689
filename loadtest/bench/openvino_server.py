"""OpenVINO GenAI's continuous batching behind a small HTTP server, until SIGTERM. A peer.

The package has an engine and no server, so this one does the least that streaming needs: greedy
completions of a fixed length. Each token becomes text by itself, so that a character of several
tokens is not shown right: this is for measuring speed.
"""

from __future__ import annotations

import argparse
import asyncio
import queue
import threading
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, NamedTuple

import orjson
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

if TYPE_CHECKING:
    import openvino_genai

_DONE = b"data: [DONE]\n\n"


class _Asked(NamedTuple):
    """A request on its way to the engine's thread, and where its tokens go."""

    prompt: str
    max_tokens: int
    out: asyncio.Queue[list[int] | None]
    gone: threading.Event  # the client does not read any more


class _Engine(threading.Thread):
    """Steps the pipeline while there is work. Nothing else touches the pipeline."""

    def __init__(
        self,
        pipeline: openvino_genai.ContinuousBatchingPipeline,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(daemon=True)
        self.inbox: queue.Queue[_Asked] = queue.Queue()
        self._pipeline = pipeline
        self._loop = loop
        self._running: list[tuple[openvino_genai.GenerationHandle, _Asked]] = []
        self._count = 0

    def run(self) -> None:
        while True:
            self._take_in()
            self._pipeline.step()
            self._running = [entry for entry in self._running if self._hand_out(*entry)]

    def _take_in(self) -> None:
        """All that waits; waits itself where there is nothing to do."""
        import openvino_genai

        while not self._running or not self.inbox.empty():
            asked = self.inbox.get()
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos = asked.max_tokens, True
            config.do_sample = False
            self._count += 1
            handle = self._pipeline.add_request(self._count, asked.prompt, config)
            self._running.append((handle, asked))

    def _hand_out(self, handle: openvino_genai.GenerationHandle, asked: _Asked) -> bool:
        """Passes on what there is; whether there will be more."""
        if asked.gone.is_set():
            handle.cancel()
            return False
        ids = []
        ended = False
        while handle.can_read():
            for output in handle.read().values():
                ids += output.generated_ids
                ended = ended or "NONE" not in str(output.finish_reason)
        if ids:
            self._loop.call_soon_threadsafe(asked.out.put_nowait, ids)
        if ended:
            self._loop.call_soon_threadsafe(asked.out.put_nowait, None)
        return not ended


def build(pipeline: openvino_genai.ContinuousBatchingPipeline) -> FastAPI:
    """The server's two routes."""
    app = FastAPI()
    tokenizer = pipeline.get_tokenizer()
    engines: list[_Engine] = []

    @app.get("/health")
    async def health() -> JSONResponse:
        if not engines:
            engines.append(_Engine(pipeline, asyncio.get_running_loop()))
            engines[0].start()
        return JSONResponse({})

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        body = orjson.loads(await request.body())
        asked = _Asked(body["prompt"], body["max_tokens"], asyncio.Queue(), threading.Event())
        engines[0].inbox.put(asked)
        return StreamingResponse(_stream(asked, tokenizer), media_type="text/event-stream")

    return app


async def _stream(
    asked: _Asked, tokenizer: openvino_genai.Tokenizer
) -> AsyncGenerator[bytes, None]:
    count = 0
    try:
        while (ids := await asked.out.get()) is not None:
            count += len(ids)
            yield _event(tokenizer.decode(ids))
    finally:
        asked.gone.set()
    prompt_tokens = tokenizer.encode(asked.prompt).input_ids.shape[1]
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count}
    yield _event("", finish_reason="length", usage=usage)
    yield _DONE


def _event(text: str, *, finish_reason: str | None = None, **fields: object) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish_reason}
    return b"data: " + orjson.dumps({"choices": [choice], **fields}) + b"\n\n"


def main() -> None:
    """Serves one GGUF file on 127.0.0.1."""
    import openvino_genai

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parallel", type=int, required=True, help="requests at a time")
    options = parser.parse_args()
    scheduling = openvino_genai.SchedulerConfig()
    scheduling.cache_size = 1  # GB
    scheduling.max_num_seqs = options.parallel
    scheduling.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(options.model, scheduling, "CPU", {})
    uvicorn.run(build(pipeline), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
