"""Detokenizer: its text is that of all bytes decoded at once, cut before the first stop string."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.engine.detokenize import Detokenizer
from tests.engine.harness import first_stop

# Whole and split characters of all lengths, bytes that are never UTF-8, letters for the stops.
VOCABULARY: tuple[bytes, ...] = (
    b"a", b"b", b"ab", b"aab", b"", "é".encode(), "€uro".encode(), "😀".encode(),
    *(bytes([byte]) for byte in "é€😀".encode()),
    b"\xff", b"\x80", b"\xed", b"\xa0", b"\xf0\x9f", b"a\xe2",
)  # fmt: skip

# Half of the texts and stops are made of two letters: that is where matches overlap.
tokens = st.lists(st.integers(0, 3), max_size=24) | st.lists(
    st.integers(0, len(VOCABULARY) - 1), max_size=24
)
stops = st.lists(
    st.text("ab", min_size=1, max_size=4) | st.text("ab€😀\ufffd", min_size=1, max_size=4),
    max_size=3,
).map(tuple)


def raw(ids: list[int]) -> bytes:
    return b"".join(VOCABULARY[token] for token in ids)


@given(ids=tokens)
def test_without_stops_the_pieces_are_the_whole(ids: list[int]) -> None:
    detokenizer = Detokenizer(VOCABULARY)
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == raw(ids).decode("utf-8", "replace")


@given(ids=tokens, stop=stops)
@example(ids=[3, 1], stop=("aabb", "ab"))
@example(ids=[0, 0, 0, 1], stop=("aab",))
@example(ids=[0, 0, 1], stop=("b", "ab"))
@example(ids=[0, 1, 0, 0, 1], stop=("abaab", "aa"))
def test_text_is_cut_before_the_first_complete_stop(ids: list[int], stop: tuple[str, ...]) -> None:
    """Checked after each token: what is out is a prefix of the truth, and as long as it can be."""
    detokenizer = Detokenizer(VOCABULARY, stop)
    out = ""
    for num in range(1, len(ids) + 1):
        out += detokenizer.push(ids[num - 1])
        seen = codecs.utf_8_decode(raw(ids[:num]), "replace", False)[0]
        cut = first_stop(seen, stop)
        if cut is not None:
            assert (out, detokenizer.stopped_by) == cut
            break
        assert detokenizer.stopped_by is None
        held = [
            seen[at:] for at in range(len(seen) + 1) if any(s.startswith(seen[at:]) for s in stop)
        ]
        assert out == seen[: len(seen) - len(held[0] if held else "")]
    else:
        seen = raw(ids).decode("utf-8", "replace")
        out += detokenizer.finish()
        assert (out, detokenizer.stopped_by) == (first_stop(seen, stop) or (seen, None))
    assert detokenizer.finish() == ""


def test_a_cut_character_becomes_one_replacement() -> None:
    detokenizer = Detokenizer([b"\xf0\x9f\x98"])
    assert (detokenizer.push(0), detokenizer.finish()) == ("", "\ufffd")


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 character"):
        Detokenizer([b"a"], ("",))
