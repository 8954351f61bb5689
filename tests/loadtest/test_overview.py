"""Quire against its peers: the best of equal quality, ratios, and their place in the documents."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from loadtest.bench import publish as publishing
from loadtest.bench.document import Document
from loadtest.bench.measure import Kind, Result
from loadtest.bench.overview import CPU, SPEED, is_busy, label, overview, peers_of, short_table
from loadtest.bench.peers.quality import read_estimate, second_half
from loadtest.bench.publish import publish, replace_between, section
from loadtest.bench.table import Table
from loadtest.bench.views import decode_view

MakeResult = Callable[..., Result]
MakeDocument = Callable[..., Document]

SERVERS = ["quire", "quire-plain", "llama.cpp-q4_0", "llama.cpp-q4_1", "openvino-q8_0", "vllm"]
PERPLEXITY = {
    "quire": 10.0, "quire-plain": 10.0, "llama.cpp-q4_0": 13.0, "llama.cpp-q4_1": 10.09,
    "openvino-q8_0": 9.0,
}  # fmt: skip
SPEEDS = {"quire": 90.0, "quire-plain": 60.0, "llama.cpp-q4_0": 50.0, "llama.cpp-q4_1": 20.0,
          "openvino-q8_0": 30.0, "vllm": 55.0}  # fmt: skip
SECONDS = {"quire": 1.0, "quire-plain": 1.2, "llama.cpp-q4_0": 6.0, "llama.cpp-q4_1": 2.0,
           "openvino-q8_0": 9.0, "vllm": 7.0}  # fmt: skip


@pytest.fixture
def document(make_result: MakeResult, make_document: MakeDocument) -> Document:
    """Three repeats on a machine whose speed changes between them; vLLM's quality is not known."""
    results = [
        make_result(
            name, kind, level, repeat=repeat, speed=pace * SPEEDS[name],
            server_cpu=SECONDS[name] * pace * SPEEDS[name], first=1 / (pace * SPEEDS[name]),
        )
        for repeat, pace in enumerate((1, 3, 2))
        for name in SERVERS
        for kind, level in ((Kind.DECODE, 1), (Kind.CHAT, 8), (Kind.PREFILL, 512))
    ]  # fmt: skip
    return make_document(list(SERVERS), results, perplexity=dict(PERPLEXITY))


def table_of(document: Document, title: str) -> Table:
    (table,) = [table for table in overview(document) if table.title == title]
    return table


def test_equal_quality_is_a_perplexity_that_is_lower_or_at_most_1_percent_higher(
    document: Document,
) -> None:
    assert peers_of(document, "quire", equal=True) == ["llama.cpp-q4_1", "openvino-q8_0"]
    assert peers_of(document, "quire", equal=False) == SERVERS[2:]
    document.servers.append("llama.cpp-q8_0-drafts")
    document.perplexity["llama.cpp-q8_0-drafts"] = 9.0
    assert peers_of(document, "quire", equal=True)[-1] == "llama.cpp-q8_0-drafts"
    assert "llama.cpp-q8_0-drafts" not in peers_of(document, "quire-plain", equal=True)
    assert "llama.cpp-q8_0-drafts" not in peers_of(document, "quire-plain", equal=False)
    document.servers.pop()
    document.perplexity["llama.cpp-q4_1"] = 10.11
    assert peers_of(document, "quire", equal=True) == ["openvino-q8_0"]
    del document.perplexity["quire"]
    assert peers_of(document, "quire", equal=True) == []


def test_the_best_peer_depends_on_the_measure(document: Document) -> None:
    view = decode_view(document, 1)
    assert SPEED.best(view, peers_of(document, "quire", equal=True)) == "openvino-q8_0"
    assert SPEED.best(view, peers_of(document, "quire", equal=False)) == "vllm"
    assert CPU.best(view, peers_of(document, "quire", equal=False)) == "llama.cpp-q4_1"
    assert SPEED.best(view, []) is None


