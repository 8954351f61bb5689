"""`quire doctor`: what it finds, and what it advises."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from model.limits import usable_cpus
from model.native import NativeUnavailable
from model.native.roof import NoRoof, Roof, Weights, count_weights
from service.__main__ import app
from service.doctor import Finding, Level, hardware
from service.doctor.hardware import check_kernels, check_memory, check_threads, expected
from service.doctor.machine import this_machine
from service.doctor.models import check_models
from service.doctor.store import check_files, check_queue
from service.settings import Settings
from tests.cluster.redis_process import AOF, RedisServer, free_port
from tests.support.builders import tiny_model_config, tiny_weights

pytestmark = pytest.mark.slow

ROOF = Roof(variant="avx512", bytes_a_second=1e10, products_a_second=1e12)


def only(findings: Iterator[Finding] | Sequence[Finding]) -> Finding:
    (finding,) = findings
    assert bool(finding.advice) == (finding.level is not Level.OK)
    return finding


def unavailable(*_: object, **__: object) -> Any:
    raise NativeUnavailable("no C++ compiler was found")


# --- hardware -------------------------------------------------------------------------------------
def test_threads_beyond_the_limit_are_reported() -> None:
    few, allowed = check_threads(this_machine(), Settings(threads=1)), usable_cpus()
    assert few.text.startswith("1 of a step")
    many = check_threads(this_machine(), Settings(threads=allowed + 1))
    assert many.level is Level.NOTE
    assert f"--threads {allowed}" in many.advice


def test_memory_counts_weights_and_cache_against_the_container() -> None:
    host = replace(this_machine(), memory=2**34)
    weights = [Weights(layers=2**30, head=2**20)]
    settings = Settings(kv_memory=2**30)
    assert check_memory(host, settings, limit=None, weights=weights).level is Level.OK
    tight = check_memory(host, settings, limit=2**31, weights=weights)
    assert tight.level is Level.BAD
    assert "2.0 GiB (the container's limit)" in tight.text
    assert "lower --kv-memory (now 1,024 MiB)" in tight.advice


def test_without_the_native_library_it_names_the_way_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "NativeLibrary", unavailable)
    found = check_kernels(this_machine())
    assert found.level is Level.BAD
    assert "python -m model.native.build" in found.advice
    assert found.advice.startswith("no C++ compiler was found")


def test_without_a_probe_there_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_roof(**_: object) -> Roof:
        raise NoRoof("no library")

    monkeypatch.setattr(hardware, "probe", no_roof)
    assert only(list(hardware.check_speed([tiny_model_config()], Settings()))).level is Level.NOTE


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"num_kv_heads": 4, "tied_head": True},
        {"gated_mlp": False, "head_dim": 16},
        {"num_layers": 3, "vocab_size": 33},
    ],
)
def test_weights_are_those_of_the_matrices(flags: dict[str, Any]) -> None:
    """Each once: the embedding is read by rows, and is the head of a model without another."""
    config = tiny_model_config(**flags)
    counted = count_weights(config)
    matrices = {name: w.numel() for name, w in tiny_weights(config).items() if w.ndim == 2}
    embedding = matrices.pop("embed.weight")
    assert counted.layers + (0 if config.tied_head else counted.head) == sum(matrices.values())
    assert counted.head == embedding


def test_the_expected_speed_is_a_bound_of_the_roof() -> None:
    weights = Weights(layers=10**9, head=0)
    found = expected(ROOF, weights, four_bit=False)
    assert "at most 10 tokens/s of one answer, 160 of 16 at a time" in found.text


# --- models ---------------------------------------------------------------------------------------
def test_a_model_that_is_here_is_read(tiny_model: Any, tmp_path: Path) -> None:
    folder = tiny_model.write_folder(tmp_path / "tiny")
    ((found, config),) = check_models(
        Settings(model=(str(folder),), cache_dir=tmp_path, device="cpu")
    )
    assert found.text.startswith("tiny: llama, ")
    assert "runner native" in found.text
    assert config is not None
    assert str(tmp_path) not in found.text + found.advice


def test_a_model_that_is_not_here_is_not_fetched(tmp_path: Path) -> None:
    for name in ("smollm2-135m-instruct", "owner/name", "owner/name/file.gguf", "nothing"):
        ((found, config),) = check_models(Settings(model=(name,), cache_dir=tmp_path))
        assert (found.level, config) == (Level.NOTE, None)
        assert "quire pull" in found.advice
    assert not [*tmp_path.iterdir()]


def test_a_broken_file_is_reported(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    ((found, config),) = check_models(Settings(model=(str(broken),)))
    assert (found.level, config) == (Level.BAD, None)


# --- the queue ------------------------------------------------------------------------------------
def test_a_queue_in_memory_is_noted() -> None:
    assert only(check_queue(Settings(queue="memory://"))).level is Level.NOTE


@pytest.mark.parametrize(
    ("options", "query", "level", "words"),
    [
        (("--appendonly", "yes"), "", Level.OK, "synced: everysec"),
        (("--appendonly", "yes", "--appendfsync", "no"), "", Level.NOTE, "everysec"),
        ((), "", Level.BAD, "set appendonly yes"),
        ((), "?allow_volatile=1", Level.NOTE, "no append-only file"),
        (
            (*AOF, "--maxmemory", "1mb", "--maxmemory-policy", "noeviction"),
            "",
            Level.NOTE,
            "of its maxmemory is used",
        ),
    ],
)
def test_a_server_is_judged_by_what_it_keeps(
    options: tuple[str, ...],
    query: str,
    level: Level,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.doctor.store.SLOW", 60.0)  # however busy the machine is
    server = RedisServer(tmp_path, options=options)
    server.start()
    try:
        found = only(check_queue(Settings(queue=server.url + query)))
    finally:
        server.close()
    assert found.level is level, found
    assert words in found.text + found.advice


def test_each_shard_has_a_line_and_no_password(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, options=AOF)
    server.start()
    try:
        hosts = f"127.0.0.1:{free_port()},127.0.0.1:{server.port}"
        down, wrong = check_queue(Settings(queue=f"redis://:hunter2@{hosts}/0"))
    finally:
        server.close()
    assert (down.subject, down.level) == ("queue, shard 1", Level.BAD)
    assert "no server accepts connections" in down.advice
    assert (wrong.subject, wrong.level) == ("queue, shard 2", Level.BAD)
    assert "credentials" in wrong.advice
    assert "hunter2" not in f"{down} {wrong}"


# --- files ----------------------------------------------------------------------------------------
def test_files_are_written_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    found = only([check_files(Settings(files=str(folder)))])
    assert (found.level, found.text) == (Level.OK, "a folder: can be written")
    assert [*folder.iterdir()] == []


def test_files_that_cannot_be_written_are_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = only([check_files(Settings(files=str(tmp_path / "file" / "folder")))])
    assert (found.level, found.text) == (Level.NOTE, "a folder: Not a directory")
    unknown = only([check_files(Settings(files="nowhere://x"))])
    assert unknown.level is Level.NOTE
    assert "--files" in unknown.advice


# --- the command ----------------------------------------------------------------------------------
def test_the_command_ends_with_1_if_something_must_change(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "probe", lambda **_: ROOF)
    monkeypatch.setattr(hardware, "_DRIVER", tmp_path / "none")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    folder = tiny_model.write_folder(tmp_path / "tiny")
    flags = ["doctor", "--model", str(folder), "--kv-memory", "1M"]
    good = CliRunner().invoke(app, flags)
    assert good.exit_code == 0, good.output
    for subject in [
        "versions",
        "kernels",
        "threads",
        "memory",
        "GPU",
        "model",
        "queue",
        "files",
        "expected",
    ]:
        assert f" {subject} " in good.output
    assert "memory 10.0 GB/s, int8 2.00 TOPS (avx512)" in good.output
    bad = CliRunner().invoke(app, [*flags, "--queue", f"redis://127.0.0.1:{free_port()}/0"])
    assert bad.exit_code == 1
    assert "\nbad  queue" in bad.output


def test_bug_reports_ask_for_its_output() -> None:
    template = Path(__file__).parents[2] / ".github" / "ISSUE_TEMPLATE" / "bug.yaml"
    fields = {field["id"]: field for field in yaml.safe_load(template.read_text())["body"]}
    assert "quire doctor" in fields["doctor"]["attributes"]["label"]
    assert fields["doctor"]["validations"]["required"]
