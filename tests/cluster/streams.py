"""Many clients in the background while a test injects faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Self

from tests.cluster.client import PATIENCE, Client, Transcript
from tests.cluster.processes import wait_until


class Streams:
    """Sends a request for each body, all at the same time."""

    def __init__(
        self,
        client: Client,
        bodies: Sequence[dict[str, Any]],
        *,
        patience: float = PATIENCE,
        **headers: str,
    ) -> None:
        self.transcripts = [Transcript(body) for body in bodies]
        self._afterwards: list[Callable[[], None]] = []
        self._tasks = [
            asyncio.create_task(client.stream(each.body, into=each, patience=patience, **headers))
            for each in self.transcripts
        ]

    async def wait_started(self, tokens: int = 3) -> list[str]:
        """Waits until each has received some tokens. Returns the ids of the calls."""
        async with asyncio.timeout(PATIENCE):
            while not all(len(each.tokens) >= tokens for each in self.transcripts):
                await self._unless_failed(asyncio.sleep(0.005))
        assert not any(each.ended for each in self.transcripts), "a stream ended too early"
        return self.call_ids

    async def _unless_failed(self, waiting: Any) -> None:
        await waiting
        for task in self._tasks:
            if task.done():
                task.result()

    @property
    def call_ids(self) -> list[str]:
        return [each.call_id for each in self.transcripts if each.call_id]

    @property
    def num_ended(self) -> int:
        return sum(each.ended for each in self.transcripts)

    def on_end(self, act: Callable[[], None]) -> None:
        """Registers a function to call when all have ended."""
        self._afterwards.append(act)

    async def wait_ended(self) -> list[Transcript]:
        await asyncio.gather(*self._tasks)
        for act in self._afterwards:
            act()
        return self.transcripts

    async def disconnect(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class ClosedLoop:
    """`width` clients that send request after request until the context ends."""

    def __init__(
        self, client: Client, make_body: Callable[[], dict[str, Any]], *, width: int
    ) -> None:
        self.transcripts: list[Transcript] = []
        self._client = client
        self._make_body = make_body
        self._width = width
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._send_requests()) for _ in range(self._width)]
        return self

    async def __aexit__(self, kind: object, error: object, traceback: object) -> None:
        self._stopping = True
        if error is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=error is not None)

    async def _send_requests(self) -> None:
        while not self._stopping:
            transcript = Transcript(self._make_body())
            self.transcripts.append(transcript)
            await self._client.stream(transcript.body, into=transcript)


async def until(condition: Callable[[], object], what: str, *, seconds: float = 60.0) -> None:
    """Polls in a thread, so that clients go on."""
    await asyncio.to_thread(wait_until, condition, what, seconds=seconds)
