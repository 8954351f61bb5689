"""Instructions and empty answers reach the model, whatever its template knows of them.

The templates treat roles as published ones do.
"""

from __future__ import annotations

from typing import Any

import pytest

from model.text.chat_template import ChatTemplate, ChatTemplateError, ChatTemplateLimitError
from model.text.template_fit import TemplateFit

ECHO = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
# Drops roles that it does not know: Qwen 2.5, Qwen 3.
DROPS = (
    "{# developer #}{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}\n"
    "{% endif %}{% for m in messages %}{% if m.role == 'user' or m.role == 'assistant'"
    " or (m.role == 'system' and not loop.first) %}<{{ m.role }}>{{ m.content }}\n{% endif %}"
    "{% endfor %}"
)
# Takes instructions in the first message only, by either name, and drops later ones: GPT-OSS.
FIRST = (
    "{% if messages[0].role in ['system', 'developer'] %}<developer>{{ messages[0].content }}\n"
    "{% endif %}{% for m in messages %}{% if m.role == 'user' or m.role == 'assistant' %}"
    "<{{ m.role }}>{{ m.content }}\n{% endif %}{% endfor %}"
)
# Takes a system message in the first place and wants turns after it: Mistral.
TURNS = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}<system>"
    "{{ messages[0].content }}\n{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)
# Knows both, and renders each anywhere.
KNOWS = (
    "{% for m in messages %}{% if m.role not in ['system', 'developer', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}<{{ m.role | capitalize }}>{{ m.content }}\n"
    "{% endfor %}"
)
# No instructions at all: Gemma 2 refuses them, others drop them.
REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + ECHO
)
IGNORES = (
    "{% for m in messages %}{% if m.role == 'user' or m.role == 'assistant' %}<{{ m.role }}>"
    "{{ m.content }}\n{% endif %}{% endfor %}"
)


def chat(text: str) -> list[dict[str, Any]]:
    """`d.be brief` is a developer message, and so on."""
    roles = {"s": "system", "d": "developer", "u": "user", "a": "assistant"}
    pairs = (line.split(".", 1) for line in text.split())
    return [{"role": roles[role], "content": content} for role, content in pairs]


def rendered(template: str, text: str) -> str:
    source = ChatTemplate(template)

    def render(messages: list[dict[str, Any]]) -> str:
        return source.render({"messages": messages})

    return render(TemplateFit(render).fit(chat(text))).replace("\n", " ").strip()


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (DROPS, "d.A u.B", "<system>A <user>B"),
        (DROPS, "s.A d.B u.C", "<system>A <system>B <user>C"),
        (DROPS, "u.A a.B d.C u.D", "<user>A <assistant>B <system>C <user>D"),
        (ECHO, "d.A u.B", "<system>A <user>B"),
        (ECHO, "s.A d.B u.C d.D", "<system>A <system>B <user>C <system>D"),
        (ECHO.replace("m.role", "m.role | upper"), "d.A u.B", "<SYSTEM>A <USER>B"),
        (KNOWS, "d.A u.B", "<Developer>A <User>B"),
        (KNOWS, "s.A d.B u.C d.D", "<System>A <Developer>B <User>C <Developer>D"),
        (FIRST, "d.A u.B", "<developer>A <user>B"),
        (FIRST, "s.A d.B u.C", "<developer>A  B <user>C"),
        (FIRST, "u.A a.B s.C u.D", "<developer>C <user>A <assistant>B <user>D"),
        (TURNS, "d.A u.B", "<system>A <user>B"),
        (TURNS, "s.A d.B u.C a.D d.E u.F", "<system>A  B  E <user>C <assistant>D <user>F"),
        (TURNS, "u.A u.B a.C u.D u.E", "<user>A  B <assistant>C <user>D  E"),
        (TURNS, "u.A s.B u.C", "<system>B <user>A  C"),
        (ECHO, "u.A u.B a.C u.D u.E", "<user>A <user>B <assistant>C <user>D <user>E"),
        (REFUSES, "d.A u.B", "<user>A  B"),
        (REFUSES, "u.A a.B s.C u.D", "<user>C  A <assistant>B <user>D"),
        (IGNORES, "s.A d.B u.C a.D", "<user>A  B  C <assistant>D"),
        (IGNORES, "u.A a.B d.C u.D", "<user>C  A <assistant>B <user>D"),
        (IGNORES, "d.A a.B", "<assistant>B"),
        (IGNORES, "u.A a.B", "<user>A <assistant>B"),
    ],
)
def test_no_instruction_vanishes(template: str, messages: str, expected: str) -> None:
    assert rendered(template, messages) == expected


