"""How text becomes elements: never markup, and independent of the chunks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.async_api import Route, expect

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"> **<b>bold</b>** "
    "[link](javascript:alert(1)) `<script>document.title='owned'</script>`\n\n"
    "```html\n<iframe srcdoc='<script>top.document.title=1</script>'></iframe>\n```\n"
)
MARKDOWN = """# Title

One *light* and **strong** and `code` line,
with a break.

- first
- second
  1. nested
  2. again

> quoted

---
```python
x = "**not bold**"
```
snake_case_name and 2 * 3 * 4 stay as they are."""

LAWS = """async () => {
  const { Prose, TokenStrip } = await import('/web/view.js');
  const { place } = await import('/web/tokens.js');
  let state = 1;
  const draw = (n) => (state = (state * 48271) % 2147483647) % n;
  const words = ['a', 'word ', '\\n', '\\n\\n', '# ', '- ', '  - ', '1. ', '> ', '```', '``', '`',
    '**', '*', '_', '~~', '---', '\\n```py\\n', '\\n```\\n', ' ', '<b>', '😀', 'é', '&amp;', '|'];
  const faults = [];
  for (let round = 0; round < 300; round++) {
    const grown = document.createElement('div');
    const prose = new Prose(grown);
    const strip = new TokenStrip(document.createElement('div'));
    const tokens = [];
    let text = '';
    for (let step = 0; step < 25; step++) {
      const scored = Array.from({ length: 1 + draw(2) }, () =>
        ({ token: words[draw(words.length)], logprob: -draw(5), top_logprobs: [] }));
      const added = scored.map((entry) => entry.token).join('');
      tokens.push(...place(text.length, added, scored));
      text += added;
      prose.draw(text, tokens);
      strip.draw(text, tokens);
    }
    const whole = document.createElement('div');
    new Prose(whole).draw(text, tokens);
    const bare = document.createElement('div');
    new Prose(bare).draw(text, []);
    if (grown.innerHTML !== whole.innerHTML) faults.push(['grown', text]);
    if (bare.textContent !== whole.textContent) faults.push(['tokens', text]);
    if (strip.container.textContent.replaceAll('⏎', '') !== text) faults.push(['strip', text]);
    for (const part of whole.querySelectorAll('[data-token]')) {
      const { start, end } = tokens[part.dataset.token];
      if (!text.slice(start, end).includes(part.textContent)) faults.push(['place', text]);
    }
  }
  return faults;
}"""


async def answer_with(tab: Any, text: str, *, thinking: str = "") -> None:
    """Makes the page show a fixed answer, in three chunks."""
    third = len(text) // 3
    pieces = [text[:third], text[third : 2 * third], text[2 * third :]]
    deltas = [{"content": None, "reasoning_content": word} for word in thinking.split(" ") if word]
    deltas += [{"content": piece} for piece in pieces]
    events: list[dict[str, Any]] = [
        {"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"

    async def reply(route: Route) -> None:
        await route.fulfill(
            status=200, body=body, headers={"x-request-id": "made-up"},
            content_type="text/event-stream",
        )  # fmt: skip

    await tab.page.route("**/v1/chat/completions", reply)
    await tab.ask("Show it.")
    await tab.ended()


async def test_text_of_a_model_never_becomes_markup(visit: Any) -> None:
    tab = await visit()
    await answer_with(tab, HOSTILE)
    answer = tab.page.locator(".answer")
    await expect(answer).to_contain_text("<img src=x onerror=")
    await expect(answer).to_contain_text("<script>document.title='owned'</script>")
    assert await answer.locator("img, script, iframe, a, b").count() == 0
    assert await tab.page.title() == "Quire"


async def test_thinking_is_folded(visit: Any) -> None:
    """It is text, apart from the answer, and still there after a reload."""
    tab = await visit()
    await answer_with(tab, "Hello.", thinking="<b>Let me</b>")
    for _ in range(2):
        await expect(tab.page.locator(".answer")).to_have_text("Hello.")
        thought = tab.page.locator(".thinking div")
        await expect(thought).to_be_hidden()
        await tab.page.click(".thinking summary")
        await expect(thought).to_be_visible()
        await expect(thought).to_have_text("<b>Letme</b>")
        await tab.page.reload()
    await answer_with(tab, "Hi.")
    await expect(tab.page.locator(".thinking").last).to_be_hidden()


async def test_markdown_is_drawn(visit: Any) -> None:
    tab = await visit()
    await answer_with(tab, MARKDOWN)
    answer = tab.page.locator(".answer")
    for selector, text in {
        "h3": "Title",
        "em": "light",
        "strong": "strong",
        "p > code": "code",
        "ul > li > ol > li:first-child": "nested",
        "blockquote": "quoted",
        "pre code": 'x = "**not bold**"',
    }.items():
        await expect(answer.locator(selector)).to_have_text(text)
    await expect(answer.locator("hr")).to_have_count(1)
    await expect(answer.locator("p").last).to_have_text(
        "snake_case_name and 2 * 3 * 4 stay as they are."
    )


async def test_streamed_text_is_drawn_like_whole_text(visit: Any) -> None:
    tab = await visit()
    assert await tab.page.evaluate(LAWS) == []
