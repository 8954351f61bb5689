"""Tool calls and structured output: shown readably, as text, and answered from the page."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from playwright.async_api import expect

from tests.web.test_export import drawn

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "unit": {"enum": ["celsius"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": PLACE}}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
}
# The page's requests of answers are held; `feed(event)` streams an event to it, `feed()` ends it.
HELD = """() => {
  const real = window.fetch;
  window.bodies = [];
  window.fetch = (url, options) => {
    if (url !== "/v1/chat/completions") return real(url, options);
    bodies.push(JSON.parse(options.body));
    const body = new ReadableStream({ start(stream) {
      window.feed = (delta) => {
        const event = { choices: [{ delta }] };
        const data = delta ? JSON.stringify(event) : "[DONE]";
        stream.enqueue(new TextEncoder().encode(`data: ${data}\\n\\n`));
        if (delta) return;
        stream.close();
        window.feed = null;
      };
    } });
    return Promise.resolve(new Response(body, { headers: { "x-request-id": "held" } }));
  };
}"""


async def feed(tab: Any, **delta: Any) -> None:
    await tab.page.wait_for_function("() => window.feed")  # the request was made
    await tab.page.evaluate("(delta) => feed(delta)", delta or None)


def call(index: int, **function: Any) -> dict[str, Any]:
    named = {"id": f"call_{index}", "type": "function"} if "name" in function else {}
    return {"index": index, **named, "function": function}


async def test_a_call_is_shown_and_its_result_continues_the_chat(visit: Any) -> None:
    tab = await visit()
    await tab.set(seed=3, max_tokens=200, extra=json.dumps(TOOLS))
    await tab.ask("What is the weather in Paris?")
    await tab.ended()
    record = await tab.record()
    (made,) = record["calls"]
    assert record["reason"] == "tool_calls"
    assert made["name"] == "get_weather"
    arguments = json.loads(made["input"])
    assert arguments["unit"] == "celsius"
    calls = tab.page.locator(".calls").last
    await expect(calls.locator(".language")).to_have_text("get_weather")
    shown = calls.locator("code")
    assert await shown.text_content() == json.dumps(arguments, indent=2)
    await tab.page.reload()
    assert await shown.text_content() == json.dumps(arguments, indent=2)
    await tab.set(extra="")
    await calls.get_by_label("Result of get_weather").fill("<i>12</i> degrees")
    await tab.page.keyboard.press("Tab")
    await tab.page.keyboard.press("Enter")
    await expect(tab.page.locator("#messages > li")).to_have_count(4)
    await tab.ended()
    await expect(tab.page.locator("li.tool p")).to_have_text("<i>12</i> degrees")
    assert (await tab.record())["state"] == "done"
    await expect(tab.page.locator(".results")).to_have_count(0)


async def test_calls_grow_while_they_stream_and_are_text(visit: Any) -> None:
    tab = await visit()
    await tab.page.evaluate(HELD)
    await tab.ask("Call it.")
    await feed(tab, tool_calls=[call(0, name="<b>x</b>", arguments='{"a": "<img src=x')])
    codes = tab.page.locator(".calls code")
    await expect(codes).to_have_text(['{\n  "a": "<img src=x'])
    await feed(tab, tool_calls=[call(0, arguments=' onerror=1>", "b": [1]}')])
    await expect(codes).to_have_text(
        ['{\n  "a": "<img src=x onerror=1>",\n  "b": [\n    1\n  ]\n}']
    )
    await feed(tab, tool_calls=[call(1, name="broken", arguments="{")])
    await expect(codes).to_have_count(2)
    await expect(tab.page.locator(".results")).to_have_count(0)
    await feed(tab)
    await tab.ended()
    await expect(tab.page.locator(".calls .language").first).to_have_text("<b>x</b>")
    assert await tab.page.locator(".calls").locator("b, img, i").count() == 0
    await tab.ask("Go on.")
    await feed(tab)
    sent = (await tab.page.evaluate("bodies"))[-1]["messages"]
    called = [each["function"]["name"] for each in sent[1]["tool_calls"]]
    assert called == ["<b>x</b>"], "a call that was cut off cannot be sent back"
    await tab.ended()


async def test_json_is_indented_if_it_was_requested(visit: Any) -> None:
    tab = await visit()
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
    await tab.set(seed=5, max_tokens=200, extra=json.dumps({"response_format": schema}))
    await tab.ask("Where?")
    await tab.ended()
    text = (await tab.record())["text"]
    code = tab.page.locator(".answer code")
    assert await code.text_content() == json.dumps(json.loads(text), indent=2)
    await tab.page.get_by_role("button", name="Tokens", exact=True).click()
    assert (await tab.page.locator(".answer").text_content()).replace("⏎", "") == text
    await tab.page.evaluate(HELD)
    await tab.ask("Again")
    await feed(tab, content='{"n": 12345678901234567890, ')
    await expect(code).to_have_text('{"n": 12345678901234567890, ')
    await feed(tab, content='"n": 1.0}')
    await expect(code).to_have_text('{\n  "n": 12345678901234567890,\n  "n": 1.0\n}')
    await feed(tab)
    await tab.ended()


async def test_indenting_changes_only_space(visit: Any) -> None:
    """As JSON.stringify indents; and of each beginning, so that streamed arguments only grow."""
    tab = await visit()
    rng = random.Random("indent")
    faults = await tab.page.evaluate(
        """async (values) => {
          const { indented } = await import('/web/json.js');
          return values.flatMap((value) => {
            const whole = indented(JSON.stringify(value));
            const found = whole === JSON.stringify(value, null, 2) ? [] : [whole];
            const text = JSON.stringify(value);
            for (let end = 0; end < text.length; end += 1) {
              if (!whole.startsWith(indented(text.slice(0, end)))) found.push(text.slice(0, end));
            }
            return found;
          });
        }""",
        [drawn(rng) for _ in range(200)],
    )
    assert faults == []
    deep = await tab.page.evaluate(
        "import('/web/json.js').then(({ indented }) => indented('['.repeat(20000)).length)"
    )
    assert deep < 20_000 * 50


async def test_thinking_is_open_while_it_streams(visit: Any) -> None:
    tab = await visit()
    await tab.page.evaluate(HELD)
    await tab.ask("Think.")
    await feed(tab, reasoning_content="<b>Let</b> me")
    thought = tab.page.locator(".thinking div")
    await expect(thought).to_be_visible()
    await expect(thought).to_have_text("<b>Let</b> me")
    await feed(tab, content="Done.")
    await expect(thought).to_be_hidden()
    await tab.page.locator(".thinking summary").focus()
    await tab.page.keyboard.press("Enter")
    await expect(thought).to_be_visible()
    await feed(tab, content=" Really.")
    await expect(tab.page.locator(".answer")).to_have_text("Done. Really.")
    await expect(thought).to_be_visible()
    await feed(tab)
    await tab.ended()
    await expect(thought).to_be_visible()


@pytest.mark.parametrize("extra", ["[]", "{", "1", '"x"'])
async def test_further_fields_must_be_an_object(visit: Any, extra: str) -> None:
    tab = await visit(viewport={"width": 360, "height": 740})
    await tab.page.click("#panel-switch")
    await tab.set(extra=extra)
    await tab.page.click("#panel-switch")
    await tab.ask("Hi")
    await expect(tab.page.locator("#extra")).to_be_focused()
    await expect(tab.page.locator("#extra-error")).to_have_text("This must be one JSON object.")
    await tab.set(extra="{}")
    await expect(tab.page.locator("#extra-error")).to_have_text("")
    assert await tab.page.input_value("#question") == "Hi"
    await expect(tab.page.locator("#messages > li")).to_have_count(0)