# Refuses an empty answer: Mistral from tokenizer version 13 on.
NOT_EMPTY = (
    "{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls"
    " and m.content | length == 0 %}{{ raise_exception('empty') }}{% endif %}{% endfor %}" + TURNS
)


@pytest.mark.parametrize("content", ["", None])
def test_an_empty_answer_is_taken(content: str | None) -> None:
    source = ChatTemplate(NOT_EMPTY)

    def render(messages: list[dict[str, Any]]) -> str:
        return source.render({"messages": messages})

    empty = {"role": "assistant", "content": content}
    calling = empty | {"tool_calls": [{"id": "c"}]}
    fitted = TemplateFit(render).fit([*chat("u.A"), empty, *chat("u.B"), calling])
    assert [message["content"] for message in fitted] == ["A", " ", "B", content]
    assert render(fitted[:3]) == "<user>A\n<assistant> \n<user>B\n"
    untouched = TemplateFit(lambda _: "").fit([*chat("u.A"), empty])
    assert untouched[1] is empty


# Counts turns without calls and results, and takes ids of nine characters: Mistral 7B v0.3.
CALLS = (
    "{% set ns = namespace(index=0) %}{% for m in messages %}"
    "{% if m.role != 'tool' and not m.tool_calls %}"
    "{% if (m.role == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
    "{% set ns.index = ns.index + 1 %}{% endif %}"
    "{% if m.role == 'tool' and m.tool_call_id | length != 9 %}{{ raise_exception('id') }}"
    "{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)
RESULTS = (CALLS, "<user>A <assistant> <tool>B  C"), (ECHO, "<user>A <assistant> <tool>B <user>C")


@pytest.mark.parametrize(("template", "expected"), RESULTS)
def test_the_user_may_speak_after_the_result_of_a_call(template: str, expected: str) -> None:
    source = ChatTemplate(template)

    def render(messages: list[dict[str, Any]]) -> str:
        return source.render({"messages": messages})

    calling = {"role": "assistant", "content": "", "tool_calls": [{"id": "123456789"}]}
    result = {"role": "tool", "content": "B", "tool_call_id": "123456789"}
    messages = [*chat("u.A"), calling, result, *chat("u.C")]
    assert render(TemplateFit(render).fit(messages)).replace("\n", " ").strip() == expected


def test_probes_run_once_and_only_if_needed() -> None:
    seen: list[list[dict[str, Any]]] = []

    def render(messages: list[dict[str, Any]]) -> str:
        seen.append(messages)
        return ChatTemplate(ECHO).render({"messages": messages})

    roles = TemplateFit(render)
    roles.fit(chat("u.A a.B u.C"))
    assert seen == []
    roles.fit(chat("s.A d.B u.C"))
    count = len(seen)
    assert count > 0
    roles.fit(chat("d.X s.Y u.Z"))
    assert len(seen) == count


def test_a_probe_that_meets_a_limit_decides_nothing() -> None:
    """A busy machine must not change what a template is taken to know."""
    failing = True

    def render(messages: list[dict[str, Any]]) -> str:
        if failing:
            raise ChatTemplateLimitError("slow")
        return ChatTemplate(KNOWS).render({"messages": messages})

    roles = TemplateFit(render)
    with pytest.raises(ChatTemplateError, match="slow"):
        roles.fit(chat("d.A u.B"))
    failing = False
    assert roles.fit(chat("d.A u.B")) == chat("d.A u.B")
