"""Chats with a model whose template is hostile: clear errors, and other calls go on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from model.text.template_renderer import IsolatedTemplate, RenderLimits

pytestmark = pytest.mark.slow

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENDLESS = (
    "{% set s = messages[0].content %}{% if s | length > 9 %}{% for a in s %}{% for b in s %}"
    "{% for c in s %}{% for d in s %}{% for e in s %}{% endfor %}{% endfor %}{% endfor %}"
    "{% endfor %}{% endfor %}{% endif %}{{ s }}"
)
ATTACK = "y" * 200  # fits the context


def chat(content: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": "tiny-model", "messages": messages, "max_tokens": 4}


@pytest.fixture
def use_template(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., IsolatedTemplate]]:
    used: list[IsolatedTemplate] = []

    def use(source: str, **limits: Any) -> IsolatedTemplate:
        used.append(IsolatedTemplate(source, limits=RenderLimits(**limits)))
        monkeypatch.setitem(vars(service.tokenizer), "_template", used[-1])
        return used[-1]

    yield use
    for template in used:
        template.close()


@pytest.mark.parametrize(
    ("limits", "limit"),
    [({"cpu_seconds": 0.2}, "0.2 s of CPU time"), ({"wall_seconds": 0.3}, "0.3 s")],
)
async def test_the_error_names_the_limit(
    limits: dict[str, float], limit: str, service: Any, use_template: Any
) -> None:
    use_template(ENDLESS, **limits)
    reply = await service.post(CHAT, chat(ATTACK))
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("chat_template_limit", "messages")
    assert error["message"] == f"the chat template takes more than {limit} on these messages"


async def test_other_calls_go_on_while_a_template_runs(service: Any, use_template: Any) -> None:
    template = use_template(ENDLESS, cpu_seconds=600.0)
    assert (await service.post(CHAT, chat("hello"))).status_code == 200
    (busy,) = template._idle
    attack = asyncio.create_task(service.post(CHAT, chat(ATTACK)))
    while template._idle:  # until the attack has the process
        await asyncio.sleep(0.001)
    body = {"model": "tiny-model", "prompt": "hello", "max_tokens": 4}
    assert (await service.post(COMPLETIONS, body)).status_code == 200
    assert (await service.post(CHAT, chat("hello"))).status_code == 200
    assert not attack.done()
    os.kill(busy.process.pid, signal.SIGPROF)  # as its CPU limit does
    assert (await attack).status_code == 400


async def test_without_a_free_process_clients_retry(service: Any, use_template: Any) -> None:
    template = use_template("x", processes=1, wait=0.05)
    with template._free:
        reply = await service.post(CHAT, chat("hello"))
    assert reply.status_code == 503
    assert "within 0.05 s" in reply.json()["error"]["message"]
    assert (await service.post(CHAT, chat("hello"))).status_code == 200
