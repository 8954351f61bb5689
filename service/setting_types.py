"""Setting types: values of settings that are more than a number or a word, and their fields."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.config import JsonDict

from model.compression import parse_compression


class Group(StrEnum):
    """Headings of `--help` and of docs/settings.md."""

    MODEL = "Model"
    ENGINE = "Engine"
    QUEUE = "Queue"
    HTTP = "HTTP"
    BATCHES = "Batches"
    LOGS = "Logs"
    TELEMETRY = "Telemetry"


def setting(
    group: Group,
    help_text: str,
    default: Any,  # noqa: ANN401
    *,
    repeated: bool = False,
    **limits: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    extra: JsonDict = {"group": group.value, "repeated": repeated}
    return Field(default, description=help_text, json_schema_extra=extra, **limits)


_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


def parse_bytes(value: object) -> object:
    """Converts `512MiB`, `2g` or `1_000_000` to bytes; pydantic rejects any other string."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9][0-9_]*)\s*([kmg]i?|)b?", value.strip().lower())
    return int(match[1]) * _UNITS[match[2]] if match else value


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


def split_list(value: object) -> object:
    """Splits `a, b` into a tuple; returns a TOML list unchanged."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _check_compression(value: str) -> str:
    parse_compression(value)
    return value


Compression = Annotated[str, AfterValidator(_check_compression)]


def _check_host(value: str) -> str:
    if not re.fullmatch(r"\*|[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+", value):
        raise ValueError("must be host names or addresses without scheme and port, or *")
    return value.lower()


def _check_origin(value: str) -> str:
    if not re.fullmatch(r"\*|null|[A-Za-z][A-Za-z0-9+.-]*://[^/\s]+", value):
        raise ValueError("must be origins such as https://app.example, without a path, or *")
    return value.lower()


Hosts = Annotated[
    tuple[Annotated[str, AfterValidator(_check_host)], ...], BeforeValidator(split_list)
]
Origins = Annotated[
    tuple[Annotated[str, AfterValidator(_check_origin)], ...], BeforeValidator(split_list)
]


class ModelSource(NamedTuple):
    """A model to serve: where its files are, and its name in the API if that is set."""

    source: str
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `PATH` or `NAME=PATH`. A path with an equals sign begins with `/`, `.` or `~`."""
        name, equals, source = text.partition("=")
        return cls(source, name) if equals and name[:1] not in {"/", ".", "~"} else cls(text)


class AdapterSource(NamedTuple):
    """An adapter to serve: its name in the API, its folder, and the name of the model that it
    changes; None: the first one.
    """

    name: str
    folder: str
    base: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `NAME=PATH` or `NAME@MODEL=PATH`."""
        names, _, folder = text.partition("=")
        name, at, base = names.partition("@")
        return cls(name, folder, base if at else None)


def _check_adapter(value: str) -> str:
    if not all((source := AdapterSource.parse(value))[:2]) or source.base == "":
        raise ValueError("must be NAME=PATH or NAME@MODEL=PATH")
    return value


def _check_model(value: str) -> str:
    source, name = ModelSource.parse(value)
    if not source or name == "":
        raise ValueError("must be PATH or NAME=PATH")
    return value


def _check_alias(value: str) -> str:
    alias, _, model = value.partition("=")
    if not alias or not model:
        raise ValueError("must be ALIAS=MODEL")
    return value


def _check_aliases(values: tuple[str, ...]) -> tuple[str, ...]:
    names = [value.partition("=")[0] for value in values]
    if len(set(names)) < len(names):
        raise ValueError("an alias may be given once: it stands for one model")
    return values


Models = Annotated[
    tuple[Annotated[str, AfterValidator(_check_model)], ...],
    BeforeValidator(split_list),
    Field(min_length=1),
]
Adapters = Annotated[
    tuple[Annotated[str, AfterValidator(_check_adapter)], ...], BeforeValidator(split_list)
]
Aliases = Annotated[
    tuple[Annotated[str, AfterValidator(_check_alias)], ...],
    BeforeValidator(split_list),
    AfterValidator(_check_aliases),
]
Parts = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(split_list)]
