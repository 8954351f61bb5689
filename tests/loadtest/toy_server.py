"""A server for tests, standard library only: `toy_server.py PORT PACE EXITS_AFTER`.

Each token takes PACE seconds; the process ends after EXITS_AFTER responses, with `--killed` after
the first token. PORT 0 means a free port; it prints its port.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def choice(text: str, finish_reason: str | None = None) -> dict[str, object]:
    return {"index": 0, "text": text, "finish_reason": finish_reason}


async def main(port: int, pace: float, exits_after: int, *, killed: bool) -> None:
    answered = 0
    ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        if "content-length: " in head:
            length = int(head.split("content-length: ")[1].split("\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            for _ in range(body["max_tokens"]):
                await asyncio.sleep(pace)
                writer.write(event(choices=[choice("a ")]))
                if killed:
                    await writer.drain()
                    os.kill(os.getpid(), signal.SIGKILL)
            tokens = {"prompt_tokens": 4, "completion_tokens": body["max_tokens"]}
            writer.write(event(choices=[choice("", "length")], usage=tokens) + b"data: [DONE]\n\n")
            answered += 1
        writer.close()
        if answered == exits_after:
            ended.set()

    async with await asyncio.start_server(answer, "127.0.0.1", port) as server:
        sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        await ended.wait()


if __name__ == "__main__":
    asyncio.run(
        main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), killed="--killed" in sys.argv)
    )
