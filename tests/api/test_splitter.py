"""The splitter of thinking and content: what it returns does not depend on how a text is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.thinking import BLANKS, THINKING_FORMATS, Phase, Splitter, TokenScan, symbol

TAGS = THINKING_FORMATS["think"]
HARMONY = THINKING_FORMATS["gpt-oss"]
# Whole tags and parts of them, blanks of all kinds, and characters of several bytes.
PIECES = (
    "<think>", "</think>", "<thi", "nk>", "</", "<", ">", "\n", " ", "\t\r", "a", "b c", "é", "😀",
    "\u00a0", "\u2003", "</thin",
)  # fmt: skip
HARMONY_PIECES = (
    "<|channel|>", "<|message|>", "<|end|>", "<|start|>", "assistant", "analysis", "final",
    "commentary", HARMONY.opening, f"{HARMONY.closing}{HARMONY.joint}", *HARMONY.heads, "x", " ",
    "<|channel|>commentary to=f", "<|channel|>fin",
)  # fmt: skip

texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
harmony_texts = st.lists(st.sampled_from(HARMONY_PIECES), max_size=14).map("".join)
cuts = st.lists(st.integers(0, 60), max_size=8)


def chunks(text: str, places: Sequence[int]) -> list[str]:
    ends = [*sorted(min(place, len(text)) for place in places), len(text)]
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def split(splitter: Splitter, parts: Sequence[str]) -> tuple[str, str, Phase]:
    found = [splitter.push(part) for part in parts]
    phase = splitter.phase
    found.append(splitter.finish())
    thinking, content = ("".join(column) for column in zip(*found, strict=True))
    return thinking, content, phase


def expected(text: str, *, opened: bool, verbatim: bool) -> tuple[str, str]:
    """The same from the whole text."""
    if not opened:
        begin = text if verbatim else text.lstrip(BLANKS)
        if not begin.startswith("<think>"):
            return "", text
        text = begin.removeprefix("<think>")
    thinking, tag, content = text.partition("</think>")
    if not tag:
        return text.lstrip(BLANKS), ""
    return thinking.strip(BLANKS), content if verbatim else content.lstrip(BLANKS)


@pytest.mark.slow
@given(text=texts, places=cuts, opened=st.booleans(), verbatim=st.booleans())
@example(text="<think>\n\n</think>\n\nhi", places=[7, 9], opened=False, verbatim=False)
@example(text=" <think>a </think> b", places=[1, 3], opened=False, verbatim=True)
@example(text="a </thi </think>", places=[4, 9, 15], opened=True, verbatim=False)
def test_any_cut_gives_what_the_whole_text_has(
    text: str, places: list[int], opened: bool, verbatim: bool
) -> None:
    splitter = Splitter(TAGS, opened=opened, verbatim=verbatim)
    thinking, content, _ = split(splitter, chunks(text, places))
    assert (thinking, content) == expected(text, opened=opened, verbatim=verbatim)


@pytest.mark.slow
@given(text=harmony_texts, places=cuts, opened=st.booleans(), verbatim=st.booleans())
def test_channels_may_be_cut_anywhere(
    text: str, places: list[int], opened: bool, verbatim: bool
) -> None:
    def fresh() -> Splitter:
        return Splitter(HARMONY, opened=opened, verbatim=verbatim)

    whole = split(fresh(), [text])
    assert split(fresh(), chunks(text, places)) == whole
    assert split(fresh(), list(text)) == whole


@given(text=texts, places=cuts, opened=st.booleans())
def test_what_is_out_is_never_taken_back(text: str, places: list[int], opened: bool) -> None:
    """And nothing certain is held back: at most blanks and a part of a tag."""
    splitter = Splitter(TAGS, opened=opened, verbatim=False)
    for part in chunks(text, places):
        splitter.push(part)
        held = splitter.held.strip(BLANKS)
        assert any(tag.startswith(held) for tag in ("<think>", "</think>"))


@given(ids=st.lists(st.integers(0, len(PIECES) - 1), max_size=14), opened=st.booleans())
def test_tokens_and_text_agree(ids: list[int], opened: bool) -> None:
    """An engine, which reads tokens, sees the content begin where the API does."""
    vocabulary = [piece.encode() for piece in PIECES]
    scan = TokenScan(
        Splitter(TAGS, opened=opened, verbatim=False), token_bytes=vocabulary, symbols={}
    )
    splitter = Splitter(TAGS, opened=opened, verbatim=False)
    count = 0
    for id_ in ids:
        before = splitter.phase
        splitter.push(PIECES[id_])
        scan.read(id_)
        assert scan.phase is splitter.phase
        count += before is splitter.phase is Phase.THINKING
    assert scan.num_thinking == count


@pytest.mark.slow
@given(ids=st.lists(st.integers(0, 3), max_size=10))
def test_a_special_token_cannot_be_spelled(ids: list[int]) -> None:
    """[THINK] as a text is a text: tags that are special tokens are those tokens alone."""
    tags = THINKING_FORMATS["mistral"]
    symbols = {tags.opening: symbol(0), tags.closing: symbol(1)}
    vocabulary = (b"", b"", b"[THINK]", b"[/THINK]")
    scan = TokenScan(
        Splitter(tags.spelled(symbols), opened=False, verbatim=False),
        token_bytes=vocabulary,
        symbols={0: symbol(0), 1: symbol(1)},
    )
    for id_ in ids:
        scan.read(id_)
    if not ids:
        assert scan.phase is Phase.START
    elif ids[0] != 0 or 1 in ids:
        assert scan.phase is Phase.CONTENT
    else:
        assert scan.phase is Phase.THINKING


NEXT = HARMONY.closing + HARMONY.joint
FINAL, COMMENTARY = HARMONY.heads
CALL = "<|channel|>commentary to=functions.now<|message|>{}"


@pytest.mark.parametrize(
    ("text", "thinking", "content"),
    [
        (f"{HARMONY.opening}so", "so", ""),
        (f"{HARMONY.opening}so{NEXT}", "so", ""),
        (f"{HARMONY.opening}so{NEXT}{FINAL}hi", "so", "hi"),
        (f"{FINAL}hi", "", "hi"),
        (f"{HARMONY.opening}so{NEXT}{CALL}", "so", CALL),
        (f"{COMMENTARY}First.{NEXT}{HARMONY.opening}so{NEXT}{FINAL}hi", "", "First.hi"),
    ],
)
def test_channels(text: str, thinking: str, content: str) -> None:
    splitter = Splitter(HARMONY, opened=False, verbatim=False)
    assert split(splitter, [text])[:2] == (thinking, content)
