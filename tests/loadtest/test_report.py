"""Medians, ratios, tables, chart and file of synthetic comparisons."""

from __future__ import annotations

import math
import random
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from loadtest.bench import compare
from loadtest.bench.chart import draw, panels_of
from loadtest.bench.document import Document, read, write
from loadtest.bench.measure import Kind, Result
from loadtest.bench.overview import label
from loadtest.bench.report import markdown, tables, warnings
from loadtest.bench.table import Table
from loadtest.bench.views import decode_view, goodput, median, prefill_view, ratios

MakeResult = Callable[..., Result]
MakeDocument = Callable[..., Document]


@pytest.fixture
def document(make_result: MakeResult, make_document: MakeDocument) -> Document:
    """Two repeats of three servers; `c` fails everything, `d` was never run."""
    rng = random.Random(4)
    results = []
    for repeat in range(2):
        for name in ("quire", "quire-redis", "c"):
            failures = 10 if name == "c" else 0
            speed = 0.0 if failures else rng.uniform(50, 100)
            for kind, level in ((Kind.DECODE, 1), (Kind.DECODE, 8), (Kind.PREFILL, 512)):
                results.append(
                    make_result(name, kind, level, repeat=repeat, speed=speed, failures=failures)
                )
    results += [
        make_result("quire", Kind.ARRIVALS, rate, good=good)
        for rate, good in ((2, 9), (4, 6), (8, 1))
    ]
    results.append(make_result("quire-torch", level=8, speed=1.0))
    names = ["quire", "quire-redis", "c", "d", "quire-torch"]
    return make_document(names, results, left_out={"d": "d | e not installed"})


def table_of(document: Document, title: str) -> Table:
    (table,) = [table for table in tables(document) if table.title.startswith(title)]
    return table


def test_ratios_pair_the_repeats_and_skip_the_missing(make_result: MakeResult) -> None:
    mine = [make_result("a", repeat=n, speed=speed) for n, speed in enumerate((6, 8, 5, 5))]
    theirs = [make_result("b", repeat=n, speed=speed) for n, speed in ((0, 3), (1, 2), (3, 0))]
    assert ratios(mine, theirs) == [2.0, 4.0]
    assert ratios([], theirs) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_ratio_of_repeats_does_not_see_the_machine_change(
    seed: int, make_result: MakeResult, make_document: MakeDocument
) -> None:
    """Each repeat runs at a speed of its own; the ratio of medians would be wrong."""
    rng = random.Random(seed)
    pace = [rng.uniform(1, 100) for _ in range(3)]
    results = [make_result("a", repeat=n, speed=3 * at) for n, at in enumerate(pace)]
    results += [make_result("b", repeat=n, speed=at) for n, at in enumerate(pace[:2])]
    view = decode_view(make_document(["a", "b"], results), 1)
    assert view.ratio("a", "b") == pytest.approx(3)
    assert view.ratio("b", "a") == pytest.approx(1 / 3)


def test_medians_leave_out_what_is_no_number() -> None:
    assert median([math.nan, 3, 1, math.nan, 2]) == 2
    assert math.isnan(median([math.nan]))


def test_roofs_are_the_slower_of_memory_and_products(
    make_result: MakeResult, make_document: MakeDocument
) -> None:
    """100 weights at 1000 bytes/s are 0.1 s; 8 rows of 100 products at 1e5 are 8 ms."""
    fast_memory = make_document(["a"], [make_result(speed=5.0)])
    assert decode_view(fast_memory, 1).roofs_of("a") == pytest.approx([10] * 3)
    assert decode_view(fast_memory, 8).roofs_of("a") == pytest.approx([80] * 3)
    assert decode_view(fast_memory, 1).of_roof("a") == pytest.approx(0.5)
    # 512 rows of the layers and one of the head: 40980 products at 1e5 per second.
    assert prefill_view(fast_memory).roofs_of("a") == pytest.approx([512 / (40980 / 1e5)] * 3)


def test_smaller_weights_have_a_higher_roof(
    make_result: MakeResult, make_document: MakeDocument
) -> None:
    """80 weights of half a byte and 20 of the head are 60 bytes: 0.06 s; `a` has one byte each."""
    results = [make_result("a", speed=5.0), make_result("b", speed=5.0)]
    view = decode_view(make_document(["a", "b"], results, weight_bytes={"b": 0.5}), 1)
    assert [view.of_roof("a"), view.of_roof("b")] == pytest.approx([0.5, 0.3])


def test_a_prompt_s_speed_is_its_length_over_the_time_to_the_first_token(
    make_result: MakeResult,
) -> None:
    assert make_result("a", Kind.PREFILL, 512, first=0.5).speed == 1024
    assert make_result("a", Kind.PREFILL, 512, failures=10).speed == 0