def test_ratios_are_those_of_the_best_peers(document: Document) -> None:
    """90 / 30 and 90 / 55 tokens per second; 2.0 / 1.0 CPU seconds per token."""
    rows = table_of(document, "Tokens per second: how many times better Quire is").rows
    assert [row[:2] for row in rows] == [
        ["Quire, 8 bits", "equal quality"], ["Quire, 8 bits", "any quality"],
        ["Quire, 8 bits, without drafts", "equal quality"],
        ["Quire, 8 bits, without drafts", "any quality"],
    ]  # fmt: skip
    assert rows[0][2:4] == ["3.00 OpenVINO, Q8_0"] * 2
    assert rows[1][2] == "1.64 vLLM, bfloat16"
    cpu = table_of(document, "CPU seconds per 1,000 tokens: how many times better Quire is").rows
    assert cpu[0][2] == cpu[1][2] == "2.00 llama.cpp, Q4_1"
    assert cpu[2][2] == "1.67 llama.cpp, Q4_1"


@pytest.mark.parametrize("seed", range(20))
def test_other_work_between_repeats_changes_no_ratio(
    seed: int, make_result: MakeResult, make_document: MakeDocument
) -> None:
    rng = random.Random(seed)
    theirs, factor = rng.uniform(10, 100), rng.uniform(0.5, 4)
    results = [
        make_result(name, repeat=repeat, speed=speed * pace, server_cpu=10.0)
        for repeat, pace in enumerate(rng.uniform(1, 50) for _ in range(5))
        for name, speed in (("quire", factor * theirs), ("other", theirs))
    ]
    view = decode_view(make_document(["quire", "other"], results), 1)
    assert SPEED.ratio(view, "quire", "other") == pytest.approx(factor)
    assert CPU.ratio(view, "quire", "other") == pytest.approx(factor, rel=0.02)  # whole tokens


def test_cpu_time_is_per_1000_tokens(make_result: MakeResult) -> None:
    """10 requests: 200 output tokens in 10 s, or prompts of 512."""
    assert make_result(speed=20.0, server_cpu=3.0).cpu == pytest.approx(15)
    assert make_result(kind=Kind.PREFILL, level=512, server_cpu=3.0).cpu == pytest.approx(3 / 5.12)
    assert math.isnan(make_result(failures=1).cpu)


def test_figures_have_the_perplexity_and_every_load(document: Document) -> None:
    speeds = table_of(document, "Tokens per second")
    assert speeds.columns == ["server", "perplexity", "1 client", "chat, 8", "prompt of 512"]
    assert list(speeds.rows[0][:4]) == ["Quire, 8 bits", "10.00", "180", "180"]
    assert list(speeds.rows[-1][:2]) == ["vLLM, bfloat16", ""]
    assert table_of(document, "CPU seconds per 1,000 tokens").rows[1][2] == "120.0"
    assert table_of(document, "Fraction of the roof").columns == [
        "server",
        "1 client",
        "prompt of 512",
    ]


def test_a_peer_that_failed_is_no_peer(
    make_result: MakeResult, make_document: MakeDocument
) -> None:
    results = [make_result("quire"), make_result("other", speed=0.0, failures=10)]
    document = make_document(["quire", "other"], results)
    assert SPEED.best(decode_view(document, 1), ["other"]) is None
    rows = table_of(document, "Tokens per second: how many times better Quire is").rows
    assert {row[2] for row in rows} == {""}
    alone = make_document(["quire"], results[:1])
    assert not [table for table in overview(alone) if "better" in table.title]


