"""The page in a browser with a real model: ask, watch, stop, and answers that survive."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.async_api import Request, expect

from tests.faults.proxy import FaultProxy
from tests.support.waiting import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

STORY = "Write a very long story about a lighthouse, with many chapters."


def posted(tab: Any) -> list[Request]:
    """The questions that a tab sends from now on."""
    posts: list[Request] = []

    def note(request: Request) -> None:
        if request.method == "POST":
            posts.append(request)

    tab.page.on("request", note)
    return posts


async def status(url: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
        answer: dict[str, Any] = (await client.get("/status")).json()
    return answer


async def test_an_answer_streams_and_is_what_the_api_answers(
    visit: Any, server_url: str, undisturbed: Any, slow_steps: Any
) -> None:
    tab = await visit()
    await tab.set(seed=5, max_tokens=120)
    await tab.page.evaluate(
        """() => {
          window.lengths = [];
          new MutationObserver(() => {
            const length = document.querySelector(".answer")?.textContent.length ?? 0;
            if (length && length !== lengths.at(-1)) lengths.push(length);
          }).observe(document.body, { subtree: true, childList: true, characterData: true });
        }"""
    )
    await tab.ask(STORY)
    await tab.page.wait_for_function("() => lengths.length >= 4")  # it comes piece by piece
    slow_steps()
    await tab.ended()
    lengths = await tab.page.evaluate("lengths")
    assert lengths == sorted(set(lengths)), "it grew"
    expected = await undisturbed(server_url, STORY, seed=5, max_tokens=120)
    record = await tab.record()
    assert record["text"] == expected["message"]["content"]
    assert (record["state"], record["reason"]) == ("done", expected["finish_reason"])
    await expect(tab.page.locator(".figures")).to_have_text(
        re.compile(r"^\d+\.\d tokens/s · first after \d+\.\d\d s · 120 tokens · token limit$")
    )
    await tab.page.get_by_role("button", name="Tokens", exact=True).click()
    strip = (await tab.page.locator(".answer").text_content()).replace("⏎", "")
    assert strip == record["text"], "each character belongs to one token"
    said = await tab.page.locator("#said").text_content()
    assert "".join(said.split()) == "".join(record["text"].split()), "all of it was announced"


async def test_the_conversation_continues_and_outlives_the_page(visit: Any) -> None:
    tab = await visit()
    await tab.set(max_tokens=8, system="You are a parrot.")
    await tab.ask("One.")
    await tab.ended()
    posts = posted(tab)
    await tab.ask("Two.")
    await tab.ended()
    (post,) = posts
    assert [m["role"] for m in json.loads(post.post_data or "")["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    before = await tab.page.locator("#messages").inner_text()
    await tab.page.reload()
    await expect(tab.page.locator("#messages > li")).to_have_count(4)
    assert await tab.page.locator("#messages").inner_text() == before
    assert await tab.page.input_value("#system") == "You are a parrot."
    assert len(posts) == 1, "an ended answer is not asked for again"
    await tab.page.get_by_role("button", name="New chat").click()
    await expect(tab.page.locator("#messages > li")).to_have_count(0)
    await expect(tab.page.locator("#welcome")).to_be_visible()


async def test_stop_cancels_on_the_server_too(visit: Any, server_url: str, slow_steps: Any) -> None:
    tab = await visit()
    await tab.set(seed=11, max_tokens=4000)
    await tab.ask(STORY)
    await tab.shown(30)
    await expect(tab.page.locator("#running")).to_have_text("1")
    await tab.page.get_by_role("button", name="Stop").click()
    await tab.ended()
    record = await tab.record()
    assert (record["state"], record["reason"]) == ("done", "cancelled")
    assert len(record["text"]) >= 30
    await expect(tab.page.locator(".figures")).to_contain_text("stopped")
    await expect(tab.page.locator("#running")).to_have_text("0")
    assert (await status(server_url))["queue"]["running_requests"] == 0
    await expect(tab.page.locator("#question")).to_be_focused()


async def test_a_reload_during_an_answer_loses_nothing(
    visit: Any, server_url: str, undisturbed: Any, slow_steps: Any
) -> None:
    """An answer after two reloads has the text of one without."""
    tab = await visit()
    await tab.set(seed=11, max_tokens=800)
    await tab.ask(STORY)
    for characters in (40, 200):
        await tab.shown(characters)
        await tab.page.reload()
    await expect(tab.page.locator("#link")).to_have_text("Resumed. Nothing was lost.")
    slow_steps()
    await tab.ended()
    record = await tab.record()
    assert record["resumed"] == 2
    expected = await undisturbed(server_url, STORY, seed=11, max_tokens=800)
    assert record["text"] == expected["message"]["content"]
    assert len(record["tokens"]) == 800
    await expect(tab.page.locator(".figures")).to_contain_text("resumed")


async def test_resuming_is_shown(visit: Any, slow_steps: Any) -> None:
    tab = await visit()
    await tab.set(seed=11, max_tokens=4000)
    await tab.ask(STORY)
    await tab.shown(30)
    await tab.page.reload()
    link = tab.page.locator("#link")
    await expect(link).to_have_text("Resumed. Nothing was lost.")
    await tab.page.get_by_role("button", name="Stop").click()
    await tab.ended()
    await expect(link).to_have_text("")
    await expect(tab.page.locator(".figures")).to_contain_text("resumed")


async def test_another_tab_follows_the_same_answer(visit: Any, slow_steps: Any) -> None:
    tab = await visit()
    await tab.set(seed=11, max_tokens=4000)
    await tab.ask(STORY)
    await tab.shown(40)
    await tab.begun()  # a tab that opens before follows by the idempotency key, and resumes nothing
    other = await tab.context.new_page()
    await other.goto(f"{tab.origin}/")
    await expect(other.locator(".figures")).to_contain_text("resumed")
    await tab.page.get_by_role("button", name="Stop").click()
    await tab.ended()
    await expect(other.locator("li.assistant")).to_have_class("assistant")
    assert await other.inner_text(".answer") == await tab.page.inner_text(".answer")


async def test_a_lost_connection_is_shown_and_recovered(
    visit: Any, server_url: str, undisturbed: Any, slow_steps: Any
) -> None:
    async with FaultProxy(urlsplit(server_url).port or 0) as proxy:
        tab = await visit(f"http://127.0.0.1:{proxy.port}")
        tab.network_may_fail = True
        await tab.set(seed=13, max_tokens=800)
        await tab.ask(STORY)
        for characters in (40, 200):
            await tab.shown(characters)
            proxy.black_hole = True
            proxy.cut()
            await expect(tab.page.locator("#link")).to_contain_text("Reconnecting")
            stands = await tab.page.inner_text(".answer")
            await asyncio.sleep(0.5)
            assert await tab.page.inner_text(".answer") == stands
            proxy.black_hole = False
            proxy.cut()
            await tab.page.wait_for_function("() => document.body.dataset.link !== 'reconnecting'")
        slow_steps()
        await tab.ended()
        record = await tab.record()
        await tab.context.close()
    assert record["resumed"] >= 2
    expected = await undisturbed(server_url, STORY, seed=13, max_tokens=800)
    assert record["text"] == expected["message"]["content"]


async def test_a_lost_reply_to_the_question_makes_no_second_answer(
    visit: Any, server_url: str, undisturbed: Any
) -> None:
    """The POST is sent again with the same key: one generation, whatever got lost."""
    async with FaultProxy(urlsplit(server_url).port or 0) as proxy:
        tab = await visit(f"http://127.0.0.1:{proxy.port}")
        tab.network_may_fail = True
        await tab.set(seed=17, max_tokens=40)
        posts = posted(tab)
        proxy.swallow_replies = True
        await tab.ask("Count to ten.")
        async with asyncio.timeout(2 * PATIENCE):
            while len(posts) < 2:  # the browser itself repeats a request once, unseen
                await asyncio.sleep(1.0)
                proxy.cut()
        proxy.swallow_replies = False
        await tab.ended()
        record = await tab.record()
        await tab.context.close()
    assert len({post.headers["idempotency-key"] for post in posts}) == 1
    expected = await undisturbed(server_url, "Count to ten.", seed=17, max_tokens=40)
    assert record["text"] == expected["message"]["content"]


async def test_a_token_shows_its_probability_and_alternatives(
    visit: Any, server_url: str, undisturbed: Any
) -> None:
    tab = await visit()
    await tab.set(seed=3, max_tokens=24)
    await tab.ask("The capital of France is")
    await tab.ended()
    expected = await undisturbed(
        server_url, "The capital of France is", seed=3, max_tokens=24, logprobs=True, top_logprobs=5
    )
    token = expected["logprobs"]["content"][1]
    tip = tab.page.locator("#tip")
    await tab.page.locator('.answer [data-token="1"]').first.hover()
    await expect(tip).to_be_visible()
    rows = await tip.locator("li").all_inner_texts()
    assert len(rows) == 5
    shown = float(re.sub(r"[^0-9.]", "", await tip.locator("b").inner_text()))
    assert shown == pytest.approx(100 * math.exp(token["logprob"]), abs=0.1)
    likeliest = token["top_logprobs"][0]["token"].replace(" ", "␣").replace("\n", "⏎")
    assert rows[0].split("\n")[0] == likeliest
    await tab.page.mouse.move(1, 1)
    await expect(tip).to_be_hidden()
    await tab.page.locator(".answer").focus()
    await tab.page.keyboard.press("ArrowRight")
    await tab.page.keyboard.press("ArrowRight")
    await expect(tip.locator("li")).to_have_count(5)
    await expect(tab.page.locator("#token-said")).to_contain_text("Most likely:")
    await tab.page.keyboard.press("Escape")
    await expect(tip).to_be_hidden()


async def test_an_error_shows_the_servers_message(visit: Any) -> None:
    tab = await visit()
    tab.network_may_fail = True
    await tab.set(max_tokens=8000)
    await tab.ask("word " * 400)
    await expect(tab.page.locator(".error")).to_contain_text("together may be at most 8192 tokens")
    tab.errors = [e for e in tab.errors if "400 (Bad Request)" not in e]  # the browser's own note
    await tab.set(max_tokens=5)
    await tab.page.get_by_role("button", name="Again").click()
    await tab.ended()
    assert (await tab.record())["state"] == "done"
    await expect(tab.page.locator(".error")).to_be_hidden()


async def test_the_same_seed_is_the_same_answer(visit: Any) -> None:
    tab = await visit()
    await tab.set(max_tokens=24)
    await tab.ask("Name a colour.")
    await tab.ended()
    first = await tab.record()
    await tab.page.get_by_role("button", name=re.compile(r"^seed \d+$")).click()
    await tab.page.get_by_role("button", name="Again").click()
    await tab.page.wait_for_function("() => document.querySelector('li.assistant:not(.running)')")
    await tab.ended()
    second = await tab.record()
    assert second["call"] != first["call"]
    assert (second["seed"], second["text"]) == (first["seed"], first["text"])


async def test_the_engines_state_is_live(visit: Any, slow_steps: Any) -> None:
    tab = await visit()
    await expect(tab.page.locator("#engines")).to_have_text("1")
    await tab.set(seed=11, max_tokens=2000)
    await tab.ask(STORY)
    await expect(tab.page.locator("#running")).to_have_text("1")
    await tab.page.wait_for_function(
        "() => Number(document.getElementById('speed').textContent) > 0"
    )
    await tab.page.wait_for_function(
        "() => parseInt(document.getElementById('blocks').textContent) > 0"
    )
    await tab.page.keyboard.press("Escape")
    await tab.ended()
    await tab.page.wait_for_function(
        "() => parseInt(document.getElementById('blocks').textContent) === 0"
    )
