"""Clients of a soak: they send requests, disconnect, resume, cancel, and check what they received.

That must always be a prefix of the expected output, and all of it if the finish reason says so. A
client gives up after PATIENCE seconds, which is a violation too.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from service.bench.sse import DONE, Broken, call
from tests.cluster.client import Client, Transcript

Body = dict[str, Any]
Expected = Callable[[Body], Sequence[int]]

RETRY = 0.1  # seconds
DEADLINE = 400  # milliseconds, of requests with a deadline
ENDS: Mapping[str, set[str]] = {  # besides `length`
    "cancelled": {"length", "cancelled"},
    "had a deadline": {"length", "deadline"},
}
MAY_NOT_END = {"left for good", "had a deadline"}


class SoakClients:
    """`answers` counts requests by behaviour; `violations` lists wrong responses.

    `ways` restricts the behaviours to these names; default: all.
    """

    def __init__(
        self,
        client: Client,
        make_body: Callable[[], Body],
        expected: Expected,
        *,
        rng: random.Random,
        ways: Collection[str] = (),
    ) -> None:
        self.answers: Counter[str] = Counter()
        self.violations: list[str] = []
        self.tokens = 0
        self._client = client
        self._make_body = make_body
        self._expected = expected
        self._rng = rng
        self._ways: Mapping[str, tuple[float, Callable[[Transcript], Awaitable[None]]]] = {
            "read to the end": (6, self._read),
            "went away and came back": (3, self._come_back),
            "left for good": (1, self._leave),
            "cancelled": (1, self._cancel),
            "read slowly": (1, self._read_slowly),
            "had a deadline": (1, self._hurry),
        }
        self._names = [name for name in self._ways if not ways or name in ways]

    async def run(self, over: asyncio.Event) -> None:
        """One client: request after request, until `over` is set."""
        weights = [self._ways[name][0] for name in self._names]
        while not over.is_set():
            (name,) = self._rng.choices(self._names, weights=weights)
            transcript = Transcript(self._make_body())
            try:
                await self._ways[name][1](transcript)
                await self._judge(transcript, name)
            except (AssertionError, TimeoutError) as fault:
                self.violations.append(f"{name}: {transcript.call_id}: {fault!r}")
                await asyncio.sleep(RETRY)
            self.answers[name] += 1
            self.tokens += len(transcript.tokens)

    async def _judge(self, transcript: Transcript, name: str) -> None:
        """P1 to P3 as far as a client can check them. Raises AssertionError."""
        expected = list(await asyncio.to_thread(self._expected, transcript.body))
        tokens = transcript.tokens
        assert tokens == expected[: len(tokens)], "wrong token"
        if transcript.error is not None:
            asked_for_it = (name, transcript.error) == ("had a deadline", "deadline_exceeded")
            assert asked_for_it, f"an error: {transcript.error}"
            return
        if transcript.ended:
            allowed = ENDS.get(name, {"length"})
            assert transcript.finish_reason in allowed, f"ended by {transcript.finish_reason}"
        else:
            assert name in MAY_NOT_END, "no end"
        if transcript.finish_reason == "length":
            assert tokens == expected, f"{len(tokens)} tokens of {len(expected)}"
        reasons = [each for each in transcript.events if each.finish_reason]
        last = [each for each in transcript.events if each.data == DONE]
        assert len(last) == transcript.ended, "P3"
        assert len(reasons) == len(last) or name == "left for good", "P3"

    async def _read(self, transcript: Transcript) -> None:
        await self._client.stream(transcript.body, into=transcript)

    async def _begin(self, transcript: Transcript) -> None:
        """Reads a part and disconnects; the response may have ended by then."""
        wanted = self._rng.randrange(int(transcript.body["max_tokens"]))
        reading = asyncio.create_task(self._read(transcript))
        while not reading.done() and (
            transcript.call_id is None or len(transcript.tokens) <= wanted
        ):
            await asyncio.sleep(0.01)
        if reading.done():
            await reading
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading

    async def _come_back(self, transcript: Transcript) -> None:
        await self._begin(transcript)
        await asyncio.sleep(self._rng.uniform(0, 1))
        if not transcript.ended:
            await self._read(transcript)

    async def _leave(self, transcript: Transcript) -> None:
        await self._begin(transcript)

    async def _cancel(self, transcript: Transcript) -> None:
        reading = asyncio.create_task(self._read(transcript))
        await asyncio.sleep(self._rng.uniform(0, 1))
        while not reading.done():
            if transcript.call_id is not None and await self._delete(transcript.call_id):
                break
            await asyncio.sleep(RETRY)
        await reading

    async def _delete(self, call_id: str) -> bool:
        with suppress(Broken):
            address = self._client.next_address()
            async with call(address, "DELETE", f"/v1/streams/{call_id}") as reply:
                assert reply.status in {200, 503}, f"a cancel returned {reply.status}"
                return reply.status == 200
        return False

    async def _read_slowly(self, transcript: Transcript) -> None:
        """Reads slowly on the first connection; then resumes."""
        fields = {"x-quire-event-ids": "1"}
        with suppress(Broken):
            address = self._client.next_address()
            async with call(
                address, "POST", "/v1/completions", body=transcript.body, headers=fields
            ) as reply:
                if reply.status == 200:
                    transcript.call_id = reply.headers["x-request-id"]
                    async for event in reply.events():
                        transcript.events.append(event)
                        await asyncio.sleep(self._rng.uniform(0.02, 0.1))
        if not transcript.ended:
            await self._read(transcript)

    async def _hurry(self, transcript: Transcript) -> None:
        """A deadline in the queue is an error; a later one ends the response."""
        try:
            await self._client.stream(
                transcript.body, into=transcript, x_request_timeout_ms=str(DEADLINE)
            )
        except AssertionError as refused:
            if not str(refused).startswith("504"):
                raise
