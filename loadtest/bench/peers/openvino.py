"""OpenVINO GenAI's continuous batching behind a minimal HTTP server, until SIGTERM.

The package has an engine but no server. This one streams greedy completions of a fixed length, and
chats that are sampled and end by themselves. It decodes each token by itself, so characters of
several tokens are garbled: it only measures speed.
"""

from __future__ import annotations

import argparse
import asyncio
import queue
import threading
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

if TYPE_CHECKING:
    import openvino_genai

_DONE = b"data: [DONE]\n\n"


class _Request(NamedTuple):
    """A request for the engine thread, and the queue for its tokens."""

    prompt: str
    body: dict[str, Any]
    out: asyncio.Queue[list[int] | None]
    disconnected: threading.Event


class _Engine(threading.Thread):
    """Steps the pipeline while there is work; no other thread uses it."""

    def __init__(
        self,
        pipeline: openvino_genai.ContinuousBatchingPipeline,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(daemon=True)
        self.inbox: queue.Queue[_Request] = queue.Queue()
        self._pipeline = pipeline
        self._loop = loop
        self._running: list[tuple[openvino_genai.GenerationHandle, _Request]] = []
        self._count = 0

    def run(self) -> None:
        while True:
            self._admit()
            self._pipeline.step()
            self._running = [entry for entry in self._running if self._deliver(*entry)]

    def _admit(self) -> None:
        """Adds all queued requests; blocks if there is no work."""
        import openvino_genai

        while not self._running or not self.inbox.empty():
            request = self.inbox.get()
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens = request.body["max_tokens"]
            config.apply_chat_template = False  # the prompt has it already
            if request.body["temperature"]:
                config.do_sample, config.temperature = True, request.body["temperature"]
                config.rng_seed = request.body["seed"]
                config.set_eos_token_id(self._pipeline.get_tokenizer().get_eos_token_id())
            else:
                config.do_sample, config.ignore_eos = False, True
            self._count += 1
            handle = self._pipeline.add_request(self._count, request.prompt, config)
            self._running.append((handle, request))

    def _deliver(self, handle: openvino_genai.GenerationHandle, request: _Request) -> bool:
        """Sends new tokens to the client. Returns whether the request still runs."""
        if request.disconnected.is_set():
            handle.cancel()
            return False
        ids = []
        ended = False
        while handle.can_read():
            for output in handle.read().values():
                ids += output.generated_ids
                ended = ended or "NONE" not in str(output.finish_reason)
        if ids:
            self._loop.call_soon_threadsafe(request.out.put_nowait, ids)
        if ended:
            self._loop.call_soon_threadsafe(request.out.put_nowait, None)
        return not ended


def build(pipeline: openvino_genai.ContinuousBatchingPipeline) -> FastAPI:
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
        return answer(body["prompt"], body)

    @app.post("/v1/chat/completions")
    async def chats(request: Request) -> StreamingResponse:
        body = orjson.loads(await request.body())
        prompt = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
        return answer(prompt, body)

    def answer(prompt: str, body: dict[str, Any]) -> StreamingResponse:
        queued = _Request(prompt, body, asyncio.Queue(), threading.Event())
        engines[0].inbox.put(queued)
        return StreamingResponse(_stream(queued, tokenizer), media_type="text/event-stream")

    return app


async def _stream(
    request: _Request, tokenizer: openvino_genai.Tokenizer
) -> AsyncGenerator[bytes, None]:
    count = 0
    try:
        while (ids := await request.out.get()) is not None:
            count += len(ids)
            yield _event(tokenizer.decode(ids))
    finally:
        request.disconnected.set()
    prompt_tokens = tokenizer.encode(request.prompt).input_ids.shape[1]
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
    parser.add_argument("--parallel", type=int, required=True, help="concurrent requests")
    options = parser.parse_args()
    scheduling = openvino_genai.SchedulerConfig()
    scheduling.cache_size = 1  # GB
    scheduling.max_num_seqs = options.parallel
    scheduling.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(options.model, scheduling, "CPU", {})
    uvicorn.run(build(pipeline), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
