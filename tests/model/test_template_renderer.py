"""Untrusted templates: every attack on time or memory ends with the limit's name.

The attacks run under small limits, so that each takes a fraction of a second.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model.text.chat_template import ChatTemplate, ChatTemplateError, ChatTemplateLimitError
from model.text.template_renderer import (
    IsolatedTemplate,
    RenderLimits,
    TemplateUnavailableError,
    is_trusted,
    open_template,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
MIB = 1024**2
SMALL = RenderLimits(cpu_seconds=0.3, memory=128 * MIB)
MESSAGES = {"messages": [{"role": "user", "content": "y" * 5_000}]}

LOOP = "{% set ns = namespace(s='xx') %}{% for i in range(40) %}{% set ns.s = STEP %}{% endfor %}"
NESTED = "{% for a in s %}{% for b in s %}{% for c in s %}{% for d in s %}{% endfor %}{% endfor %}"
ATTACKS = {
    "~": LOOP.replace("STEP", "ns.s ~ ns.s"),
    "+": LOOP.replace("STEP", "ns.s + ns.s"),
    "list +": LOOP.replace("STEP", "ns.s + ns.s").replace("'xx'", "[1]"),
    "replace filter": LOOP.replace("STEP", "ns.s | replace('x', 'xx')"),
    "replace method": LOOP.replace("STEP", "ns.s.replace('x', 'xx')"),
    "join filter": LOOP.replace("STEP", "[ns.s, ns.s] | join(ns.s)"),
    "join method": LOOP.replace("STEP", "ns.s.join(ns.s)"),
    "tojson": LOOP.replace("STEP", "ns.s | tojson | tojson"),
    "integers": LOOP.replace("STEP", "ns.s * ns.s").replace("'xx'", "7"),
    "batch": "{{ messages | batch(100000000, 'x') | list | length }}",
    "slice": "{{ messages | slice(100000000, 'x') | list | length }}",
    "lipsum": "{{ lipsum(n=1000000) | length }}",
    "loops": "{% set s = messages[0].content %}" + NESTED + "{% endfor %}{% endfor %}",
    "macros": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "macro text": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% else %}xxxx{% endif %}{% endmacro %}"
        "{{ f(60) }}"
    ),
    "block": (
        "{% set a %}{% for i in range(9999) %}{{ messages[0].content }}{% endfor %}{% endset %}"
        "{{ (a | replace('y', a)) | length }}"
    ),
}


@pytest.fixture
def isolated() -> Iterator[Callable[..., IsolatedTemplate]]:
    """Opens templates, and ends their processes after the test."""
    opened: list[IsolatedTemplate] = []

    def open_one(source: str, **limits: Any) -> IsolatedTemplate:
        fields = {"cpu_seconds": SMALL.cpu_seconds, "memory": SMALL.memory} | limits
        opened.append(IsolatedTemplate(source, limits=RenderLimits(**fields)))
        return opened[-1]

    yield open_one
    for template in opened:
        template.close()


def said(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_at_a_limit_and_the_next_rendering_works(
    name: str, isolated: Callable[..., IsolatedTemplate]
) -> None:
    """Without the child, each of these takes gigabytes or minutes of this process."""
    source = "{% if messages[0].content != 'good' %}" + ATTACKS[name] + "{% endif %}ok"
    template = isolated(source)
    tracemalloc.start()
    try:
        with pytest.raises(
            ChatTemplateLimitError, match=r"takes more than (0\.3 s of CPU|128 MiB)"
        ):
            template.render(MESSAGES)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * MIB, "an attack must not take memory here"
    assert template.render(said("good")) == "ok"


def test_isolated_equals_in_process(isolated: Callable[..., IsolatedTemplate]) -> None:
    source = (
        "{{ bos }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ m | tojson }}"
        "{% endfor %}{{ flag }} {{ none is none }} {{ x }} {{ gone is defined }}"
    )
    variables = {
        "bos": "<s>", "flag": True, "none": None, "x": [1, 2.5, {"é": "\U0010fffd"}],
        "messages": [{"role": "user", "content": " \ud800 \x00 é 😀 \n"}],
    }  # fmt: skip
    template = isolated(source)
    for _ in range(3):
        assert template.render(variables) == ChatTemplate(source).render(variables)


def test_a_short_request_does_not_become_a_long_prompt(
    isolated: Callable[..., IsolatedTemplate],
) -> None:
    """The server would have to tokenise it."""
    template = isolated("{% for i in range(9999) %}{{ messages[0].content }}{% endfor %}")
    with pytest.raises(ChatTemplateLimitError, match=r"writes more than 2[67]\d{4}"):
        template.render(said("y" * 100))
    assert template.render(said("y")) == "y" * 9999


def test_the_longest_chat_fits_the_limits() -> None:
    """4 MiB, four bytes for each character; the template copies it several times."""
    source = (
        "{% for m in messages %}{{ '<' + m.role + '>' + (m.content | trim) + ';' }}{% endfor %}"
    )
    template = IsolatedTemplate(source)
    content = "a" * (4 * MIB - 1) + "😀"
    assert template.render(said(content)) == f"<user>{content};"
    template.close()


def test_indented_json_may_be_much_longer_than_the_request(
    isolated: Callable[..., IsolatedTemplate],
) -> None:
    schema: Any = {"enum": list(range(40_000))}
    for _ in range(5):
        schema = {"properties": {"a": schema}}
    variables = {"tools": [schema]}
    template = isolated("{{ tools | tojson(indent=4) }}", cpu_seconds=10.0)
    assert template.render(variables) == json.dumps([schema], indent=4)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            ChatTemplateError,
            "roles must alternate",
        ),
        ("{% if %}", ChatTemplateError, "malformed"),
        ("{{ ''.__class__.__mro__ }}", ChatTemplateError, "failed"),
        ("{% for i in range(99999) %}{% endfor %}", ChatTemplateLimitError, "further than 10000"),
        ("{# " + "x" * 300_000 + " #}", ChatTemplateLimitError, "longer than 262144"),
    ],
)
def test_errors_of_a_template_keep_their_kind(
    source: str, kind: type[Exception], message: str, isolated: Callable[..., IsolatedTemplate]
) -> None:
    with pytest.raises(ChatTemplateError, match=message) as caught:
        isolated(source).render(MESSAGES)
    assert type(caught.value) is kind


def test_what_no_json_holds_is_refused(isolated: Callable[..., IsolatedTemplate]) -> None:
    with pytest.raises(ChatTemplateError, match="JSON"):
        isolated("x").render({"messages": object()})


def test_one_process_is_reused_and_replaced_when_it_dies(
    isolated: Callable[..., IsolatedTemplate],
) -> None:
    template = isolated("{{ messages[0].content }}")
    assert template.render(said("1")) == "1"
    (first,) = template._idle
    assert template.render(said("2")) == "2"
    assert template._idle == [first]
    first.process.kill()
    assert template.render(said("3")) == "3"
    assert template._idle != [first]


def test_a_process_that_does_not_run_is_given_up(isolated: Callable[..., IsolatedTemplate]) -> None:
    template = isolated("{{ messages[0].content }}", wall_seconds=5.0)
    template.render(said("1"))
    (stopped,) = template._idle
    stopped._limits = RenderLimits(wall_seconds=0.2)
    template._limits = stopped._limits
    stopped.process.send_signal(signal.SIGSTOP)
    with pytest.raises(ChatTemplateLimitError, match=r"more than 0\.2 s on"):
        template.render(said("2"))
    assert stopped.process.poll() is not None
    template._limits = SMALL
    assert template.render(said("3")) == "3"


def test_a_reply_that_is_too_long_is_not_read(
    isolated: Callable[..., IsolatedTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.text.template_renderer._MAX_REPLY", 100)
    with pytest.raises(ChatTemplateLimitError, match="crashed"):
        isolated("{{ messages[0].content }}").render(MESSAGES)


def test_a_hostile_rendering_does_not_delay_others(
    isolated: Callable[..., IsolatedTemplate],
) -> None:
    """The hostile one is stopped in the middle, so it cannot end before the others by luck."""
    source = "{% if messages[0].content == 'attack' %}" + ATTACKS["loops"].replace(
        "messages[0].content", "messages[1].content"
    ) + "{% endif %}{{ messages[0].content }}"  # fmt: skip
    template = isolated(source, cpu_seconds=600.0)
    template.render(said("1"))
    (busy,) = template._idle
    failures: list[BaseException] = []

    def attack() -> None:
        try:
            template.render({"messages": [*said("attack")["messages"], *MESSAGES["messages"]]})
        except ChatTemplateLimitError as error:
            failures.append(error)

    thread = threading.Thread(target=attack)
    thread.start()
    try:
        while template._idle:  # until the attack has the process
            time.sleep(0.001)
        for index in range(20):
            assert template.render(said(str(index))) == str(index)
        assert thread.is_alive()
    finally:
        os.kill(busy.process.pid, signal.SIGPROF)  # as its CPU limit does
        thread.join()
    assert len(failures) == 1


def test_waiting_for_a_process_is_bounded(isolated: Callable[..., IsolatedTemplate]) -> None:
    template = isolated("x", processes=1, wait=0.05)
    with template._free, pytest.raises(TemplateUnavailableError, match=r"within 0\.05 s"):
        template.render(MESSAGES)
    assert template.render(MESSAGES) == "x"


def test_a_process_that_cannot_start_is_worth_a_retry(
    isolated: Callable[..., IsolatedTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(TemplateUnavailableError, match="cannot be started"):
            isolated("x").render(MESSAGES)
    assert isolated("x").render(MESSAGES) == "x"


def test_processes_end_with_their_template() -> None:
    template = IsolatedTemplate("x", limits=SMALL)
    template.render(MESSAGES)
    process = template._idle[0].process
    del template
    assert process.poll() is not None


def test_trust_is_by_digest() -> None:
    assert isinstance(open_template("{{ x }}"), IsolatedTemplate)
    assert not is_trusted("\ud800")


def test_the_default_model_renders_in_process(default_model: Path) -> None:
    from model.text.tokenizer import Tokenizer

    assert Tokenizer.from_checkpoint(default_model).renders_in_process


PARENT = """
import sys, threading
from model.text.template_renderer import IsolatedTemplate, RenderLimits
source = "{% if messages %}{% for a in s %}{% for b in s %}{% for c in s %}{% for d in s %}"
source += "{% endfor %}" * 4 + "{% endif %}x"
template = IsolatedTemplate(source, limits=RenderLimits(cpu_seconds=1.0))
template.render({"messages": [], "s": ""})
print(template._idle[0].process.pid, flush=True)
if sys.argv[1] == "busy":
    template.render({"messages": [1], "s": "y" * 5000})
threading.Event().wait()
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_a_process_dies_with_its_parent(state: str) -> None:
    """The parent is killed without a chance to clean up."""
    command = [sys.executable, "-c", PARENT, state]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_until(lambda: state_of(child) == ("R" if state == "busy" else "S"))
        parent.kill()
    wait_until(lambda: state_of(child) in {"Z", "X"})


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.002)


def state_of(pid: int) -> str:
    """R: runs, S: sleeps, Z: dead but not waited for, X: gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
