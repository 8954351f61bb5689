"""Settings: which source of a value wins, and that unknown names and bad values are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.errors import StartupError
from service.messages import ModelCard
from service.observability.metrics import Metrics
from service.parts import ApiModel, ApiSide
from service.queues.contract import QueueLimits
from service.queues.memory.queue import MemoryQueue
from service.setting_rows import setting_rows
from service.settings import Settings, load_settings
from service.startup import MemoryPart, check_names


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "quire.toml"
    file.write_text('port = 1\nhost = "127.0.0.3"\nmax_sequences = 3\n')
    environ = {"QUIRE_PORT": "2", "QUIRE_HOST": "127.0.0.2", "HOME": "/"}
    settings = load_settings({"port": "4"}, file=file, environ=environ)
    assert (settings.port, settings.host, settings.max_sequences, settings.block_size) == (
        4, "127.0.0.2", 3, 16,
    )  # fmt: skip


def test_the_file_may_be_named_in_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "quire.toml"
    file.write_text("port = 77\n")
    assert load_settings({}, environ={"QUIRE_CONFIG": str(file)}).port == 77


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512MiB", 512 * 1024**2), ("2g", 2 * 10**9), ("1_000", 1000), ("64 ki", 65536), ("7b", 7)],
)
def test_sizes(text: str, expected: int) -> None:
    assert load_settings({"kv_memory": text}, environ={}).kv_memory == expected


def test_lists_are_separated_by_commas_or_are_lists_of_the_file(tmp_path: Path) -> None:
    environ = {"QUIRE_ALLOWED_HOSTS": "api, Quire.example,", "QUIRE_CORS_ORIGINS": ""}
    settings = load_settings({}, environ=environ)
    assert (settings.allowed_hosts, settings.cors_origins) == (("api", "quire.example"), ())
    file = tmp_path / "quire.toml"
    file.write_text('cors_origins = ["https://a.example", "http://localhost:3000"]')
    origins = load_settings({}, file=file, environ={}).cors_origins
    assert origins == ("https://a.example", "http://localhost:3000")


@pytest.mark.parametrize(
    "flags",
    [
        {"port": "x"}, {"port": "65536"}, {"port": "-1"}, {"kv_memory": "2 zb"}, {"kv_memory": "0"},
        {"lease": "0"}, {"runner": "nope"}, {"dtype": "float9"}, {"max_sequences": "0"},
        {"log_format": "xml"}, {"threads": "1.5"}, {"unknown": "1"},
        {"allowed_hosts": "http://a.example"}, {"allowed_hosts": "a.example:8000"},
        {"cors_origins": "app.example"}, {"cors_origins": "https://app.example/"},
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_with_its_name(flags: dict[str, str]) -> None:
    with pytest.raises(StartupError, match=next(iter(flags))):
        load_settings(flags, environ={})


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="QUIRE_PROT"):
        load_settings({}, environ={"QUIRE_PROT": "1"})
    file = tmp_path / "quire.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(StartupError, match="prot"):
        load_settings({}, file=file, environ={})


@pytest.mark.parametrize("content", [b"port = ", b"\xff\xfe", b"[port]\n"])
def test_a_broken_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "quire.toml"
    file.write_bytes(content)
    with pytest.raises(StartupError) as caught:
        load_settings({}, file=file, environ={})
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(StartupError, match="configuration file"):
        load_settings({}, file=Path("/nowhere/quire.toml"), environ={})


def test_every_setting_has_a_row_with_help() -> None:
    rows = setting_rows()
    assert [row.name for row in rows] == list(Settings.model_fields)
    assert all(row.group and row.help.endswith(".") for row in rows)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert load_settings({"host": host}, environ={}).is_loopback is loopback


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("a", [("a", None)]),
        ("a, b/c", [("a", None), ("b/c", None)]),
        ("chat=/models/a.gguf,~/x=y", [("/models/a.gguf", "chat"), ("~/x=y", None)]),
        ("org/chat=./x=y, /m/x=y", [("./x=y", "org/chat"), ("/m/x=y", None)]),
    ],
)
def test_models_have_paths_and_names(text: str, sources: list[tuple[str, str | None]]) -> None:
    assert list(load_settings({"model": text}, environ={}).sources) == sources
    assert list(load_settings({}, environ={"QUIRE_MODEL": text}).sources) == sources


def test_the_parts_of_the_memory_are_equal_by_default() -> None:
    assert load_settings({"model": "a,b"}, environ={}).memory_parts == (0.5, 0.5)
    settings = load_settings({"model": "a,b", "model_memory": "3, 1"}, environ={})
    assert settings.memory_parts == (0.75, 0.25)
    # On a GPU each takes its part of what the models before it leave.
    parts = MemoryPart.divide(settings.memory_parts)
    assert [part.of_rest for part in parts] == [0.75, 1.0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": ""}, "model"), ({"model": "a="}, "model"), ({"model": "=a"}, "model"),
        ({"model": "a,b", "model_name": "c"}, "model_name"),
        ({"model": "a,b", "model_memory": "1"}, "model_memory"),
        ({"model": "a", "model_memory": "0"}, "model_memory"),
        ({"model": "a,b", "tensor_parallel": "2"}, "tensor_parallel"),
        ({"model_alias": ["a=x", "a=y"]}, "an alias may be given once"),
        ({"model_alias": "a"}, "model_alias"), ({"model_alias": "=a"}, "model_alias"),
    ],
)  # fmt: skip
def test_models_that_contradict_are_refused(flags: dict[str, str], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        load_settings(flags, environ={})


@pytest.mark.parametrize(("alias", "reason"), [("m=m", "has this name"), ("a=x", "no model")])
def test_an_alias_is_a_new_name_of_a_model(alias: str, reason: str, tiny_tokenizer: Any) -> None:
    card = ModelCard(id="m", max_model_len=8, vocab_size=8, numeric_class="c", created=0)
    model = ApiModel(card=card, tokenizer=tiny_tokenizer)
    queue, metrics = MemoryQueue(QueueLimits()), Metrics()
    with pytest.raises(StartupError, match=reason):
        ApiSide(Settings(model_alias=alias), [model], queue, metrics)


def test_two_models_need_two_names() -> None:
    card = ModelCard(id="m", max_model_len=8, vocab_size=8, numeric_class="c", created=0)
    with pytest.raises(StartupError, match="2 models have the name m"):
        check_names([card, card])
