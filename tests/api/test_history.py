"""What an answer said can be sent back, in all three APIs; and instructions by either role."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from model.text.chat_template import ChatTemplate
from model.text.template_fit import TemplateFit
from model.text.tokenizer import Tokenizer

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
CACHED = {"cache_control": {"type": "ephemeral"}}
COPIED: dict[str, Any] = {"role": "assistant", "refusal": None, "annotations": []}
# Renders all of a message, as templates of reasoning models do; drops roles that it does not know.
TEMPLATE = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}; {% endif %}{% endfor %}"
)
EMPTY = "<user>hi; <assistant>; <user>and?; "
REFUSED = "<user>hi; <assistant>No.; <user>and?; "
THOUGHT = "<user>hi; <assistant><think>Hm.</think>Yes.; <user>and?; "


@pytest.fixture
async def service(
    start_service: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Any]:
    """One whose model has this module's template."""
    monkeypatch.setitem(vars(tokenizer), "_template", ChatTemplate(TEMPLATE))
    monkeypatch.setitem(vars(tokenizer), "_fit", TemplateFit(tokenizer._rendered))
    async with start_service(max_model_len=4096) as started:
        yield started


async def prompt(service: Any, path: str, body: dict[str, Any]) -> str:
    """The prompt that a call makes."""
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    reply = await service.post(path, {"model": "tiny-model", limit: 4} | body)
    assert reply.status_code == 200, reply.text
    return str(service.tokenizer.decode(service.engine.seen[-1].prompt_ids))


def turns(*assistant: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "hi"}, *assistant, {"role": "user", "content": "and?"}]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": None}, EMPTY),
        ({"content": None, "tool_calls": []}, EMPTY),
        ({"content": None, "tool_calls": None, "refusal": None, "reasoning_content": None}, EMPTY),
        ({}, EMPTY),
        ({"content": []}, EMPTY),
        ({"content": "Yes.", "reasoning_content": "Hm."}, THOUGHT),
        ({"content": [{"type": "text", "text": "Yes."} | CACHED], "reasoning_content": "Hm."},
         THOUGHT),
        ({"content": [{"type": "text", "text": "Yes."} | COPIED], "reasoning_content": "Hm."},
         THOUGHT),
        ({"content": None, "provider_specific_fields": {"refusal": None}}, EMPTY),
        ({"content": None, "refusal": "No.", "annotations": []}, REFUSED),
        ({"content": [{"type": "refusal", "refusal": "No."}], "audio": None}, REFUSED),
        ({"content": "No.", "refusal": None, "function_call": None, "annotations": [
            {"type": "url_citation", "url_citation": {"url": "http://x", "title": "x"}}]}, REFUSED),
    ],
)  # fmt: skip
async def test_a_chat_takes_its_own_answers(
    service: Any, message: dict[str, Any], expected: str
) -> None:
    messages = turns({"role": "assistant"} | message)
    assert await prompt(service, CHAT, {"messages": messages}) == expected


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([{"content": None}], EMPTY),
        ([{"content": []}], EMPTY),
        ([{"type": "message", "id": "msg_1", "status": "incomplete", "content": []}], EMPTY),
        ([{"content": None, "tool_calls": []}], EMPTY),
        ([{"content": "Yes.", "reasoning_content": "Hm."}], THOUGHT),
        ([{"content": [{"type": "output_text", "text": "Yes."} | CACHED],
           "reasoning_content": "Hm."}], THOUGHT),
        ([{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x",
           "content": [{"type": "reasoning_text", "text": "Hm."}]},
          {"content": "Yes."}], THOUGHT),
        ([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
          {"content": "Yes."}], THOUGHT),
        ([{"type": "reasoning", "summary": []}, {"content": None}], EMPTY),
    ],
)  # fmt: skip
async def test_a_response_takes_its_own_answers(
    service: Any, items: list[dict[str, Any]], expected: str
) -> None:
    own = [item if item.get("type") == "reasoning" else {"role": "assistant"} | item
           for item in items]  # fmt: skip
    body = {"input": turns(*own)}
    assert await prompt(service, RESPONSES, body) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, EMPTY),
        ([], EMPTY),
        ([{"type": "redacted_thinking", "data": "x"}], EMPTY),
        ([{"type": "thinking", "thinking": "Hm.", "signature": "x"},
          {"type": "text", "text": "Yes."} | CACHED], THOUGHT),
    ],
)  # fmt: skip
async def test_a_message_takes_its_own_answers(service: Any, content: Any, expected: str) -> None:
    messages = turns({"role": "assistant", "content": content})
    assert await prompt(service, MESSAGES, {"messages": messages}) == expected


