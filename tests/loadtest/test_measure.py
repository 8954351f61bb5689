"""Measuring real HTTP servers, failing ones included."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from loadtest.bench import compare, measure
from loadtest.bench.compare import Comparison, parse, sizes_of
from loadtest.bench.document import Document
from loadtest.bench.measure import Kind, Session, Sizes, TooSlow, better_threads, is_good
from loadtest.bench.peers import SERVERS
from loadtest.bench.servers import Plan, Server, ServerFailed, convert, perplexity, running
from model.native.roof import NoRoof, Roof
from model.text.tokenizer import Tokenizer
from service.bench.client import Outcome
from service.bench.workloads import make_prompts, poisson_arrivals
from service.doctor.machine import design_of, read_cpuinfo, this_machine
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.slow

TOY = Path(__file__).parent / "toy_server.py"
SIZES = Sizes(
    clients=(1, 3), least=2, tokens_in=4, tokens_out=5, prefill_tokens=8, prefill_requests=2,
    rates=(40, 80), window=0.2, tokens_out_arrivals=2,
    chat_clients=(2,), chat_least=3, chat_tokens=4,
)  # fmt: skip


def toy(name: str = "toy", *, pace: float = 0.001, exits_after: int = 10**6) -> Server:
    command = [sys.executable, str(TOY)]
    return Server(
        name=name, command=lambda _, port: [*command, str(port), str(pace), str(exits_after)]
    )


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(model=tmp_path / "m.gguf", threads=1, clients=3, context=64, folder=tmp_path)


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native library may have to be built first."""

    def probe(**_: object) -> Roof:
        raise NoRoof("not here")

    monkeypatch.setattr(compare, "probe", probe)


def make_outcome(*arrivals: float, error: str | None = None) -> Outcome:
    return Outcome(
        sent=0.0, arrivals=arrivals, completion_tokens=len(arrivals), prompt_tokens=1, error=error
    )


@pytest.mark.parametrize("seed", range(10))
def test_arrivals_are_seeded_rising_and_as_many_as_the_rate_says(seed: int) -> None:
    times = poisson_arrivals(str(seed), rate=8, window=200)
    assert times == poisson_arrivals(str(seed), rate=8, window=200)
    assert times != poisson_arrivals(f"{seed}!", rate=8, window=200)
    assert list(times) == sorted(times)
    assert times[0] > 0
    assert times[-1] < 200
    assert len(times) == 1600
    gaps = [after - before for before, after in zip((0.0, *times), times, strict=False)]
    longer = sum(gap > 1 / 8 for gap in gaps) / len(gaps)
    assert longer == pytest.approx(0.368, abs=0.08)  # exponential: e^-1 are longer than the mean


def test_there_is_always_an_arrival() -> None:
    assert len(poisson_arrivals("any", rate=0.1, window=0.5)) == 1


def test_an_answer_is_good_where_it_is_whole_and_both_times_are_met() -> None:
    assert is_good(make_outcome(1.0, 1.05, 1.11))
    assert not is_good(make_outcome(1.001, 1.06))
    assert not is_good(make_outcome(0.1, 0.161))
    assert not is_good(make_outcome(0.1, 0.11, error="short"))


