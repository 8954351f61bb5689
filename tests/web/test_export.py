"""The export of a conversation: run as it is shown, it requests the same answer, for any text."""

from __future__ import annotations

import ast
import json
import random
import subprocess
import sys
import unicodedata
from typing import Any

import pytest
from playwright.async_api import expect

from tests.support.waiting import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

HOSTILE = (
    "It's \"so\" $HOME `id` $(id) \\ \\' !! !x %s\n\ttab {x} '''\"\"\"\nEOF\n # é 😀 "
    "\u202e\u200d\x7f"
)
PIECES = (
    "'", '"', "\\", "`", "$(", "${x}", "!", "!!", "!a", "\n", "\r", "\t", "\0", "\x1b[2J", "\x7f",
    "\x85", "\u2028", "\u202e", "\ufeff", "\ufff9", "😀", "\U000e0041", "é", "%n", "&", ";", "|",
    "#", "~", "*", "EOF", "a", " ", "{", "}", "<script>", "'''", '"""', "\\n", "\\u0041", "-",
)  # fmt: skip
# What the shell passes as the body. With history, as in an interactive shell.
STUB = 'curl() { for last; do :; done; printf "%s\\0" "$last"; }\n'
SHELLS = {"sh": ["sh"], "bash": ["bash"], "history": ["bash", "-o", "history", "-H"]}


def run(*command: str, given: str = "") -> str:
    done = subprocess.run(
        command, input=given.encode(), capture_output=True, timeout=2 * PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def drawn(rng: random.Random, *, depth: int = 3) -> Any:
    """A value of JSON."""
    kind = rng.randrange(6 if depth else 4)
    if kind == 4:
        return [drawn(rng, depth=depth - 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {text(rng): drawn(rng, depth=depth - 1) for _ in range(rng.randrange(4))}
    numbers = (0, 1, -7, 0.25, 1e21, 2**53 - 1)
    return (text(rng), rng.choice(numbers), rng.choice((True, False)), None)[kind]


def text(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randrange(8)))


def arguments(program: str) -> dict[str, Any]:
    """The body that a Python program sends."""
    calls = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
    (create,) = (c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "create")
    body = {word.arg: ast.literal_eval(word.value) for word in create.keywords if word.arg}
    others: dict[str, Any] = body.pop("extra_body", {})
    return body | others


async def test_any_text_reaches_the_server_unchanged_and_nothing_of_it_is_run(visit: Any) -> None:
    tab = await visit()
    rng = random.Random("export")
    bodies = [
        {"model": text(rng), "messages": drawn(rng), "seed": drawn(rng), "top_k": drawn(rng)}
        for _ in range(150)
    ]
    shown: list[list[str]] = await tab.page.evaluate(
        """async (bodies) => {
          const { curl, python } = await import('/web/export.js');
          const options = { keyed: true };
          return bodies.map((body) => [curl, python].map((write) => write(origin, body, options)));
        }""",
        bodies,
    )
    for body, (_, program) in zip(bodies, shown, strict=True):
        assert arguments(program) == body
    for language in shown:
        for code in language:
            unseen = {
                c for c in code if c != "\n" and unicodedata.category(c) in {"Cc", "Cf", "Zl"}
            }
            assert unseen == set()
    commands = "".join(command for command, _ in shown)
    for shell in SHELLS.values():
        sent = run(*shell, given=STUB + commands).split("\0")
        assert [json.loads(data) for data in sent[:-1]] == bodies


async def exported(tab: Any, language: str) -> str:
    await tab.page.select_option("#export-language", language)
    return str(await tab.page.locator("#export-code").text_content())


async def test_the_commands_request_the_answer_of_the_page(visit: Any) -> None:
    """Over two turns, with a system prompt, further fields and texts that are hard to quote."""
    tab = await visit()
    await expect(tab.page.locator("#export-open")).to_be_hidden()
    fields = {"top_k": 40, "stop": ["never'\n"], "min_p": 0.01}
    await tab.set(system='Be "brief", don\'t shout!', max_tokens=12, extra=json.dumps(fields))
    await tab.ask(HOSTILE)
    await tab.ended()
    await tab.ask("And now?")
    await tab.ended()
    answer = (await tab.record())["text"]
    await tab.set(system="Changed since", temperature=1.5, extra="")
    await tab.page.click("#export-open")
    command, program = await exported(tab, "curl"), await exported(tab, "python")
    for shell in SHELLS.values():
        choice = json.loads(run(*shell, given=command))["choices"][0]
        assert choice["message"]["content"] == answer
    assert run(sys.executable, "-", given=program) == f"{answer}\n"


async def test_the_key_is_not_exported(visit: Any) -> None:
    tab = await visit()
    await tab.set(max_tokens=2)
    await tab.ask("Hi")
    await tab.ended()
    await tab.page.evaluate("document.getElementById('key-row').hidden = false")
    await tab.set(key="secret-of-mine")
    await tab.page.click("#export-open")
    for language in ("curl", "python"):
        code = await exported(tab, language)
        assert "OPENAI_API_KEY" in code
        assert "secret-of-mine" not in code
