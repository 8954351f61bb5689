"""Fuzzes the API by its OpenAPI document: `python -m tests.api.fuzz [options]`.

Serves the API with its document, a real tokenizer and a scripted engine, and runs all checks of
Schemathesis on it. Options are Schemathesis' own, such as `--max-examples 1000` or
`--include-path /tokenize`.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import schemathesis
from tokenizers import pre_tokenizers

from model.text.tokenizer import Tokenizer
from service.api.http.context import ApiLimits, Models
from service.api.http.observer import ApiObserver
from service.app import build_app, served_model
from service.http.listeners import Listener
from service.http.ports import address, bind
from service.messages import ModelCard
from service.queues.contract import QueueLimits
from service.queues.memory.queue import MemoryQueue
from tests.api.conftest import ScriptedEngine, random_answer
from tests.support.fakes import ALL_WELL
from tests.support.tiny_model import build_tiny_model

MODEL = "tiny-model"
ROOT = Path(__file__).parents[2]
CONFIG = """
[checks.negative_data_rejection]
# 413 and 429 are rejections, too.
expected-statuses = ["400", "401", "403", "404", "405", "406", "408", "409", "413", "414", "415",
                     "422", "428", "429", "431", "5xx"]
[checks.positive_data_acceptance]
# `rejections_of_valid_bodies_have_a_reason` checks these.
expected-statuses = ["2xx", "400", "401", "403", "404", "409", "410", "429", "5xx"]
"""
REASONS = re.compile(
    r"together may be|needs|exactly one|agree|not be (more|less) than|required with"
    r"|times choices|cannot be|room for a token|must be a JSON schema|tool names must be unique"
    r"|chat_template_kwargs|no answer can match|tool that is not in tools"
    r"|\.format (may|has|is|must)"
    r"|tool_use and thinking only for the assistant|the last message must not call tools"
    r"|must be the number of an event|must be the id of an input item|token ids must be from"
    r"|must be from 1m to 30d|in 2000 or later|0 to \d+ days after start_date"
    r"|must be given with|contradicts|do not exclude|this model does not do that"
    r"|the same option twice"
)
"""Errors about fields that depend on each other or on the model: no schema can state these."""


@schemathesis.check
def rejections_of_valid_bodies_have_a_reason(
    _context: schemathesis.CheckContext,
    response: schemathesis.Response,
    case: schemathesis.Case[Any],
) -> None:
    """What the document allows is rejected only for reasons that no document can state."""
    valid = case.meta is not None and case.meta.generation.mode.is_positive
    if valid and response.status_code == 400:
        message = response.json()["error"]["message"]
        assert REASONS.search(message), message


@schemathesis.hook
def filter_case(_context: schemathesis.HookContext, case: schemathesis.Case[Any]) -> bool:
    """Skips cases with unknown headers, which servers ignore."""
    return "x-schemathesis-unknown-property" not in (case.headers or {})


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Yields the URL of a server that runs in a thread."""
    splitter = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = Tokenizer.from_checkpoint(build_tiny_model(splitter).write_folder(folder))
    bound = bind("127.0.0.1", 0)
    ends = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(bound, tokenizer, ends)))
    thread.start()
    try:
        yield address(bound)
    finally:
        ends.set()
        thread.join()


async def _serve(bound: socket.socket, tokenizer: Tokenizer, ends: threading.Event) -> None:
    queue = MemoryQueue(QueueLimits())
    card = ModelCard(
        id=MODEL,
        max_model_len=256,
        vocab_size=tokenizer.vocab_size,
        numeric_class="scripted",
        created=1_700_000_000,
    )
    app = build_app(
        queue,
        Models.of(served_model(tokenizer, lambda: card)),
        probes=ALL_WELL,
        limits=ApiLimits(),
        observer=ApiObserver(),
        version="0.0.1",
        extras=("docs", "page"),
    )
    listener = Listener(app, bound)
    engine = ScriptedEngine(queue, tokenizer, random_answer(tokenizer.vocab_size))
    tasks = [asyncio.create_task(listener.listen()), asyncio.create_task(engine.run())]
    while not ends.is_set():
        await asyncio.sleep(0.05)
    listener.stop()
    await tasks[0]
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def run_checks(
    url: str, options: Sequence[str], *, folder: Path
) -> subprocess.CompletedProcess[str]:
    """One run with all checks; its exit status is 0 if none failed. Works in `folder`."""
    (folder / "schemathesis.toml").write_text(CONFIG)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"]
    command += ["--checks", "all", "--output-sanitize", "false", *options]
    environment = {
        **os.environ,
        "COLUMNS": "120",
        "PYTHONPATH": str(ROOT),
        "SCHEMATHESIS_HOOKS": "tests.api.fuzz",
    }
    return subprocess.run(
        command,
        check=False,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )


def main() -> int:
    with tempfile.TemporaryDirectory() as name, serving(Path(name)) as url:
        run = run_checks(url, sys.argv[1:], folder=Path(name))
    sys.stdout.write(run.stdout + run.stderr)
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
