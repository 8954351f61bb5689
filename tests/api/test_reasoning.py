"""Reasoning in chat completions: found by the chat template, apart from the content."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from model.text.tokenizer import Tokenizer
from service.api.generation.parts import thinking_format_name, thinking_options
from service.api.generation.request import Chat
from service.messages import FinishReason
from tests.api.conftest import validator_of

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "now"}}]
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}OPEN{{ m.reasoning_content }}CLOSE{% endif %}"
    '{{ m.content }}<|im_end|>\n{% endfor %}{% if tools %}<tool_call> "arguments"{% endif %}'
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
# As Qwen 3: the model opens its thinking itself, unless it is switched off.
HYBRID = TURNS + (
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "OPEN\n\nCLOSE\n\n{% endif %}{% endif %}"
)
# As DeepSeek R1: the template opens it.
OPENING = TURNS + "OPEN\n{% endif %}"
TEMPLATES = {"hybrid": HYBRID, "opening": OPENING}
TAGS = {"think": ("<think>", "</think>"), "mistral": ("[THINK]", "[/THINK]")}


def make_tokenizer(folder: Path, template: str, tags: tuple[str, str], kind: str) -> Tokenizer:
    """A token per byte. The tags are special tokens, added tokens with a text, or no tokens."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_tokens(sorted(pre_tokenizers.ByteLevel.alphabet()))
    body = json.loads(raw.to_str())
    body["model"]["vocab"] = {t["content"]: t["id"] for t in body.pop("added_tokens")}
    raw = RawTokenizer.from_str(json.dumps(body | {"added_tokens": []}))
    raw.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    if kind == "special":
        raw.add_special_tokens([AddedToken(tag, special=True) for tag in tags])
    elif kind == "added":
        raw.add_tokens([AddedToken(tag, special=False) for tag in tags])
    raw.save(str(folder / "tokenizer.json"))
    template = template.replace("OPEN", tags[0]).replace("CLOSE", tags[1])
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"vocab_size": raw.get_vocab_size()}))
    return Tokenizer.from_checkpoint(folder)


KINDS = [
    ("hybrid", "think", "added"),
    ("hybrid", "think", "none"),
    ("hybrid", "mistral", "special"),
    ("opening", "think", "special"),
    ("opening", "think", "none"),
]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def kind(request: pytest.FixtureRequest) -> Any:
    """(template, format, kind of the tags)."""
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    template, name, tags = kind
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return make_tokenizer(folder, TEMPLATES[template], TAGS[name], tags)


@pytest.fixture(scope="module")
def grammar_validator(tokenizer: Tokenizer) -> Any:
    with validator_of(tokenizer) as validator:
        yield validator


class Model:
    """What a model of one kind writes."""

    def __init__(self, tokenizer: Tokenizer, kind: Any) -> None:
        self._tokenizer = tokenizer
        self.template, name, _ = kind
        self.tags = TAGS[name]
        self.writes = self.opens = self.template == "hybrid"

    def ids(self, text: str) -> list[int]:
        """Tags and special tokens as such, if they are tokens."""
        opening, closing = self.tags
        found: list[int] = []
        for tag, place in ((opening, "OPEN"), (closing, "CLOSE")):
            text = text.replace(place, f"\0{tag}\0")
        for part in text.split("\0"):
            special = self._tokenizer.special_id(part)
            found += self._tokenizer.encode(part) if special is None else [special]
        return found

    def answer(self, thinking: str, content: str) -> list[int]:
        opening = "OPEN\n" if self.opens else ""
        return self.ids(f"{opening}{thinking}CLOSE\n\n{content}")


@pytest.fixture
def llm(tokenizer: Tokenizer, kind: Any) -> Model:
    return Model(tokenizer, kind)


@pytest.fixture
async def served(start_service: Any) -> AsyncIterator[Any]:
    async with start_service(max_model_len=4096) as service:
        service.engine.end = FinishReason.STOP
        yield service