async def test_an_answer_of_nothing_goes_round(service: Any) -> None:
    """A call that is cut off before its name: no text, and no call either."""
    service.engine.script = lambda _: service.tokenizer.encode('<tool_call>\n{"na', add_bos=False)
    user = {"role": "user", "content": "hi"}
    function = {"name": "now", "parameters": {"type": "object"}}
    body: dict[str, Any] = {"model": "tiny-model", "messages": [user]}
    tools = {"tools": [{"type": "function", "function": function}]}
    message = (await service.post(CHAT, body | tools)).json()["choices"][0]["message"]
    assert message == {
        "role": "assistant", "content": None, "refusal": None, "annotations": [],
    }  # fmt: skip
    assert await prompt(service, CHAT, {"messages": turns(message)}) == EMPTY

    body = {"model": "tiny-model", "input": "hi", "tools": [{"type": "function", **function}]}
    output = (await service.post(RESPONSES, body)).json()["output"]
    assert [item["content"][0]["text"] for item in output] in ([], [""])
    said = "<assistant>; " if output else ""
    assert await prompt(service, RESPONSES, {"input": turns(*output)}) == EMPTY.replace(
        "<assistant>; ", said
    )

    tool = {"name": "now", "input_schema": {"type": "object"}}
    body = {"model": "tiny-model", "messages": [user], "tools": [tool], "max_tokens": 9}
    reply = (await service.post(MESSAGES, body)).json()
    message = {"role": "assistant", "content": reply["content"]}
    assert await prompt(service, MESSAGES, {"messages": turns(message)}) == EMPTY


async def test_reasoning_before_a_call_stays_with_it(service: Any) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}
    reasoning = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]}
    result = {"type": "function_call_output", "call_id": "c", "output": "9h"}
    body = {"input": turns(reasoning, call, result)}
    written = await prompt(service, RESPONSES, body)
    called = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    message = {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [called]}
    results = {"role": "tool", "tool_call_id": "c", "content": "9h"}
    assert written == await prompt(service, CHAT, {"messages": turns(message, results)})
    assert "<think>Hm.</think>" in written


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": turns({"role": "user", "content": None})}, "messages[1].content"),
        (RESPONSES, {"input": turns({"role": "user", "content": []})}, "input[1].content"),
        (
            RESPONSES,
            {"input": [{"role": "user", "content": "x", "reasoning_content": "x"}]},
            "input[0].reasoning_content",
        ),
        (
            RESPONSES,
            {"input": [{"type": "reasoning", "content": [{"type": "x", "text": "y"}]}]},
            "input[0].content[0].type",
        ),
        (MESSAGES, {"messages": turns({"role": "user", "content": None})}, "messages[1].content"),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
            "messages[0].content",
        ),
    ],
)
async def test_only_the_assistant_may_say_nothing_or_reason(
    service: Any, path: str, body: dict[str, Any], param: str
) -> None:
    shared: dict[str, Any] = {"model": "tiny-model"}
    if path == MESSAGES:
        shared["max_tokens"] = 4
    reply = await service.post(path, shared | body)
    assert reply.status_code == 400
    assert param in reply.text


async def test_a_developer_is_obeyed_as_a_system_message_is(service: Any) -> None:
    """The template knows no developer."""
    user = {"role": "user", "content": "hi"}
    expected = "<system>Be brief.; <user>hi; "
    for role in ("system", "developer"):
        said = {"role": role, "content": "Be brief."}
        assert await prompt(service, CHAT, {"messages": [said, user]}) == expected
        assert await prompt(service, RESPONSES, {"input": [said, user]}) == expected
        both = {"input": [said, user], "instructions": "Rhyme."}
        assert await prompt(service, RESPONSES, both) == "<system>Rhyme.; " + expected
    body = {"input": "hi", "instructions": "Be brief."}
    assert await prompt(service, RESPONSES, body) == expected