@pytest.fixture
def leisure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every whole answer is in time, however busy the machine is."""
    monkeypatch.setattr(measure, "FIRST_TOKEN_WITHIN", PATIENCE)
    monkeypatch.setattr(measure, "PER_TOKEN_WITHIN", PATIENCE)


@pytest.mark.usefixtures("leisure")
def test_a_session_measures_every_load_and_leaves_no_process(plan: Plan) -> None:
    before = set(psutil.Process().children())
    heard: list[str] = []
    session = Session(toy(), plan, SIZES, repeat=0)
    session.run(with_arrivals=True, notify=heard.append)
    rows = {(row.kind, row.level): row for row in session.results}
    assert list(rows) == [
        (Kind.PREFILL, 8), (Kind.DECODE, 1), (Kind.DECODE, 3), (Kind.CHAT, 2), (Kind.ARRIVALS, 40),
        (Kind.ARRIVALS, 80),
    ]  # fmt: skip
    assert len(heard) == 7
    assert [row.summary.failures for row in rows.values()] == [0] * 6
    assert [row.summary.requests for row in rows.values()][:4] == [2, 2, 3, 3]
    assert rows[Kind.DECODE, 3].summary.completion_tokens == 15
    assert rows[Kind.CHAT, 2].summary.completion_tokens == 12
    assert rows[Kind.ARRIVALS, 40].good == rows[Kind.ARRIVALS, 40].summary.requests
    assert all(row.rss_peak > 10**6 for row in rows.values())
    assert set(psutil.Process().children()) == before


def test_arrivals_stop_rising_where_few_are_good(plan: Plan) -> None:
    """A token takes 0.08 s, more than one may take."""
    sizes = replace(SIZES, clients=(1,), least=1, tokens_out=1, rates=(10, 20, 40))
    session = Session(toy(pace=0.08), plan, sizes, repeat=0)
    session.run(with_arrivals=True)
    (arrivals,) = [row for row in session.results if row.kind is Kind.ARRIVALS]
    assert (arrivals.level, arrivals.good) == (10, 0)


def test_a_load_that_would_take_too_long_is_not_tried(plan: Plan) -> None:
    session = Session(toy(pace=0.02), plan, replace(SIZES, patience=0.05), repeat=0)
    with pytest.raises(TooSlow, match="3 clients"):
        session.run(with_arrivals=True)
    assert [row.level for row in session.results] == [8, 1]


def test_a_server_that_dies_is_a_reason_and_not_a_crash(plan: Plan) -> None:
    """It ends after the warm-up and two prompts: while the next load is measured."""
    session = Session(toy(exits_after=3), plan, SIZES, repeat=0)
    with pytest.raises((ServerFailed, TooSlow), match=r"ended unexpectedly|all requests of"):
        session.run(with_arrivals=False)
    assert session.results[0].kind is Kind.PREFILL


def test_a_server_that_does_not_start_says_where_its_log_is(plan: Plan) -> None:
    broken = Server(name="broken", command=lambda *_: [sys.executable, "-c", "raise SystemExit(7)"])
    with pytest.raises(ServerFailed, match=r"exited with 7 .*broken\.log"), running(broken, plan):
        pass


def test_what_is_missing_is_named() -> None:
    server = toy()
    assert server.missing is None
    wanting = replace(server, modules=("no_such_module", "json"), programs=("no-such-program",))
    assert wanting.missing == "no_such_module and no-such-program not installed"


def test_weights_that_cannot_be_made_are_a_reason(plan: Plan) -> None:
    broken = replace(toy(), conversion=lambda _: [sys.executable, "-c", "raise SystemExit(1)"])
    with pytest.raises(ServerFailed, match=r"cannot convert the weights of m\.gguf"):
        convert(broken, plan)


def test_cpu_time_includes_processes_that_come_and_go(plan: Plan) -> None:
    """Each child of the server computes for 0.3 s of CPU time and ends within the measurement."""
    code = (
        "import http.server, subprocess, sys\n"
        "busy = 'import time\\nwhile time.process_time() < 0.3: pass'\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        if self.path == '/work':\n"
        "            subprocess.run([sys.executable, '-c', busy], check=True)\n"
        "        self.send_response(200); self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n"
    )
    server = Server(name="forks", command=lambda _, port: [sys.executable, "-c", code, str(port)])
    with running(server, plan) as started:
        before = started.cpu_seconds()
        with urlopen(f"http://127.0.0.1:{started.target.port}/work", timeout=PATIENCE):
            pass
        assert started.cpu_seconds() - before >= 0.2  # ticks are rounded down


@pytest.mark.parametrize(("status", "expected"), [(0, 12.5), (1, None)])
def test_the_perplexity_is_what_the_command_prints(
    status: int, expected: float | None, plan: Plan
) -> None:
    code = f"print('loading'); print(12.5); raise SystemExit({status})"
    server = replace(toy(), quality=lambda _: [sys.executable, "-c", code])
    if expected is None:
        with pytest.raises(ServerFailed, match="perplexity"):
            perplexity(server, plan)
    else:
        assert perplexity(server, plan) == expected
    assert math.isnan(perplexity(toy(), plan))


@pytest.mark.usefixtures("no_probe")
def test_equal_weights_are_scored_once_and_a_failure_leaves_the_server_in(
    plan: Plan, make_document: Callable[..., Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = plan.folder / "scored"
    code = f"open({str(log)!r}, 'a').write('x'); print(7.0)"
    scored = replace(toy("a"), quality=lambda _: [sys.executable, "-c", code], weight_bytes=0.5)
    broken = replace(toy("c"), quality=lambda _: [sys.executable, "-c", "raise SystemExit(1)"])
    servers = {"a": scored, "b": replace(scored, name="b"), "c": broken, "d": toy("d")}
    monkeypatch.setattr(compare, "SERVERS", servers)
    document = make_document(list(servers), [], sizes=replace(SIZES, chat_clients=()), roofs=[])
    Comparison(plan=plan, document=document, notify=lambda _: None).run(repeats=1, minutes=5)
    assert document.perplexity == {"a": 7.0, "b": 7.0}
    assert log.read_text() == "x"
    assert document.weight_bytes["b"] == 0.5
    assert {row.server for row in document.results} == set(servers)
    assert "perplexity of c" in document.left_out


def test_a_server_that_cannot_be_restricted_is_left_out(
    plan: Plan, make_document: Callable[..., Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = {"any": toy("any")}
    monkeypatch.setattr(compare, "SERVERS", servers)
    document = make_document(list(servers), [], sizes=SIZES, roofs=[])
    restricted = replace(plan, variant="avx2")
    Comparison(plan=restricted, document=document, notify=lambda _: None).run(repeats=1, minutes=5)
    assert document.left_out["any"] == "cannot be restricted to avx2"
    assert restricted.variables["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert plan.variables == {}


def test_the_better_number_of_threads_is_found(plan: Plan) -> None:
    """Here two threads are slower, as where two share one core."""

    def command(given: Plan, port: int) -> list[str]:
        return [sys.executable, str(TOY), str(port), str(0.0005 * given.threads**3), "1000"]

    server = Server(name="toy", command=command)
    assert better_threads(server, plan, candidates=(1, 3)) == 1


@pytest.mark.usefixtures("no_probe", "leisure")
def test_a_comparison_keeps_the_others_where_one_fails(
    plan: Plan, make_document: Callable[..., Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = {
        "good": toy("good"),
        "absent": replace(toy("absent"), modules=("no_such_module",)),
        "dies": toy("dies", exits_after=3),
        "other": toy("other"),
        "once": replace(toy("once"), once=True),
    }
    monkeypatch.setattr(compare, "SERVERS", servers)
    document = make_document(list(servers), [], sizes=replace(SIZES, rates=(50,)), roofs=[])
    heard: list[str] = []
    Comparison(plan=plan, document=document, notify=heard.append).run(repeats=2, minutes=5)
    assert heard[-1] == "repeat 2 of 2 · good · chat of 2"
    assert set(document.left_out) == {"absent", "dies", "roof"}
    counts = {
        name: sum(row.server == name for row in document.results)
        for name in ("good", "other", "once")
    }
    assert counts == {"good": 4 + 1 + 4, "other": 4 + 1 + 4, "once": 4}  # arrivals but once
    orders = [
        list(dict.fromkeys(row.server for row in document.results if row.repeat == repeat))
        for repeat in range(2)
    ]
    assert orders == [["good", "dies", "other", "once"], ["other", "good"]]


@pytest.mark.usefixtures("no_probe")
def test_no_repeat_is_begun_that_would_end_too_late(
    plan: Plan, make_document: Callable[..., Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "SERVERS", {"good": toy("good")})
    document = make_document(["good"], [], sizes=SIZES, roofs=[])
    Comparison(plan=plan, document=document, notify=lambda _: None).run(repeats=5, minutes=0.001)
    assert {row.repeat for row in document.results} == {0}


def test_the_command_line() -> None:
    words = ["--servers", "quire,transformers", "--results", "here", "--quick", "--clients", "2,4"]
    options = parse(words)
    sizes = sizes_of(options)
    assert (sizes.clients, sizes.tokens_out) == ((2, 4), 32)
    assert sizes_of(parse([])) == Sizes()
    assert sizes_of(parse(["--rates", "", "--chat-clients", ""])).rates == ()
    assert (
        options.command == "make compare ARGS='--servers quire,transformers --quick --clients 2,4'"
    )
    with pytest.raises(SystemExit):
        parse(["--servers", "quire,unknown"])


def test_every_server_has_a_name_of_its_own_and_a_command(plan: Plan, small_gguf: Path) -> None:
    given = replace(plan, model=small_gguf)
    for name, server in SERVERS.items():
        assert server.name == name
        assert "4711" in server.command(given, 4711)


def test_the_machine_is_read_from_its_processor_s_own_words() -> None:
    text = "processor\t: 0\nmodel name\t: Abacus 9\nflags\t\t: avx2 amx_int8\n\nprocessor\t: 1\n"
    assert read_cpuinfo(text)["model name"] == "Abacus 9"
    assert read_cpuinfo("") == {}
    machine = this_machine()
    assert machine.cpus >= 1
    assert machine.processor
    assert machine.memory > 2**28


@pytest.mark.parametrize(
    ("vendor", "family", "model", "flags", "kind"),
    [
        ("AuthenticAMD", 25, 17, "avx2 avx512f avx512_vnni", "AMD Zen 4, AVX512-VNNI"),
        ("AuthenticAMD", 25, 1, "avx2", "AMD Zen 3, AVX2"),
        ("AuthenticAMD", 26, 2, "avx2 avx512f avx512_vnni", "AMD Zen 5, AVX512-VNNI"),
        ("GenuineIntel", 6, 143, "avx2 avx512_vnni amx_int8", "Intel Sapphire Rapids, AMX"),
        ("GenuineIntel", 6, 999, "avx2", "Abacus 9, AVX2"),
        ("Other", 25, 17, "", "Abacus 9"),
    ],
)
def test_the_kind_of_a_cpu_is_its_design_and_best_instructions(
    vendor: str, family: int, model: int, flags: str, kind: str
) -> None:
    fields = {"vendor_id": vendor, "cpu family": str(family), "model": str(model)}
    machine = replace(
        this_machine(), processor="Abacus 9", flags=flags.split(), design=design_of(fields)
    )
    assert machine.kind == kind


def test_the_process_that_measures_imports_no_torch() -> None:
    """It would take memory and time from the servers."""
    code = "import sys, loadtest.bench.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_prompts_have_as_many_tokens_of_the_default_model_as_words(default_model: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(default_model)
    for prompt in make_prompts("any", count=50, num_tokens=128):
        assert len(tokenizer.encode(prompt)) == 128