def sums(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream adds up to."""
    message: dict[str, Any] = {"role": None, "content": None}
    for event in events:
        for choice in event["choices"]:
            delta = choice["delta"]
            message["role"] = delta.get("role", message["role"])
            for name in ("content", "reasoning_content", "reasoning"):
                if delta.get(name) is not None:
                    message[name] = (message.get(name) or "") + delta[name]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if "id" in call:
                    calls.append({**call, "function": dict(call["function"])})
                    del calls[-1]["index"]
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            message["finish_reason"] = choice["finish_reason"]
    return message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    for call in message.get("tool_calls", ()):
        del call["id"]  # another one in each answer
    return message


async def both(served: Any, read_events: Any, **body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The message, which the stream must add up to, and the token counts."""
    body = {"model": "tiny-model", "messages": ASK, "seed": 1, **body}
    whole = (await served.post(CHAT, body)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = read_events((await served.post(CHAT, body | options)).content)
    assert "choices" in whole, whole
    (choice,) = whole["choices"]
    message = choice["message"] | {"finish_reason": choice["finish_reason"]}
    assert (message.pop("refusal"), message.pop("annotations")) == (None, [])
    assert (message["content"] or "") == (sums(events)["content"] or "")
    added, message = without_ids(sums(events)), without_ids(message)
    assert added | {"content": None} == message | {"content": None}
    assert events[-1]["usage"] == whole["usage"]
    assert message.get("reasoning") == message.get("reasoning_content")
    return message, whole["usage"]


async def test_reasoning_is_apart_from_the_content(
    served: Any, llm: Model, read_events: Any
) -> None:
    ids = llm.answer("Let me\nthink é.\n", "Hello.")
    served.engine.script = lambda _: ids
    message, usage = await both(served, read_events)
    assert message["reasoning_content"] == "Let me\nthink é."
    assert message["content"] == "Hello."
    assert message["finish_reason"] == "stop"
    assert usage["completion_tokens"] == len(ids)
    assert 10 < usage["completion_tokens_details"]["reasoning_tokens"] < len(ids) - 6


async def test_it_may_be_left_out_and_still_counts(
    served: Any, llm: Model, read_events: Any
) -> None:
    served.engine.script = lambda _: llm.answer("Let me think.\n", "Hello.")
    kept, counted = await both(served, read_events)
    message, usage = await both(served, read_events, include_reasoning=False)
    assert "reasoning_content" in kept
    assert "reasoning_content" not in message
    assert (message["content"], usage) == ("Hello.", counted)


async def test_an_answer_may_end_within_it(served: Any, llm: Model, read_events: Any) -> None:
    ids = llm.ids("OPEN\nLet me think." if llm.opens else "Let me think.")
    served.engine.script = lambda _: ids
    served.engine.end = FinishReason.LENGTH
    message, usage = await both(served, read_events)
    assert message["reasoning_content"] == "Let me think."
    assert (message["content"], message["finish_reason"]) == (None, "length")
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 13 + llm.opens


async def test_calls_come_after_it(served: Any, llm: Model, read_events: Any) -> None:
    """A call within the reasoning is none."""
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    served.engine.script = lambda _: llm.answer(f"I could {call} so.", call)
    message, _ = await both(served, read_events, tools=TOOLS)
    assert message["reasoning_content"] == f"I could {call} so."
    assert [c["function"] for c in message["tool_calls"]] == [{"name": "now", "arguments": "{}"}]
    assert (message["content"], message["finish_reason"]) == (None, "tool_calls")


async def test_an_answer_need_not_have_any(served: Any, llm: Model, read_events: Any) -> None:
    text = "Hello <think> you</think>."
    served.engine.script = lambda _: llm.ids(text if llm.opens else f"\nCLOSE{text}")
    message, usage = await both(served, read_events)
    assert message == {"role": "assistant", "content": text, "finish_reason": "stop"}
    before = 0 if llm.opens else len(llm.ids("\nCLOSE")) - 1
    assert usage["completion_tokens_details"]["reasoning_tokens"] == before


@pytest.mark.parametrize(
    "options",
    [
        {"reasoning_effort": "none"},
        {"reasoning_effort": "minimal"},
        {"reasoning": {"effort": "none", "summary": "auto"}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
async def test_the_template_may_switch_it_off(
    served: Any, llm: Model, tokenizer: Tokenizer, read_events: Any, options: dict[str, Any]
) -> None:
    served.engine.script = lambda _: llm.ids("Hello.")
    message, _ = await both(served, read_events, **options)
    prompt = served.engine.seen[0].prompt_ids
    if llm.template == "hybrid":
        assert tokenizer.decode(prompt).endswith("\n\n")
        assert message["content"] == "Hello."
    else:  # its template always opens it
        assert message["reasoning_content"] == "Hello."


async def test_two_efforts_must_agree(served: Any) -> None:
    body = {"model": "tiny-model", "messages": ASK, "reasoning": {"effort": "low"}}
    assert (await served.post(CHAT, body | {"reasoning_effort": "low"})).status_code == 200
    reply = await served.post(CHAT, body | {"reasoning_effort": "high"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "reasoning"


@pytest.mark.slow
async def test_reasoning_of_earlier_turns_is_given_to_the_template(served: Any, llm: Model) -> None:
    prompts = []
    for name in ("reasoning_content", "reasoning"):
        turn = {"role": "assistant", "content": "Yes.", name: "Hm."}
        body = {"model": "tiny-model", "messages": [*ASK, turn, *ASK]}
        assert (await served.post(CHAT, body)).status_code == 200
        prompts.append(served.engine.seen[-1].prompt_ids)
    assert prompts[0] == prompts[1]
    expected = llm.ids("OPENHm.CLOSEYes.")
    assert any(
        list(prompts[0][at : at + len(expected)]) == expected for at in range(len(prompts[0]))
    )


async def test_a_user_cannot_open_it(served: Any, llm: Model, read_events: Any) -> None:
    served.engine.script = lambda _: llm.ids("Hello.")
    messages = [{"role": "user", "content": f"write {llm.tags[0]}"}]
    message, _ = await both(served, read_events, messages=messages, add_generation_prompt=False)
    assert message["content"] == "Hello."


async def test_a_continued_message_may_be_within_it(
    served: Any, llm: Model, read_events: Any
) -> None:
    """Only if the tag is text: a client cannot write special tokens."""
    served.engine.script = lambda _: llm.ids("so.CLOSE Hello.")
    turn = {"role": "assistant", "content": f"{llm.tags[0]}I think"}
    message, _ = await both(served, read_events, messages=[*ASK, turn], continue_final_message=True)
    if llm._tokenizer.special_id(llm.tags[0]) is None:
        assert (message["reasoning_content"], message["content"]) == ("so.", "Hello.")
    else:
        assert message["content"] == "so. Hello."


@pytest.mark.slow
async def test_the_engine_learns_of_a_budget(served: Any, llm: Model) -> None:
    body = {"model": "tiny-model", "messages": ASK, "thinking_token_budget": 5}
    await served.post(CHAT, body)
    await served.post(CHAT, body | {"thinking_token_budget": None})
    limited, free = served.engine.seen
    assert limited.thinking.budget == 5
    assert limited.thinking.opened is not llm.opens
    assert list(limited.thinking.closing) == llm.ids("CLOSE")
    assert free.thinking is None


@pytest.mark.parametrize("budget", [-1, 2**31, "5", 1.5, True])
async def test_invalid_budgets(served: Any, budget: Any) -> None:
    body = {"model": "tiny-model", "messages": ASK, "thinking_token_budget": budget}
    reply = await served.post(CHAT, body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "thinking_token_budget"


async def test_content_with_a_grammar_keeps_its_blanks(
    served: Any, llm: Model, read_events: Any
) -> None:
    """If the content must match a grammar, it begins right after the tag."""
    served.engine.script = lambda _: llm.answer("Hm.", "ok")
    regex = {"structured_outputs": {"regex": r"\s*ok"}}
    message, _ = await both(served, read_events, **regex)
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "\n\nok")
    thinking = served.engine.seen[0].thinking
    assert thinking.verbatim
    assert thinking.opened is not llm.opens
    assert thinking.openings == (tuple(llm.ids("OPEN")),)


@pytest.mark.parametrize("name", ["gpt-oss", "mistral", "think"])
def test_formats_by_template(name: str) -> None:
    sources = {
        "gpt-oss": "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>",
        "mistral": "{{ '[THINK]' + t + '[/THINK]' }}",
        "think": "{% if '</think>' in content %}{{ content.split('</think>')[-1] }}{% endif %}",
    }

    class Source:
        chat_template = sources[name]

    assert thinking_format_name(Source()) == name  # type: ignore[arg-type]  # all it reads


@pytest.mark.parametrize(
    ("template", "effort", "given"),
    [
        ("", None, {}),
        ("", "none", {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"}),
        ("", "minimal", {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"}),
        ("", "max", {"reasoning_effort": "high"}),
        ("", "medium", {"reasoning_effort": "medium"}),
        ("{% if reasoning_effort == 'none' %}", "low", {"reasoning_effort": "high"}),
        (
            "{% if reasoning_effort not in ['none', 'high'] %}",
            "none",
            {"enable_thinking": False, "thinking": False, "reasoning_effort": "none"},
        ),
    ],
)
def test_options_by_template(template: str, effort: Any, given: dict[str, Any]) -> None:
    assert thinking_options(template, Chat(messages=(), effort=effort)) == given


async def test_a_text_with_special_tokens_is_returned_as_it_is(
    served: Any, read_events: Any, llm: Model
) -> None:
    ids = llm.answer("Hm.", "Yes.")
    served.engine.script = lambda _: ids
    message, _ = await both(served, read_events, skip_special_tokens=False)
    assert "reasoning_content" not in message
    opening = f"{llm.tags[0]}\n" if llm.opens else ""
    assert message["content"] == f"{opening}Hm.{llm.tags[1]}\n\nYes."


async def test_a_budget_is_not_combined_with_a_choice_of_tokens(served: Any) -> None:
    """The tokens that end the reasoning are forced, so that they must not be excluded."""
    body = {"model": "tiny-model", "messages": ASK, "thinking_token_budget": 4}
    for name, value in (("bad_words", ["x"]), ("allowed_token_ids", [5])):
        reply = await served.post(CHAT, body | {name: value})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)
