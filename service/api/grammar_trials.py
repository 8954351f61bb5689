"""GrammarTrials: whether a grammar compiles, found out in a process apart, under limits.

A bad grammar costs a refusal and never an engine: the process is ended where it takes too long or
too much memory, its crash is an answer, and the next grammar gets a new one. It begins with the
first call that has a grammar and has no part in answering. One grammar is tried at a time, and the
latest outcomes are kept.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import model.grammar_trial
from model.grammar import Grammars
from service.errors import Unavailable

MAX_CHARS = 65_536
PATIENCE = 20.0  # seconds that a busy machine may take for what is bounded in processor time
MAX_WAITING = 32  # grammars before their trial
_KEPT = 256  # outcomes
_ROOT = Path(model.grammar_trial.__file__).parent.parent
_INVALID = "is not valid, or no answer can match it"
_COMPLEX = "is too complex: it takes more time or memory than a grammar may"
_COMPLEX_SIGNS = ("too ", "limit", "max is", "a step takes", "panic")
# What the compiler may be quoted with: names that are nobody's input.
_KEYWORDS = frozenset({
    "oneOf", "not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains",
    "propertyNames", "multipleOf", "dependentRequired", "dependentSchemas", "unevaluatedItems",
    "unevaluatedProperties", "minProperties", "maxProperties", "patternProperties", "format",
})  # fmt: skip
_NOT_SUPPORTED = re.compile(
    r"Unimplemented keys: \[[^\]]*\]|oneOf constraints|min/maxProperties|Unknown format"
)


class GrammarTrials:
    """Tries grammars over one vocabulary. Begins nothing before it is asked."""

    def __init__(self, make_grammars: Callable[[], Grammars]) -> None:
        self._make_grammars = make_grammars
        self._process: subprocess.Popen[bytes] | None = None
        self._outcomes: OrderedDict[str, str | None] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-trials")
        self._waiting = 0

    async def fault(self, notation: str) -> str | None:
        """What is wrong with a grammar, as the end of a sentence; None where it can be used.

        Raises Unavailable where too many wait, or no process can be had.
        """
        if len(notation) > MAX_CHARS:
            return f"may have at most {MAX_CHARS} characters"
        if notation not in self._outcomes:
            if self._waiting >= MAX_WAITING:
                raise Unavailable("too many grammars wait to be checked")
            self._waiting += 1
            loop = asyncio.get_running_loop()
            try:
                outcome = await loop.run_in_executor(self._thread, self._try, notation)
            finally:
                self._waiting -= 1
            self._outcomes[notation] = outcome
            if len(self._outcomes) > _KEPT:
                self._outcomes.popitem(last=False)
        return self._outcomes[notation]

    def close(self) -> None:
        """Ends the process. Another one begins if it is asked again."""
        self._thread.submit(self._end).result()

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
            [sys.executable, "-m", model.grammar_trial.__name__],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        line = model.grammar_trial.vocabulary_line(self._make_grammars())
        try:
            self._ask(line)
        except (OSError, ValueError):
            self._end()
            raise Unavailable("grammars cannot be checked now") from None

    def _ask(self, line: bytes) -> str | None:
        """The reply to a line. Raises OSError or ValueError where there is none."""
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


def _without_input(message: str) -> str:
    """What of the compiler's message may be told: it quotes the grammar, and refusals do not."""
    found = _NOT_SUPPORTED.search(message)
    named = set(re.findall(r"\w+", found[0])) & _KEYWORDS if found else set()
    if named:
        return f"uses what is not supported here: {', '.join(sorted(named))}"
    if any(sign in message for sign in _COMPLEX_SIGNS):
        return _COMPLEX
    return _INVALID
