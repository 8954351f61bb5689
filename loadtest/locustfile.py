"""Streaming users for Locust. Rows: `stream` is a whole response, `first token`, `gap` its parts.

    python -m locust -f loadtest/locustfile.py --headless --host http://127.0.0.1:8000 \
        --shape spike --workload mixed --users 32 --run-time 60s --csv results/load --html ...

A stream fails if it is rejected, broken off, contains an error, lacks its last event or has fewer
tokens than requested. With several `--keys` each user is one tenant with rows of its own.
`python -m loadtest.load` calls this with a server of its own.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

import gevent
import orjson
from locust import LoadTestShape, User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.stats import CSV_STATS_INTERVAL_SEC

from loadtest.shapes import Shape, users_at
from service.bench.client import Stream, StreamError
from service.bench.sse import SseDecoder, SseEvent
from service.bench.workloads import BURST, CALLS, Call, Workload, next_turn

AFTER_A_FAILURE = 0.5  # seconds that a user waits, so that a dead server causes no busy loop


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Options besides Locust's own."""
    parser.add_argument("--shape", choices=list(Shape), default=Shape.STEADY)
    parser.add_argument("--workload", choices=list(Workload), default=Workload.CHAT)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per response")
    parser.add_argument("--think", type=float, default=0.0, help="mean seconds between requests")
    parser.add_argument("--patience", type=float, default=60.0, help="read timeout in seconds")
    parser.add_argument(
        "--keys",
        default="",
        env_var="LOADTEST_KEYS",
        is_secret=True,
        help="API keys, separated by commas",
    )


class ChosenShape(LoadTestShape):
    """The shape that `--shape` names, with `--users` and `--run-time`."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """The number of users now, and how many may start per second."""
        assert self.runner is not None  # noqa: S101 - Locust sets it before the first call
        options = self.runner.environment.parsed_options
        assert options is not None  # noqa: S101 - set if there is a command line
        seconds = float(options.run_time)
        most = int(options.num_users or 1)
        users = users_at(Shape(options.shape), self.get_run_time(), most=most, seconds=seconds)
        return None if users is None else (users, float(most))


@events.test_stop.add_listener
def wait_for_csv(environment: Environment) -> None:  # noqa: ARG001 - Locust's signature
    """Locust writes the files periodically and not at the end."""
    time.sleep(CSV_STATS_INTERVAL_SEC + 0.5)


@dataclass(frozen=True, slots=True)
class Tenant:
    """`name` is part of the rows; empty if there is one tenant only."""

    key: str
    name: str


class StreamingUser(User):
    """Sends a request, reads the stream to its end, waits, repeats."""

    _numbers = itertools.count()

    def on_start(self) -> None:
        """Assigns tenants round robin."""
        options = self.environment.parsed_options
        assert options is not None  # noqa: S101 - set if there is a command line
        self.options = options
        self.rng = random.Random()
        keys = [key for key in options.keys.split(",") if key]
        number = next(self._numbers) % max(1, len(keys))
        self.tenant = Tenant(
            key=keys[number] if keys else "",
            name=f" tenant {number + 1}" if len(keys) > 1 else "",
        )

    def wait_time(self) -> float:
        """Seconds, exponentially distributed: users are independent."""
        mean = float(self.options.think)
        return self.rng.expovariate(1 / mean) if mean else 0.0

    @task
    def turn(self) -> None:
        """One request, or a burst."""
        workload = next_turn(Workload(self.options.workload), self.rng)
        calls = [
            CALLS[workload](self.rng, int(self.options.tokens))
            for _ in range(BURST if workload is Workload.BURST else 1)
        ]
        name = workload.value + self.tenant.name
        running = [gevent.spawn(self._complete, call, name) for call in calls]
        try:
            gevent.joinall(running, raise_error=True)
        finally:
            gevent.killall(running)
        if not all(each.value for each in running):
            time.sleep(AFTER_A_FAILURE)

    def _complete(self, call: Call, name: str) -> bool:
        """One request and its rows. Returns whether it succeeded."""
        stream, fault = Stream(), None
        sent = time.monotonic()
        size = 0
        try:
            for event in self._events(call):
                size += len(event.data)
                stream.read(event)
            fault = stream.fault(max_tokens=call.tokens, sends_done=True)
        except StreamError as error:
            fault = str(error)
        except (OSError, HTTPException, ValueError) as error:
            fault = f"{type(error).__name__}: {error}"
        ended = time.monotonic()
        if stream.arrivals:
            self._row("first token", name, stream.arrivals[0] - sent)
        for before, after in itertools.pairwise(stream.arrivals):
            self._row("gap", name, after - before)
        self._row("stream", name, ended - sent, size=size, fault=fault)
        return fault is None

    def _events(self, call: Call) -> Iterator[SseEvent]:
        """Events of one request, on a connection of its own. Raises StreamError."""
        parts = urlsplit(self.environment.host or "")
        connection = HTTPConnection(
            parts.hostname or "127.0.0.1", parts.port, timeout=float(self.options.patience)
        )
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.tenant.key:
            headers["Authorization"] = f"Bearer {self.tenant.key}"
        try:
            body = orjson.dumps(call.body(self.options.model))
            connection.request("POST", call.path, body=body, headers=headers)
            reply = connection.getresponse()
            if reply.status != 200:
                raise StreamError(f"HTTP {reply.status}: {reply.read(200)!r}")
            decoder = SseDecoder()
            while data := reply.read1(65536):
                yield from decoder.feed(data, at=time.monotonic())
        finally:
            connection.close()

    def _row(
        self, kind: str, name: str, seconds: float, *, size: int = 0, fault: str | None = None
    ) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=1e3 * seconds,
            response_length=size,
            exception=None if fault is None else StreamError(fault),
            context={},
        )
