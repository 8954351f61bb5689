"""Request bodies as current clients and agents build them, written after their public sources.

Each is the second or a later request of a session where that differs from the first: earlier
answers and tool results go back as the client got them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"

Json = dict[str, Any]

SCHEMA: Json = {
    "type": "object",
    "properties": {"path": {"type": "string", "description": "A file."}},
    "required": ["path"],
    "additionalProperties": False,
}
FUNCTION: Json = {"name": "read_file", "description": "Reads a file.", "parameters": SCHEMA}
TOOL: Json = {"type": "function", "function": FUNCTION}
STRICT_TOOL: Json = {"type": "function", "function": FUNCTION | {"strict": True}}
CALL: Json = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "read_file", "arguments": '{"path": "a.py"}'},
}
ANSWER_SCHEMA: Json = {
    "type": "object",
    "properties": {"answer": {"type": "string"}, "score": {"type": "integer"}},
    "required": ["answer", "score"],
    "additionalProperties": False,
}
EPHEMERAL: Json = {"cache_control": {"type": "ephemeral"}}
USAGE: Json = {"stream": True, "stream_options": {"include_usage": True}}


def system(content: str = "You are a helpful assistant.") -> Json:
    return {"role": "system", "content": content}


def user(content: Any = "What does a.py do?") -> Json:
    return {"role": "user", "content": content}


def text(content: str, **more: Any) -> Json:
    return {"type": "text", "text": content, **more}


def result(content: Any = "print(1)", **more: Any) -> Json:
    return {"role": "tool", "tool_call_id": "call_1", "content": content, **more}


def called(content: Any = None, **more: Any) -> Json:
    return {"role": "assistant", "content": content, "tool_calls": [CALL], **more}


@dataclass(frozen=True)
class Body:
    """`refused`: the parameter that an error names; None if the body is answered."""

    client: str
    path: str
    fields: Json
    refused: str | None = None


def chat(client: str, *messages: Json, refused: str | None = None, **fields: Any) -> Body:
    return Body(client, CHAT, {"messages": list(messages), **fields}, refused)


BODIES: tuple[Body, ...] = (
    # --- libraries over chat completions ---------------------------------------------------
    chat(
        "openai-python, parsed output", system(), user(), max_completion_tokens=64,
        store=True, metadata={"run": "7"}, service_tier="auto", safety_identifier="user-7",
        prompt_cache_key="app", prompt_cache_retention="24h", verbosity="low", n=1,
        modalities=["text"], parallel_tool_calls=False, tools=[STRICT_TOOL], tool_choice="auto",
        response_format={"type": "json_schema", "json_schema": {
            "name": "Answer", "schema": ANSWER_SCHEMA, "strict": True}},
    ),
    chat(
        "openai-python, its own message sent back", {"role": "developer", "content": "Be short."},
        user(), {"role": "assistant", "content": "It prints.", "refusal": None, "annotations": [],
                 "audio": None, "function_call": None, "tool_calls": None}, user("Sure?"),
        reasoning_effort="low", max_completion_tokens=64,
    ),
    chat(
        "openai-node, predicted output", user("Rename x to y: x = 1"), max_completion_tokens=64,
        prediction={"type": "content", "content": [text("y = 1")]},
        stream=True, stream_options={"include_usage": True, "include_obfuscation": False},
    ),
    chat(
        "openai-agents, chat model", system(), user(), called(refusal=None, annotations=[]),
        result(), tools=[STRICT_TOOL], tool_choice="auto", parallel_tool_calls=True, store=False,
        reasoning_effort="medium", verbosity="medium", metadata={"trace_id": "t"}, **USAGE,
    ),
    chat(
        "LangChain ChatOpenAI", system(), user(), called(""), result(), n=1, temperature=0.7,
        tools=[STRICT_TOOL], tool_choice={"type": "function", "function": {"name": "read_file"}},
        parallel_tool_calls=False, max_completion_tokens=64, seed=1, **USAGE,
    ),
    chat(
        "LangChain, structured output", user(), temperature=0.0, top_p=1.0,
        frequency_penalty=0.0, presence_penalty=0.0, logprobs=None, max_completion_tokens=64,
        response_format={"type": "json_schema", "json_schema": {
            "name": "Answer", "description": "An answer.", "schema": ANSWER_SCHEMA}},
    ),
    chat(
        "LlamaIndex OpenAILike", system(), user(), called(""), result(name="read_file"),
        temperature=0.1, max_tokens=64, tools=[TOOL], tool_choice="auto",
        parallel_tool_calls=False, stream=True,
    ),
    chat(
        "LiteLLM", system(), user(),
        called(None, provider_specific_fields={"refusal": None}, reasoning_content=None),
        result(name="read_file"), temperature=0.2, max_tokens=64, tools=[TOOL],
        user="u", seed=3, top_p=0.9, **USAGE,
    ),
    chat(
        "LiteLLM to vLLM", user(), max_tokens=32, top_k=20, min_p=0.05, repetition_penalty=1.05,
        stop_token_ids=[7], skip_special_tokens=False, include_stop_str_in_output=True,
        spaces_between_special_tokens=True, bad_words=["foo"], truncate_prompt_tokens=-1,
        chat_template_kwargs={"enable_thinking": False}, add_generation_prompt=True,
    ),
    chat(
        "instructor, tools", system(), user(), called(""), result("Recall: 1 validation error"),
        max_tokens=64, tools=[STRICT_TOOL],
        tool_choice={"type": "function", "function": {"name": "read_file"}},
    ),
    chat(
        "instructor, JSON mode", system("Answer with JSON."), user([text("Go.")]),
        max_tokens=64, response_format={"type": "json_object"},
    ),
    chat(
        "DSPy", system("Your input fields are: question"), user("[[ ## question ## ]]"),
        temperature=0.0, max_tokens=64, stop=None, n=1, logprobs=True, top_logprobs=2,
    ),
    chat(
        "pydantic-ai", system(), user(), called(), result(), stream=False, tool_choice="required",
        tools=[TOOL], parallel_tool_calls=True, max_completion_tokens=64, temperature=0.0,
        logit_bias={"5": -10}, service_tier="flex",
    ),
    chat(
        "haystack", system(), user(), {"role": "assistant", "tool_calls": [CALL]}, result(),
        stream=False, tools=[TOOL | {"function": FUNCTION | {"strict": False}}], n=1,
        temperature=0.3,
    ),
    chat(
        "semantic-kernel", system(), user(), called([text("Reading.")]), result(name="read_file"),
        stream=False, temperature=1.0, top_p=1.0, presence_penalty=0, frequency_penalty=0, n=1,
        tools=[TOOL], tool_choice="auto", parallel_tool_calls=True, logit_bias={},
    ),
    chat(
        "CrewAI", system("You are a researcher."), user(), stop=["\nObservation:"],
        temperature=0.7, max_tokens=64, stream=False,
    ),
    chat(
        "AutoGen 0.4", system(), {"role": "user", "name": "planner", "content": "Go."},
        called(name="coder"), result(), tools=[TOOL], stream=False,
        response_format={"type": "text"},
    ),
    chat("AutoGen 0.2, functions", user(), functions=[FUNCTION], refused="functions"),
    chat(
        "smolagents", {"role": "system", "content": [text("You solve tasks with tools.")]},
        {"role": "user", "content": [text("New task: go.")]}, stop=["Observation:", "Calling"],
        max_tokens=64, tools=[TOOL], tool_choice="required",
    ),
    # --- coding agents and editors over chat completions --------------------------------------
    chat(
        "Cline", system(), {"role": "user", "content": [text("<task>go</task>"), text("env")]},
        {"role": "assistant", "content": "Reading.", "tool_calls": [CALL]}, result(),
        temperature=0, tools=[TOOL], **USAGE,
    ),
    chat(
        "Roo Code with prompt cache",
        {"role": "system", "content": [text("You are Roo.", **EPHEMERAL)]},
        {"role": "user", "content": [text("go", **EPHEMERAL)]}, called(""), result(),
        {"role": "user", "content": [text("more", **EPHEMERAL)]}, temperature=0,
        max_completion_tokens=64, tools=[STRICT_TOOL], tool_choice="auto",
        parallel_tool_calls=False, **USAGE,
    ),
    chat(
        "Continue, edit", system(), user("Rewrite this."),
        {"role": "assistant", "content": "```python\n"}, max_tokens=64, temperature=0.01,
        top_p=1, frequency_penalty=0, presence_penalty=0, stream=True, stop=["```"],
        prediction={"type": "content", "content": "x = 1"},
    ),
    chat(
        "Cursor", system(), user(), called("Reading."), result([text("print(1)")]), temperature=0,
        user="google-oauth2|1", tools=[TOOL], tool_choice="auto", stream=True, max_tokens=64,
        stream_options={"include_usage": True}, parallel_tool_calls=True,
    ),
    chat(
        "aider", {"role": "system", "content": [text("Act as a developer.", **EPHEMERAL)]},
        user("I want you to edit."), {"role": "assistant", "content": "Ok."}, user("go"),
        temperature=0, stream=True, max_tokens=64,
    ),
    chat(
        "OpenHands", {"role": "system", "content": [text("You are OpenHands.", **EPHEMERAL)]},
        {"role": "user", "content": [text("go")]},
        {"role": "assistant", "content": [text("Reading.")], "tool_calls": [CALL]},
        {"role": "tool", "content": [text("ok", **EPHEMERAL)], "tool_call_id": "call_1",
         "name": "read_file"}, temperature=0.0, top_p=1.0, max_completion_tokens=64,
        tools=[TOOL], seed=None, user=None,
    ),
    chat(
        "Zed", system(), user(), {"role": "assistant", "content": None, "tool_calls": [CALL],
                                  "reasoning_content": "Read it."}, result(),
        max_completion_tokens=64, temperature=1.0, tool_choice="auto", parallel_tool_calls=False,
        tools=[TOOL], prompt_cache_key="thread", reasoning_effort="medium", **USAGE,
    ),
    chat(
        "opencode (Vercel AI SDK)", system(), user(), called(""), result('{"ok":true}'),
        max_tokens=64, temperature=0, tools=[TOOL], tool_choice="auto", **USAGE,
    ),
    chat(
        "Vercel AI SDK, structured", user(), max_tokens=64, stop=["END"], seed=1,
        response_format={"type": "json_schema", "json_schema": {
            "schema": ANSWER_SCHEMA, "name": "response", "strict": True}},
        reasoning_effort="none",
    ),
    # --- applications over chat completions --------------------------------------------------
    chat(
        "n8n", system(), user(), called(""), result(), temperature=0.7, top_p=1,
        frequency_penalty=0, presence_penalty=0, n=1, tools=[TOOL], **USAGE,
    ),
    chat(
        "Dify", system(), user(), temperature=0.7, max_tokens=64, top_p=1, presence_penalty=0,
        frequency_penalty=0, user="abc-123", stop=["\n\n\n"], tools=[TOOL], tool_choice="auto",
        response_format={"type": "text"}, stream=True,
    ),
    chat(
        "Open WebUI", system(), user(), {"role": "assistant", "content": "Hi."}, user("And?"),
        stream=True, stream_options={"include_usage": True}, temperature=0.8, max_tokens=64,
        logit_bias={"5": -1}, seed=1, stop=["x"], top_p=0.9, top_k=40, min_p=0.0,
        frequency_penalty=0.0,
    ),
    chat(
        "Open WebUI, image",
        {"role": "user", "content": [text("What is this?"), {
            "type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
        stream=True, refused="messages[0].content",
    ),
    chat(
        "LobeChat", system(), user(), temperature=1, top_p=1, presence_penalty=0,
        frequency_penalty=0, tools=[TOOL], user="u1", **USAGE,
    ),
    chat("LobeChat, search", user(), stream=True, web_search_options={"user_location": None},
         refused="web_search_options"),
    chat(
        "llama.cpp's page", system(), user(), stream=True, cache_prompt=True, max_tokens=64,
        temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, typical_p=1.0, repeat_penalty=1.0,
        presence_penalty=0, frequency_penalty=0, dry_multiplier=0,
        xtc_probability=0, timings_per_token=False, return_progress=False,
        reasoning_format="auto",
    ),
    # --- completions ------------------------------------------------------------------------
    Body("lm-evaluation-harness", COMPLETIONS, {
        "prompt": [[5, 9, 20], [7, 8]], "max_tokens": 1, "temperature": 0, "logprobs": 1,
        "seed": 1234, "echo": True}),
    Body("lm-evaluation-harness, scores only", COMPLETIONS, {
        "prompt": "<s>hello world", "max_tokens": 0, "logprobs": 1, "echo": True,
        "return_tokens_as_token_ids": True, "add_special_tokens": False}),
    Body("Continue, completion of code", COMPLETIONS, {
        "prompt": "<|fim_prefix|>def f(<|fim_suffix|>)<|fim_middle|>", "max_tokens": 32,
        "temperature": 0.01, "stream": True, "stop": ["<|endoftext|>", "\n\n"],
        "presence_penalty": 0, "frequency_penalty": 0, "top_p": 1}),
    Body("Copilot-like editors, suffix", COMPLETIONS, {
        "prompt": "def f(", "suffix": "):\n", "max_tokens": 32, "n": 1, "stream": True},
        refused="suffix"),
    # --- responses ---------------------------------------------------------------------------
    Body("Codex CLI", RESPONSES, {
        "instructions": "You are Codex.", "stream": True, "store": False, "tool_choice": "auto",
        "parallel_tool_calls": False, "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "medium", "summary": "auto"}, "prompt_cache_key": "session",
        "text": {"verbosity": "medium"},
        "tools": [{"type": "function", "strict": False, **FUNCTION},
                  {"type": "custom", "name": "apply_patch", "description": "Edits files.",
                   "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "ok"'}},
                  {"type": "web_search"}],
        "input": [
            {"type": "message", "role": "developer",
             "content": [{"type": "input_text", "text": "<permissions>"}]},
            {"type": "message", "role": "user",
             "content": [{"type": "input_text", "text": "go"}]},
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "x"},
            {"type": "function_call", "name": "read_file", "arguments": '{"path":"a"}',
             "call_id": "call_1"},
            {"type": "function_call_output", "call_id": "call_1", "output": "print(1)"}]}),
    Body("Codex CLI, output schema", RESPONSES, {
        "instructions": "You are Codex.", "stream": True, "store": False, "tools": [],
        "tool_choice": "auto", "parallel_tool_calls": False, "include": [],
        "client_metadata": {"x-codex-installation-id": "i"}, "service_tier": "priority",
        "text": {"format": {"type": "json_schema", "strict": True, "schema": ANSWER_SCHEMA,
                            "name": "codex_output_schema"}},
        "input": [{"type": "message", "role": "user",
                   "content": [{"type": "input_text", "text": "go"}]}]}),
    Body("openai-agents, responses model", RESPONSES, {
        "input": [{"role": "user", "content": "go"},
                  {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
                   "content": [{"type": "output_text", "text": "Hi.", "annotations": [],
                                "logprobs": []}]},
                  {"role": "user", "content": "more"}],
        "instructions": "Help.", "tools": [{"type": "function", "strict": True, **FUNCTION}],
        "tool_choice": "required", "parallel_tool_calls": True, "temperature": 0.5, "top_p": 1.0,
        "truncation": "auto", "max_output_tokens": 64, "store": True, "include": [],
        "reasoning": {"effort": "low"}, "metadata": {"a": "b"}, "stream": False}),
    Body("openai-python, responses.parse", RESPONSES, {
        "input": "go", "max_output_tokens": 64, "safety_identifier": "u", "user": "u",
        "text": {"format": {"type": "json_schema", "name": "Answer", "strict": True,
                            "schema": ANSWER_SCHEMA}, "verbosity": "low"}}),
    Body("Vercel AI SDK, responses", RESPONSES, {
        "input": [{"role": "system", "content": "Help."},
                  {"role": "user", "content": [{"type": "input_text", "text": "go"}]}],
        "max_output_tokens": 64, "store": False, "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "minimal", "summary": "detailed"}, "stream": True,
        "tools": [{"type": "function", "strict": False, **FUNCTION}], "tool_choice": "auto"}),
    Body("ChatKit, conversation", RESPONSES, {"input": "go", "conversation": "conv_1"},
         refused="conversation"),
    # --- messages ----------------------------------------------------------------------------
    Body("anthropic-sdk-python", MESSAGES, {
        "max_tokens": 64, "temperature": 0.5, "system": "Help.", "stop_sequences": ["END"],
        "messages": [user()], "metadata": {"user_id": "u"}, "service_tier": "auto"}),
    Body("Claude Code", MESSAGES, {
        "max_tokens": 64, "stream": True,
        "system": [text("You are Claude Code.", **EPHEMERAL), text("env", **EPHEMERAL)],
        "messages": [
            {"role": "user", "content": [text("<system-reminder>x</system-reminder>"),
                                         text("go", **EPHEMERAL)]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Read it.", "signature": "s"},
                {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "a"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": False,
                 "content": [text("print(1)")], **EPHEMERAL}]}],
        "tools": [{"name": "Read", "description": "Reads.", "input_schema": SCHEMA, **EPHEMERAL}],
        "metadata": {"user_id": '{"session_id": "s"}'},
        "thinking": {"type": "enabled", "budget_tokens": 32},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"}}),
    Body("Claude Code, title", MESSAGES, {
        "max_tokens": 64, "stream": True, "temperature": 1, "tools": [],
        "system": [text("Summarise.")], "messages": [user()], "thinking": {"type": "disabled"},
        "metadata": {"user_id": "u"},
        "output_config": {"format": {"type": "json_schema", "schema": ANSWER_SCHEMA}}}),
    Body("LangChain ChatAnthropic", MESSAGES, {
        "max_tokens": 64, "messages": [user()], "tool_choice": {"type": "any"},
        "tools": [{"name": "read_file", "description": "Reads.", "input_schema": SCHEMA}]}),
    Body("Cline, messages", MESSAGES, {
        "max_tokens": 64, "temperature": 0, "stream": True, "tool_choice": {"type": "auto"},
        "system": [text("You are Cline.", **EPHEMERAL)],
        "messages": [{"role": "user", "content": [text("go", **EPHEMERAL)]}],
        "tools": [{"name": "read_file", "input_schema": SCHEMA, "strict": False}]}),
    Body("Vercel AI SDK, messages", MESSAGES, {
        "max_tokens": 64, "stream": True, "top_k": 5, "stop_sequences": ["x"],
        "system": [text("Help.")], "messages": [{"role": "user", "content": [text("go")]}],
        "thinking": {"type": "adaptive"},
        "tool_choice": {"type": "tool", "name": "read_file", "disable_parallel_tool_use": True},
        "tools": [{"name": "read_file", "input_schema": SCHEMA}]}),
)  # fmt: skip