def test_goodput_is_the_most_of_all_rates(document: Document) -> None:
    """9 of 10 at 2 a second are 1.8, 6 of 10 at 4 are 2.4, 1 of 10 at 8 is 0.8."""
    assert goodput(document, "quire") == pytest.approx(2.4)
    assert math.isnan(goodput(document, "c"))


def test_every_table_has_full_rows_and_only_servers_that_ran(document: Document) -> None:
    for table in tables(document):
        assert {len(row) for row in table.rows} == {len(table.columns)}, table.title
    decode = table_of(document, "8 clients")
    assert [row[0] for row in decode.rows] == ["quire", "quire-redis", "c", "quire-torch"]
    assert decode.rows[0][2] == "1.00 x"
    failing = dict(zip(decode.columns, decode.rows[2], strict=True))
    assert (failing["tok/s"], failing["quire is"], failing["TTFT p50"]) == ("0.0", "", "")
    assert failing["failed"] == "20/20"
    assert table_of(document, "Left out").rows == [["d", "d / e not installed"]]


def test_redis_costs_what_the_paired_repeats_say(
    make_result: MakeResult, make_document: MakeDocument
) -> None:
    results = [
        make_result(name, level=8, repeat=repeat, speed=pace * share)
        for repeat, pace in enumerate((10, 1000, 50))
        for name, share in (("quire", 1.0), ("quire-redis", 0.88))
    ]
    document = make_document(["quire", "quire-redis"], results)
    assert [row[-1] for row in table_of(document, "Redis mode").rows] == ["12 %"]
    alone = make_document(["quire"], results[:1])
    assert not [table for table in tables(alone) if table.title.startswith("Redis")]


def test_the_markdown_has_tables_that_github_reads(document: Document) -> None:
    text = markdown(document)
    assert "Fewer repeats: quire-torch (1)." in text
    assert "2030-01-02, Abacus <2>, 2 CPUs, 8 GiB (avx2)" in text
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == len(tables(document))
    for block in blocks:
        assert len({line.count("|") for line in block.strip().splitlines()}) == 1


def test_distortions_are_reported(make_result: MakeResult, make_document: MakeDocument) -> None:
    fine = [make_result("a"), make_result("b", prompt_tokens=101)]
    assert list(warnings(make_document(["a", "b"], fine))) == []
    spoilt = [
        make_result("a", client_cpu=6.0),
        make_result("b", prompt_tokens=140),
        make_result("c", failures=1),
    ]
    lines = "\n".join(warnings(make_document(["a", "b", "c"], spoilt)))
    assert "c, decode 1: broken" in lines
    assert "half a core" in lines
    assert "b, decode 1: counts 140 prompt tokens, not 100" in lines


@pytest.mark.slow
def test_the_chart_shows_every_panel_and_server(document: Document, tmp_path: Path) -> None:
    draw(document, tmp_path / "chart.svg")
    root = ET.parse(tmp_path / "chart.svg").getroot()
    texts = [element.text or "" for element in root.iter() if element.tag.endswith("}text")]
    panels = panels_of(document)
    assert len(panels) == 5
    assert {panel.title for panel in panels} <= set(texts)
    for name in ("quire", "quire-redis", "c"):
        assert texts.count(label(name)) == sum(name in panel.values for panel in panels) >= 4
    assert "d" not in texts
    assert texts.count("roof") == sum(not math.isnan(panel.roof) for panel in panels) == 3
    assert "failed" in texts
    assert any("Abacus <2>" in text for text in texts)


def test_a_document_is_read_as_it_was_written(document: Document, tmp_path: Path) -> None:
    path = tmp_path / "compare.json"
    write(document, path)
    again = read(path)
    write(again, tmp_path / "again.json")
    assert orjson.loads((tmp_path / "again.json").read_bytes()) == orjson.loads(path.read_bytes())
    assert markdown(again) == markdown(document)
    assert repr(panels_of(again)) == repr(panels_of(document))


@pytest.mark.slow
def test_a_written_comparison_is_rendered_again_for_the_readme(
    document: Document,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare, "_CHART", tmp_path / "chart.svg")
    published: list[bool] = []
    monkeypatch.setattr(compare, "publish", lambda _, *, readme: published.append(readme))
    write(document, tmp_path / "old.json")
    words = ["--render", str(tmp_path / "old.json"), "--results", str(tmp_path), "--readme"]
    assert compare.main(words) == 0
    assert (tmp_path / "chart.svg").read_bytes() == (tmp_path / "compare.svg").read_bytes()
    assert (tmp_path / "compare.md").read_text() == markdown(document)
    assert published == [True]
    document.results[0] = replace(
        document.results[0], summary=replace(document.results[0].summary, failures=1)
    )
    write(document, tmp_path / "old.json")
    assert compare.main(words) == 1  # a request of the first server failed
