"""GrammarValidator: compiles grammars in a child process under limits, to find those that fail.

A bad grammar costs a rejected request and never an engine: the process is killed if it takes too
long or too much memory, a crash counts as an error of the grammar, and the next grammar gets a new
process. The process starts with the first request that has a grammar; it generates nothing.

    error -> cached result of an equal grammar
          -> queue of the tenant -> process -> result, cached

One grammar is compiled at a time, tenants in turns, so a tenant waits for the running compilation
and never for another tenant's queue. A result depends on the grammar alone, so tenants share it.
Requests are charged to their key's requests per minute before they get here.
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
TIMEOUT = 20.0  # seconds; the process itself limits its CPU time, but the machine may be busy
MAX_TENANT_WAITING = 64  # different grammars of one tenant in the queue
MAX_WAITING = 1024  # of all tenants
MAX_RESULTS = 4096  # cached
_ROOT = Path(model.grammar_validator.__file__).parent.parent
_INVALID = "is not valid, or no answer can match it"
_TOO_LONG = f"may have at most {MAX_CHARS} characters"
_COMPLEX = "is too complex: compiling it exceeds the time or memory limit of a grammar"
OVER_LIMITS = frozenset({_TOO_LONG, _COMPLEX})  # errors about the size of a grammar
_COMPLEX_SIGNS = ("too ", "limit", "max is", "a step takes", "panic")
# Keywords that the compiler supports in part or not at all: the only words of its messages that an
# error quotes, because they cannot come from the input.
UNSUPPORTED_KEYWORDS = frozenset({
    "oneOf", "not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains",
    "propertyNames", "multipleOf", "dependentRequired", "dependentSchemas", "unevaluatedItems",
    "unevaluatedProperties", "minProperties", "maxProperties", "patternProperties", "format",
})  # fmt: skip
_NOT_SUPPORTED = re.compile(
    r"Unimplemented keys: \[[^\]]*\]|oneOf constraints|min/maxProperties|Unknown format"
)


@dataclass(slots=True)
class _Entry:
    """An entry in a tenant's queue."""

    result: asyncio.Future[str]
    num_callers: int = 0


class GrammarValidator:
    """Validates grammars over one vocabulary. Starts no process before it is called."""

    def __init__(self, make_grammars: Callable[[], Grammars]) -> None:
        self._make_grammars = make_grammars
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # of the process
        self._results = _Results()
        self._entries: dict[tuple[str, bytes], _Entry] = {}  # by tenant and digest
        self._pool = FairPool(
            "grammar checks",
            threads=1,
            max_weight=MAX_WAITING,
            max_tenant_weight=MAX_TENANT_WAITING,
        )

    async def error(self, grammar: str, *, tenant: str) -> str | None:
        """Returns the error of a grammar, as the end of a sentence; None if it is valid.

        Raises RateLimited if too many grammars of the tenant wait, Unavailable if too many of all
        tenants wait or if the process cannot be started.
        """
        if len(grammar) > MAX_CHARS:
            return _TOO_LONG
        digest = hashlib.sha256(grammar.encode()).digest()
        result = self._results.get(digest)
        if result is None:
            result = await self._result(digest, grammar, tenant=tenant)
        return result or None

    def close(self) -> None:
        """Kills the process. Another one starts with the next grammar."""
        with self._lock:
            self._kill()

    async def _result(self, digest: bytes, grammar: str, *, tenant: str) -> str:
        """Equal grammars of a tenant share an entry in its queue until the last caller is
        cancelled.
        """
        key = (tenant, digest)
        entry = self._entries.get(key)
        if entry is None:
            result = self._pool.run(tenant, partial(self._compiled, digest, grammar))
            entry = self._entries[key] = _Entry(asyncio.ensure_future(result))
        entry.num_callers += 1
        try:
            return await asyncio.shield(entry.result)
        finally:
            entry.num_callers -= 1
            if not entry.num_callers:
                del self._entries[key]
                entry.result.cancel()  # has no effect if it is done

    def _compiled(self, digest: bytes, grammar: str) -> str:
        """Runs in a thread. An equal grammar may have been compiled in the meantime."""
        with self._lock:
            result = self._results.get(digest)
            if result is None:
                result = self._compile(grammar) or ""
                self._results.put(digest, result)
        return result

    def _compile(self, grammar: str) -> str | None:
        if self._process is None or self._process.poll() is not None:
            self._start()
        try:
            message = self._ask(json.dumps(grammar).encode() + b"\n")
        except TimeoutError:
            self._kill()
            raise Unavailable("grammars cannot be checked now") from None
        except (OSError, ValueError):  # the grammar crashed the process
            self._kill()
            return _COMPLEX
        return None if message is None else _without_input(message)

    def _start(self) -> None:
        self._kill()
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
            self._kill()
            raise Unavailable("grammars cannot be checked now") from None

    def _ask(self, line: bytes) -> str | None:
        """Returns the reply to a line. Raises OSError or ValueError if there is none."""
        process = self._process
        assert process is not None  # noqa: S101  # callers start it
        assert process.stdin is not None  # noqa: S101
        assert process.stdout is not None  # noqa: S101
        process.stdin.write(line)
        process.stdin.flush()
        deadline = time.monotonic() + TIMEOUT
        poll = select.poll()  # select() takes no descriptor above 1,023
        poll.register(process.stdout, select.POLLIN)
        reply = b""
        while not reply.endswith(b"\n"):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            data = os.read(process.stdout.fileno(), 65_536)
            if not data:
                raise ConnectionError("the process ended")
            reply += data
        message: str | None = json.loads(reply)
        return message

    def _kill(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.communicate()  # closes the pipes and reaps the process
        self._process = None


class _Results:
    """An LRU cache from digest to error, empty for a valid grammar. Thread-safe."""

    def __init__(self) -> None:
        self._cached: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> str | None:
        with self._lock:
            if digest in self._cached:
                self._cached.move_to_end(digest)
            return self._cached.get(digest)

    def put(self, digest: bytes, result: str) -> None:
        with self._lock:
            self._cached[digest] = result
            if len(self._cached) > MAX_RESULTS:
                self._cached.popitem(last=False)


def _without_input(message: str) -> str:
    """The error for a message of the compiler, which may quote the grammar; errors do not."""
    found = _NOT_SUPPORTED.search(message)
    named = set(re.findall(r"\w+", found[0])) & UNSUPPORTED_KEYWORDS if found else set()
    if named:
        return f"uses unsupported keywords: {', '.join(sorted(named))}"
    if any(sign in message for sign in _COMPLEX_SIGNS):
        return _COMPLEX
    return _INVALID
