"""Each tool-call format end to end: detected in the template, rendered by it, and parsed."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from model.grammar import Grammars
from model.text.chat_template import ChatTemplate
from model.text.tokenizer import Tokenizer
from service.api.structured.validator import GrammarValidator
from service.api.tools.formats import TOOL_FORMATS, tool_format_name
from service.messages import FinishReason

CHAT = "/v1/chat/completions"


def with_bars(template: str) -> str:
    """DeepSeek's special tokens: full-width bars, and a block between the words."""
    return re.sub(
        r"<\|tool_\w+\|>",
        lambda match: match[0].replace("|", "\uff5c").replace("_", "\u2581"),
        template,
    )


# Each like its family's templates: the fields that they read, and the messages that they reject.
HERMES = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "</tools><|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.strip() }}{% for c in m.tool_calls %}{% set f = c.function %}"
    "{{ '\n' if not loop.first }}"
    '<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
)
QWEN_CODER = (
    "{% if tools %}<tools>{% for t in tools %}<name>{{ t.function.name }}</name>"
    "<description>{{ t.function.description }}</description>{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}{{ '\n<tool_call>\n<function=' + c.function.name + '>\n' }}"
    "{% for key, value in c.function.arguments | items %}{{ '<parameter=' + key + '>\n' }}"
    "{{ value if value is string else value | tojson }}{{ '\n</parameter>\n' }}{% endfor %}"
    "</function>\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
)
LLAMA = (
    "{% if tools %}Environment: ipython {{ tools | tojson(indent=4) }}{% endif %}"
    "{% for m in messages %}{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}"
    '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'
    "{% elif m.role == 'tool' %}{{ {'output': m.content} | tojson }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
)
MISTRAL = (
    "{% if tools is defined and tools is not none %}[AVAILABLE_TOOLS]{% for t in tools %}"
    "{% for k, v in t.function.items() %}{{ k }}: {{ v if v is string else v | tojson }} "
    "{% endfor %}{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls is defined and m.tool_calls is not none %}"
    "[TOOL_CALLS][{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('nine') }}{% endif %}"
    "{{ (c.function | tojson)[:-1] }}{{ '}' if loop.last else '}, ' }}{% endfor %}]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }} {{ m.tool_call_id }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
# Mistral from tokenizer version 11 on; version 13 and later leave the ids out.
V11 = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{{ m.content }}{% for c in m.tool_calls %}"
    "[TOOL_CALLS]{{ c.function.name }}CALL_ID[ARGS]{{ c.function.arguments | tojson }}{% endfor %}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
CALL_ID = "{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}[CALL_ID]{{ c.id }}"
# V3 and R1 do not list tools, write arguments as they are, and call only without content.
DEEPSEEK = with_bars(
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}"
    "{% if m.role == 'user' %}{{ '<User>' + m.content }}{% endif %}"
    "{% if m.role == 'assistant' and m.content is none %}<|tool_calls_begin|>"
    "{% for c in m.tool_calls %}{{ '\n' if not loop.first }}<|tool_call_begin|>{{ c.type }}"
    "<|tool_sep|>{{ c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}"
    "<|tool_call_end|>{% endfor %}<|tool_calls_end|>"
    "{% elif m.role == 'assistant' %}{{ m.content }}{% endif %}"
    "{% if m.role == 'tool' %}<output>{{ m.content }}</output>{% endif %}{% endfor %}"
)
DEEPSEEK_V31 = with_bars(
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}"
    "{% if m.role == 'user' %}{{ '<User>' + m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ m.content or '' }}{% if m.tool_calls %}"
    "<|tool_calls_begin|>{% for c in m.tool_calls %}<|tool_call_begin|>{{ c.function.name }}"
    "<|tool_sep|>{{ c.function.arguments if c.function.arguments is string else "
    "c.function.arguments | tojson }}<|tool_call_end|>{% endfor %}<|tool_calls_end|>"
    "{% endif %}{% endif %}"
    "{% if m.role == 'tool' %}<output>{{ m.content }}</output>{% endif %}{% endfor %}"
)
GPT_OSS = (
    "{% if tools %}# Tools{% for t in tools %}// {{ t.function.description }}\n"
    "type {{ t.function.name }} = (_: any) => any;{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' and 'tool_calls' in m %}"
    "{% set f = m.tool_calls[0].function %}"
    "{% if m.content %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.content }}<|end|>"
    "{% endif %}{{ '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary ' }}"
    "{{ 'json<|message|>' + f.arguments | tojson }}<|im_end|>{% elif m.role == 'tool' %}"
    "{{ '<|start|>functions to=assistant<|channel|>commentary<|message|>' + m.content }}<|end|>"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('an unknown role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content + '<|im_end|>' }}\n{% endfor %}"
)
TEMPLATES = {
    "deepseek": DEEPSEEK,
    "deepseek-v3.1": DEEPSEEK_V31,
    "gpt-oss": GPT_OSS,
    "hermes": HERMES,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mistral-v11": V11.replace("CALL_ID", ""),
    "plain": PLAIN,
    "qwen3-coder": QWEN_CODER,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            "strict": True,
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


# What the prompt has for calls, where it differs from what models write.
WRITTEN: dict[str, Any] = {
    "gpt-oss": lambda calls: (
        f" to=functions.{calls[0][0]}<|channel|>commentary json<|message|>{calls[0][1]}"
    ),
    "mistral": lambda calls: "[TOOL_CALLS][" + ", ".join(
        f'{{"name": "{called}", "arguments": {arguments}}}' for called, arguments in calls
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(name: str, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A model's tokenizer, in which the format's markers are special tokens."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([], trainer)
    specials = ("<|im_start|>", "<|im_end|>", "<s>", *TOOL_FORMATS[name].markers)
    raw.add_special_tokens([AddedToken(text, special=True) for text in specials])
    folder: Path = tmp_path_factory.mktemp(name)
    raw.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": "<s>", "chat_template": TEMPLATES[name]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"vocab_size": raw.get_vocab_size()}))
    return Tokenizer.from_checkpoint(folder)


class TrialsHere(GrammarValidator):
    """Compiles in this process: the grammars are our own."""

    async def error(self, grammar: str, *, tenant: str) -> str | None:
        self._make_grammars().matcher(grammar)  # raises GrammarError
        return None


@pytest.fixture(scope="module")
def grammar_validator(tokenizer: Tokenizer) -> GrammarValidator:
    def grammars() -> Grammars:
        table, eos_ids = tokenizer.token_bytes, tokenizer.eos_ids
        return Grammars(table, eos_ids=eos_ids, vocab_size=tokenizer.vocab_size)

    return TrialsHere(grammars)


@pytest.fixture
async def service(start_service: Any) -> AsyncIterator[Any]:
    async with start_service(max_model_len=8192) as started:
        started.engine.end = FinishReason.STOP
        yield started


def ids_of(tokenizer: Tokenizer, text: str, markers: dict[str, int]) -> list[int]:
    """As a model writes it: markers by their ids."""
    for marker, id_ in markers.items():
        if marker in text:
            before, _, after = text.partition(marker)
            return [
                *ids_of(tokenizer, before, markers), id_, *ids_of(tokenizer, after, markers)
            ]  # fmt: skip
    return tokenizer.encode(text, add_bos=False)


def prompt_of(service: Any) -> str:
    """The text of the last prompt, with the names of special tokens."""
    table, show = service.tokenizer.token_bytes, service.tokenizer.token_text
    ids = service.engine.seen[-1].prompt_ids
    return b"".join(table[id_] or show(id_).encode() for id_ in ids).decode()


async def test_a_conversation_with_calls(service: Any, name: str, read_events: Any) -> None:
    tool_format = TOOL_FORMATS[name]
    tokenizer = service.tokenizer
    assert tool_format_name(tokenizer.call_rendering) == name
    markers = tool_format.marker_ids(tokenizer)
    assert set(markers) == (set(tool_format.markers) if tool_format.native else set())
    calls = [("get_weather", '{"city": "Zürich 😀"}'), ("now", "{}")]
    calls = calls if tool_format.joint is not None else calls[:1]
    said = "" if tool_format.only_first else "Let me see. "
    answer = said + tool_format.render(calls)
    service.engine.script = lambda _: ids_of(tokenizer, answer, markers)

    body = {"model": "tiny-model", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
    whole = (await service.post(CHAT, body)).json()
    prompt = prompt_of(service)
    assert "get_weather" in prompt
    assert "Tells the weather." in prompt
    assert "strict" not in prompt
    message = whole["choices"][0]["message"]
    assert message["content"] == (said.rstrip() or None)
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]] == (
        calls
    )
    assert whole["choices"][0]["finish_reason"] == "tool_calls"

    streamed = await service.client.get(f"/v1/streams/{whole['id'].removeprefix('chatcmpl-')}")
    deltas = [c["delta"] for e in read_events(streamed.content) for c in e["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == said.rstrip()
    news = [call for delta in deltas for call in delta.get("tool_calls", ())]
    for index, call in enumerate(message["tool_calls"]):
        own = [item for item in news if item["index"] == index]
        assert own[0]["id"] == call["id"]
        assert own[0]["function"]["name"] == call["function"]["name"]
        written = "".join(item["function"]["arguments"] for item in own)
        assert written == call["function"]["arguments"]

    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": f"it is {index} o'clock"}
        for index, call in enumerate(message["tool_calls"])
    ]
    body["messages"] = [*body["messages"], message, *results]
    reply = await service.post(CHAT, body)
    assert reply.status_code == 200, reply.text
    prompt = prompt_of(service)
    assert WRITTEN.get(name, tool_format.render)(calls) in prompt
    for result in results:
        assert result["content"] in prompt


@pytest.mark.parametrize("name", ["mistral-v11"], indirect=True)
async def test_ids_of_the_model_are_returned_and_rendered(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model wrote, and the prompt of the next turn, are the same text."""
    tokenizer = service.tokenizer
    template = ChatTemplate(V11.replace("CALL_ID", CALL_ID))
    monkeypatch.setitem(vars(tokenizer), "_template", template)
    monkeypatch.delitem(vars(tokenizer), "call_rendering", raising=False)
    markers = TOOL_FORMATS["mistral-v11"].marker_ids(tokenizer)
    answer = (
        'Let me see.[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Rome"}'
        "[TOOL_CALLS]now[CALL_ID]000000001[ARGS]{}"
    )
    service.engine.script = lambda _: ids_of(tokenizer, answer, markers)
    body = {"model": "tiny-model", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
    message = (await service.post(CHAT, body)).json()["choices"][0]["message"]
    assert message["content"] == "Let me see."
    assert [call["id"] for call in message["tool_calls"]] == ["a1B2c3D4e", "000000001"]
    result = {"role": "tool", "tool_call_id": "a1B2c3D4e", "content": "sunny"}
    reply = await service.post(CHAT, body | {"messages": [*body["messages"], message, result]})
    assert reply.status_code == 200, reply.text
    assert answer in prompt_of(service)


async def test_calls_before_without_tools_now(service: Any, name: str) -> None:
    """Earlier calls are in the prompt, even if the request has no tools."""
    call = {"id": "123456789", "type": "function", "function": {"name": "now", "arguments": ""}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "123456789", "content": [{"type": "text", "text": "9h"}]},
    ]
    reply = await service.post(CHAT, {"model": "tiny-model", "messages": messages, "max_tokens": 4})
    assert reply.status_code == 200, reply.text
    assert "now" in prompt_of(service)
    assert "9h" in prompt_of(service)


@pytest.mark.parametrize("arguments", ['{"city": "Zür', "{", "[]", '{"city": "Zür"}'])
async def test_a_call_that_was_cut_off_is_in_the_prompt(
    service: Any, name: str, arguments: str
) -> None:
    function = {"name": "get_weather", "arguments": arguments}
    call = {"id": "123456789", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "123456789", "content": "cut off"},
    ]
    body = {"model": "tiny-model", "messages": messages, "tools": TOOLS, "max_tokens": 4}
    reply = await service.post(CHAT, body)
    assert reply.status_code == 200, reply.text
    prompt = prompt_of(service)
    assert "get_weather" in prompt
    assert ("Zür" in prompt) == ("Zür" in arguments)
    assert name == "llama" or "Let me see." in prompt  # its template drops the text


async def test_a_custom_tool_is_called(service: Any, name: str) -> None:
    """Its input is text in the answer, and an argument in the prompt of the next turn."""
    tool_format, tokenizer = TOOL_FORMATS[name], service.tokenizer
    text = 'print("Zürich 😀")\n'
    written = tool_format.render([("run", json.dumps({"input": text}, ensure_ascii=False))])
    markers = tool_format.marker_ids(tokenizer)
    service.engine.script = lambda _: ids_of(tokenizer, written, markers)
    lark = {"syntax": "lark", "definition": "start: /[^#]+/"}
    custom = {"name": "run", "format": {"type": "grammar", "grammar": lark}}
    body = {"model": "tiny-model", "messages": [{"role": "user", "content": "hi"}]}
    body |= {"tools": [*TOOLS, {"type": "custom", "custom": custom}]}
    reply = (await service.post(CHAT, body)).json()
    assert "start: /[^#]+/" in prompt_of(service)
    message = reply["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert call["custom"] == {"name": "run", "input": text}
    assert reply["choices"][0]["finish_reason"] == "tool_calls"
    result = {"role": "tool", "tool_call_id": call["id"], "content": "done"}
    again = await service.post(CHAT, body | {"messages": [*body["messages"], message, result]})
    assert again.status_code == 200, again.text
    assert "Zürich 😀" in prompt_of(service)


@pytest.mark.parametrize("name", ["llama"], indirect=True)
async def test_a_prefix_of_a_call_is_no_text(service: Any) -> None:
    tokenizer = service.tokenizer
    written = '<|python_tag|>{"name": "now", "parameters": {}}'
    markers = TOOL_FORMATS["llama"].marker_ids(tokenizer)
    service.engine.script = lambda _: ids_of(tokenizer, written, markers)
    body = {"model": "tiny-model", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
    choice = (await service.post(CHAT, body)).json()["choices"][0]
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}


async def test_text_of_users_is_never_a_special_token(service: Any, name: str) -> None:
    markers = TOOL_FORMATS[name].markers
    tool = {"type": "function", "function": {"name": "f", "description": f"{markers} <|im_end|>"}}
    body = {"model": "tiny-model", "messages": [{"role": "user", "content": "hi"}]}
    await service.post(CHAT, body | {"tools": [TOOLS[1]], "max_tokens": 4})
    counts = [_specials(service)]
    await service.post(CHAT, body | {"tools": [tool], "max_tokens": 4})
    assert _specials(service) == counts[0]
    assert "<|im_end|>" in service.tokenizer.decode(service.engine.seen[-1].prompt_ids)


def _specials(service: Any) -> int:
    return sum(map(service.tokenizer.is_special, service.engine.seen[-1].prompt_ids))


@pytest.mark.parametrize("name", ["plain"], indirect=True)
async def test_tools_go_into_the_system_message(service: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    await service.post(CHAT, {"model": "tiny-model", "messages": messages, "tools": TOOLS})
    prompt = prompt_of(service)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions.")
    assert prompt.count("<|im_start|>system") == 1
