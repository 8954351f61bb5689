"""Validates grammars in a process of its own: `python -m model.grammar_validator`. Torch-free.

A client's grammar may be a bomb: a hundred characters whose automaton takes minutes and gigabytes,
or thousands of rules that overflow a stack in a library. So a grammar is compiled and sampled here
first. If it exceeds a limit, the process dies, which counts as a refusal. The time limit is CPU
time: a busy machine does not change the result.

The protocol is lines of JSON: first the vocabulary, then one notation per line; each reply is null
or an error message.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import signal
import sys
import time
from typing import Any, TextIO

from model.grammar import GrammarError, Grammars

MEMORY = 1 << 30  # bytes of address space; an empty process takes a tenth
TIME = 0.4  # seconds of processor time for one grammar
SLOWEST_STEP = 0.1  # seconds of one mask: in an engine all other sequences would wait
_WALKS, _STEPS = 3, 16


def vocabulary_line(grammars: Grammars) -> bytes:
    """The first line that the process reads."""
    fields = {
        "tokens": [text.decode("latin-1") for text in grammars.token_bytes],
        "eos_ids": sorted(grammars.eos_ids),
    }
    return json.dumps(fields).encode() + b"\n"


def validate(grammars: Grammars, notation: str) -> str | None:
    """An error message, or None if the grammar compiles and random walks succeed."""
    try:
        for seed in range(_WALKS):
            _walk(grammars, notation, random.Random(seed))
    except GrammarError as error:
        return str(error)
    return None


def _walk(grammars: Grammars, notation: str, draw: random.Random) -> None:
    matcher = grammars.matcher(notation)
    for _ in range(_STEPS):
        began = time.thread_time()
        bits = matcher.bits()
        if time.thread_time() - began > SLOWEST_STEP:
            raise GrammarError("a step takes too long")
        place = draw.randrange(bits.bit_length())
        above = bits >> place  # the first allowed token from there on
        token = place + (above & -above).bit_length() - 1
        if token in grammars.eos_ids:
            return
        matcher.read(token)
        if matcher.ended:
            return


def serve(lines: TextIO, replies: TextIO) -> None:
    """Replies to each line until the input ends."""
    fields: dict[str, Any] = json.loads(lines.readline())
    tokens = [text.encode("latin-1") for text in fields["tokens"]]
    grammars = Grammars(
        tokens, eos_ids=frozenset(fields["eos_ids"]), vocab_size=len(tokens), kept=1
    )
    grammars.prepare("json:{}")
    replies.write("null\n")
    replies.flush()
    for line in lines:
        signal.setitimer(signal.ITIMER_PROF, TIME)  # its signal has no handler and ends the process
        reply = validate(grammars, json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    """Limits its own memory, then serves."""
    with contextlib.suppress(ValueError, OSError):  # if the system cannot, time is the limit
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # crashing is expected
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    serve(sys.stdin, sys.stdout)


if __name__ == "__main__":
    main()
