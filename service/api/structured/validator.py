"""GrammarTrials: whether a grammar compiles, found out in a child process under limits.

A bad grammar costs a refusal and never an engine: the process is killed if it takes too long or
too much memory, its crash is a verdict, and the next grammar gets a new process. It starts with the
first call that has a grammar and has no part in answering.

    fault -> verdict of an equal grammar, if kept
          -> the tenant's line -> its turn -> the process -> verdict, kept

One grammar is tried at a time, tenants in turns, so a tenant waits for the trial that runs and
never for all that another tenant has waiting. A verdict depends on the grammar alone, so all
tenants share it. Calls come here after they were counted against their key's requests per minute.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import model.grammar_validator
from model.grammar import Grammars
from service.errors import Unavailable
from service.fair_pool import FairPool

MAX_CHARS = 65_536
PATIENCE = 20.0  # seconds that a busy machine may take for what is bounded in processor time
MAX_TENANT_WAITING = 64  # different grammars of one tenant before their trial
MAX_WAITING = 1024  # of all tenants
MAX_VERDICTS = 4096  # kept
_ROOT = Path(model.grammar_validator.__file__).parent.parent
_INVALID = "is not valid, or no answer can match it"
_TOO_LONG = f"may have at most {MAX_CHARS} characters"
_COMPLEX = "is too complex: it takes more time or memory than a grammar may"
OVER_LIMITS = frozenset({_TOO_LONG, _COMPLEX})  # verdicts on the size of a grammar
_COMPLEX_SIGNS = ("too ", "limit", "max is", "a step takes", "panic")
# Keywords that the compiler supports in part or not at all, the only words of its messages that a
# verdict quotes: no input.
UNSUPPORTED_KEYWORDS = frozenset({
    "oneOf", "not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains",
    "propertyNames", "multipleOf", "dependentRequired", "dependentSchemas", "unevaluatedItems",
    "unevaluatedProperties", "minProperties", "maxProperties", "patternProperties", "format",
})  # fmt: skip
_NOT_SUPPORTED = re.compile(
    r"Unimplemented keys: \[[^\]]*\]|oneOf constraints|min/maxProperties|Unknown format"
)


@dataclass(slots=True)
class _Place:
    """A place in a tenant's line."""

    trial: asyncio.Future[str]
    num_calls: int = 0


class GrammarTrials:
    """Tries grammars over one vocabulary. Begins nothing before it is asked."""

    def __init__(self, make_grammars: Callable[[], Grammars]) -> None:
        self._make_grammars = make_grammars
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # of the process
        self._verdicts = _Verdicts()
        self._places: dict[tuple[str, bytes], _Place] = {}  # by tenant and digest
        self._pool = FairPool(
            "grammar checks",
            threads=1,
            max_weight=MAX_WAITING,
            max_tenant_weight=MAX_TENANT_WAITING,
        )

    async def fault(self, notation: str, *, tenant: str) -> str | None:
        """What is wrong with a grammar, as the end of a sentence; None if it can be used.

        Raises RateLimited if the tenant has too many waiting, Unavailable if all tenants have, or
        if the process cannot be started.
        """
        if len(notation) > MAX_CHARS:
            return _TOO_LONG
        digest = hashlib.sha256(notation.encode()).digest()
        verdict = self._verdicts.get(digest)
        if verdict is None:
            verdict = await self._verdict(digest, notation, tenant=tenant)
        return verdict or None

    def close(self) -> None:
        """Ends the process. Another one starts with the next grammar."""
        with self._lock:
            self._end()

    async def _verdict(self, digest: bytes, notation: str, *, tenant: str) -> str:
        """Calls of a tenant with equal grammars share a place in its line until the last one is
        given up.
        """
        key = (tenant, digest)
        place = self._places.get(key)
        if place is None:
            trial = self._pool.run(tenant, partial(self._judge, digest, notation))
            place = self._places[key] = _Place(asyncio.ensure_future(trial))
        place.num_calls += 1
        try:
            return await asyncio.shield(place.trial)
        finally:
            place.num_calls -= 1
            if not place.num_calls:
                del self._places[key]
                place.trial.cancel()  # has no effect on one that is done

    def _judge(self, digest: bytes, notation: str) -> str:
        """The verdict, from a thread. An equal grammar may have been tried in the meantime."""
        with self._lock:
            verdict = self._verdicts.get(digest)
            if verdict is None:
                verdict = self._try(notation) or ""
                self._verdicts.put(digest, verdict)
        return verdict

    def _try(self, notation: str) -> str | None:
        if self._process is None or self._process.poll() is not None:
            self._begin()
        try:
            message = self._ask(json.dumps(notation).encode() + b"\n")
        except TimeoutError:
            self._end()
            raise Unavailable("grammars cannot be checked now") from None
        except (OSError, ValueError):  # the end of the process is the grammar's fault
            self._end()
            return _COMPLEX
        return None if message is None else _without_input(message)

    def _begin(self) -> None:
        self._end()
        self._process = subprocess.Popen(  # noqa: S603  # our own module
            [sys.executable, "-m", model.grammar_validator.__name__],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        line = model.grammar_validator.vocabulary_line(self._make_grammars())
        try:
            self._ask(line)
        except (OSError, ValueError):
            self._end()
            raise Unavailable("grammars cannot be checked now") from None

    def _ask(self, line: bytes) -> str | None:
        """The reply to a line. Raises OSError or ValueError if there is none."""
        process = self._process
        assert process is not None  # noqa: S101  # the callers' case
        assert process.stdin is not None  # noqa: S101
        assert process.stdout is not None  # noqa: S101
        process.stdin.write(line)
        process.stdin.flush()
        ends = time.monotonic() + PATIENCE
        poll = select.poll()  # select() takes no descriptor above 1,023
        poll.register(process.stdout, select.POLLIN)
        reply = b""
        while not reply.endswith(b"\n"):
            if not poll.poll(max(0.0, ends - time.monotonic()) * 1000):
                raise TimeoutError
            piece = os.read(process.stdout.fileno(), 65_536)
            if not piece:
                raise ConnectionError("the process is gone")
            reply += piece
        message: str | None = json.loads(reply)
        return message

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.communicate()  # takes what is left, and the process's status
        self._process = None


class _Verdicts:
    """The latest verdicts by digest, empty for a grammar that can be used. Any thread."""

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> str | None:
        """None if the grammar was not tried, or too long ago."""
        with self._lock:
            if digest in self._kept:
                self._kept.move_to_end(digest)
            return self._kept.get(digest)

    def put(self, digest: bytes, verdict: str) -> None:
        """Forgets the one that was not asked for the longest, if there are too many."""
        with self._lock:
            self._kept[digest] = verdict
            if len(self._kept) > MAX_VERDICTS:
                self._kept.popitem(last=False)


def _without_input(message: str) -> str:
    """A verdict from the compiler's message, which quotes the grammar; verdicts do not."""
    found = _NOT_SUPPORTED.search(message)
    named = set(re.findall(r"\w+", found[0])) & UNSUPPORTED_KEYWORDS if found else set()
    if named:
        return f"uses what is not supported here: {', '.join(sorted(named))}"
    if any(sign in message for sign in _COMPLEX_SIGNS):
        return _COMPLEX
    return _INVALID
