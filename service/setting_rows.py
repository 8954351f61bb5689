"""The settings as rows, for `--help` and docs/settings.md."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo

from service.settings import PREFIX, Settings


class SettingRow(NamedTuple):
    """One setting, for `--help` and docs/settings.md."""

    group: str
    name: str
    flag: str
    variable: str
    default: str
    help: str
    choices: tuple[str, ...]
    repeated: bool = False  # its flag may be given more than once


def setting_rows() -> list[SettingRow]:
    """Returns all settings, in the order of this file."""
    return [_row(name, info) for name, info in Settings.model_fields.items()]


def _row(name: str, info: FieldInfo) -> SettingRow:
    extra = info.json_schema_extra
    if not isinstance(extra, dict):
        raise TypeError(f"{name} was not made by setting")
    return SettingRow(
        group=str(extra["group"]),
        name=name,
        flag="--" + name.replace("_", "-"),
        variable=PREFIX + name.upper(),
        default=_shown(info.default),
        help=info.description or "",
        choices=get_args(info.annotation) if get_origin(info.annotation) is Literal else (),
        repeated=bool(extra["repeated"]),
    )


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return ", ".join(default)
    return "" if default is None else str(default)
