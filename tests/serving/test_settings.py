"""Settings: which source of a value wins, and that unknown names and bad values are errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import StartupError
from service.settings import Settings, load_settings, setting_rows


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
        {"lease": "0"}, {"runner": "nope"}, {"dtype": "float8"}, {"max_sequences": "0"},
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