def test_the_short_table_has_cpu_times_if_the_machine_was_busy(
    make_result: MakeResult, make_document: MakeDocument
) -> None:
    for load, title in ((3.0, "Tokens per second"), (20.0, "CPU seconds per 1,000 tokens")):
        results = [make_result(name, load=load) for name in ("quire-plain", "quire-redis", "vllm")]
        document = make_document(["quire-plain", "quire-redis", "vllm"], results)
        assert is_busy(document) == (load > 6)
        titles = [each.title for each in overview(document)]
        assert ("Tokens per second" in titles, "Fraction of the roof" in titles) == (load < 6,) * 2
        table = short_table(document)
        assert table.title == title
        assert [row[0] for row in table.rows] == [
            "Quire, 8 bits, without drafts", "vLLM, bfloat16",
            "Quire, 8 bits, without drafts: times better than the best of equal quality",
            "Quire, 8 bits, without drafts: times better than the best of any quality",
        ]  # fmt: skip
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_labels() -> None:
    assert label("quire-int4-plain") == "Quire, 4 bits, without drafts"
    assert label("xllamacpp-q4_0") == "llama.cpp (AVX2), Q4_0"
    assert label("llama.cpp-q4_0-drafts") == "llama.cpp, Q4_0, drafts"
    assert label("new-server") == "new-server"


@pytest.mark.parametrize("kinds", [("a",), ("a", "b"), ("b", "a", "b", "c", "a")])
def test_a_section_replaces_the_one_of_its_kind_alone(kinds: tuple[str, ...]) -> None:
    text, expected = "head\n<!-- end -->\ntail\n", {}
    for number, kind in enumerate(kinds):
        text = replace_between(text, kind, f"body {number}", end="<!-- end -->")
        expected[kind] = number
    assert text.startswith("head\n")
    assert text.endswith("\n\n<!-- end -->\ntail\n")
    for kind, number in expected.items():
        assert text.count(f"<!-- {kind} -->\nbody {number}\n<!-- end of {kind} -->") == 1
    assert text.count("body") == len(expected)


def test_missing_comments_are_errors() -> None:
    with pytest.raises(ValueError, match="neither"):
        replace_between("text", "a", "b", end="<!-- end -->")
    with pytest.raises(ValueError, match="end of a"):
        replace_between("<!-- a --> text", "a", "b")


def test_a_comparison_is_published_by_kind(
    document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is restricted to AVX2 has a section of its own."""
    benchmarks, readme = tmp_path / "benchmarks.md", tmp_path / "README.md"
    benchmarks.write_text("before\n<!-- end of comparisons -->\nafter\n")
    readme.write_text("<!-- comparison -->\nold\n<!-- end of comparison -->\n")
    monkeypatch.setattr(publishing, "BENCHMARKS", benchmarks)
    monkeypatch.setattr(publishing, "README", readme)
    document.command = "make compare ARGS=--publish"
    publish(document, readme=False)
    document.variant = "avx2"
    publish(document, readme=True)
    publish(document, readme=True)
    text = benchmarks.read_text()
    headings = [line for line in text.splitlines() if line.startswith("### ")]
    assert headings == ["### Abacus <2>, AVX2", "### Abacus <2>, AVX2 restricted to AVX2"]
    assert section(document) in text
    assert text.count(document.command) == 2
    assert "old" not in readme.read_text()
    assert (
        "| Quire, 8 bits, without drafts: times better than the best of equal quality |"
        in readme.read_text()
    )


def test_the_real_documents_have_the_comments() -> None:
    assert "<!-- end of comparisons -->" in publishing.BENCHMARKS.read_text(encoding="utf-8")
    assert "<!-- end of comparison -->" in publishing.README.read_text(encoding="utf-8")


def test_the_second_half_of_a_window_is_what_llama_perplexity_scores() -> None:
    """Of 512 tokens it scores 257 to 511: 255 of the 511 that are predicted."""
    assert second_half(list(range(511))).tolist() == list(range(256, 511))


def test_the_estimate_is_read_from_the_output_of_llama_perplexity() -> None:
    output = "[1]5.1,[2]6.2,\nFinal estimate: PPL = 44.5312 +/- 1.90\n"
    assert read_estimate(output) == 44.5312
    with pytest.raises(ValueError, match="no estimate"):
        read_estimate("nan")
