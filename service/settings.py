"""Settings: every knob of Quire, in one table. The only reader of the environment.

A setting comes from, first found wins: a command line flag (`--max-batch-tokens`), the environment
(`QUIRE_MAX_BATCH_TOKENS`), a TOML file (`--config` or `QUIRE_CONFIG`), its default. Unknown names
and bad values are refused, wherever they stand. The README lists what this file defines, and a
test compares the two.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from service.errors import StartupError

PREFIX = "QUIRE_"
CONFIG_VARIABLE = "QUIRE_CONFIG"  # the file's own place cannot stand in the file

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


class Group(StrEnum):
    """Headings of `--help` and of the README's table."""

    MODEL = "Model"
    ENGINE = "Engine"
    QUEUE = "Queue"
    HTTP = "HTTP"
    LOGS = "Logs"
    TELEMETRY = "Telemetry"


def parse_bytes(value: object) -> object:
    """`512MiB`, `2g`, `1_000_000` -> bytes; anything else is left for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9][0-9_]*)\s*([kmg]i?|)b?", value.strip().lower())
    return int(match[1]) * _UNITS[match[2]] if match else value


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


def split_list(value: object) -> object:
    """`a, b` -> `("a", "b")`; a TOML list is left as it is."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


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


def _setting(group: Group, default: Any, help_text: str, **limits: Any) -> Any:  # noqa: ANN401
    return Field(default, description=help_text, json_schema_extra={"group": group.value}, **limits)


class Settings(BaseModel):
    """All settings, validated. Frozen: nothing changes them while the server runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # Model
    model: str = _setting(
        Group.MODEL,
        "smollm2-135m-instruct",
        "Path of a GGUF file or a safetensors folder, a Hugging Face id, or the default's name.",
    )
    model_name: str | None = _setting(
        Group.MODEL, None, "The name clients ask for; by default the file's or the repository's."
    )
    cache_dir: Path = _setting(
        Group.MODEL, Path("~/.cache/quire"), "Where fetched models are kept."
    )
    max_model_len: int | None = _setting(
        Group.MODEL, None, "Most tokens of prompt and answer; by default the model's own.", ge=8
    )

    # Engine
    runner: Literal["auto", "native", "torch", "cuda"] = _setting(
        Group.ENGINE, "auto", "What executes the steps; auto takes the fastest there is."
    )
    dtype: Literal["auto", "int8", "bfloat16", "float32"] = _setting(
        Group.ENGINE, "auto", "Arithmetic of the network; auto is what the runner does fastest."
    )
    kv_dtype: Literal["auto", "bfloat16", "int8", "float8"] = _setting(
        Group.ENGINE, "auto", "Storage of keys and values, where the runner has a choice."
    )
    device: str = _setting(Group.ENGINE, "auto", "Torch device: cpu, cuda, cuda:1; auto.")
    threads: int | None = _setting(
        Group.ENGINE, None, "Threads of the engine; by default one a core.", ge=1, le=1024
    )
    tensor_parallel: int = _setting(
        Group.ENGINE, 1, "Processes that share the network, a GPU each.", ge=1, le=64
    )
    kv_memory: Bytes | None = _setting(
        Group.ENGINE,
        None,
        "Memory of the KV cache, in each process: bytes, or 512MiB, 2g; by default 512MiB, on a "
        "GPU by memory_share.",
        ge=1,
    )
    memory_share: float = _setting(
        Group.ENGINE,
        0.9,
        "Share of a GPU's memory, of what weights and steps leave free, for the KV cache.",
        gt=0,
        le=1,
    )
    block_size: int = _setting(Group.ENGINE, 16, "Tokens a KV block.", ge=1, le=1024)
    max_batch_tokens: int | None = _setting(
        Group.ENGINE,
        None,
        "Most tokens one step computes, the chunk of a long prompt; by default 512, on a GPU 2048.",
        ge=1,
    )
    max_sequences: int | None = _setting(
        Group.ENGINE,
        None,
        "Most sequences one step computes; by default 64, on a GPU 256.",
        ge=1,
        le=4096,
    )

    target_gap: float = _setting(
        Group.ENGINE, 0.06, "Seconds between tokens of a stream that a long prompt may cost.", gt=0
    )
    speculate: bool = _setting(
        Group.ENGINE,
        default=True,
        help_text="Draft tokens from the text itself; exact runners only, never another answer.",
    )

    # Queue
    queue: str = _setting(
        Group.QUEUE, "memory://", "Where requests and journals live: memory:// or redis://host/0."
    )
    max_queued_requests: int = _setting(
        Group.QUEUE, 1024, "Requests that may wait; more are refused with 503.", ge=1
    )
    max_queued_tokens: int = _setting(
        Group.QUEUE, 1_000_000, "Tokens that may wait: prompts and a share of max_tokens.", ge=1
    )
    max_per_tenant: int = _setting(
        Group.QUEUE, 1024, "Requests a tenant may have waiting or running; then 429.", ge=1
    )
    max_stored_bytes: Bytes = _setting(
        Group.QUEUE,
        512 * 1024**2,
        "Stored bytes of requests and their records; more are refused with 503.",
        ge=1024,
    )
    max_tenant_stored_bytes: Bytes = _setting(
        Group.QUEUE, 256 * 1024**2, "The same, of one tenant; then 429.", ge=1024
    )
    lease: float = _setting(
        Group.QUEUE, 3.0, "Seconds after which a silent engine's requests are taken over.", gt=0
    )
    resume_window: float = _setting(
        Group.QUEUE, 600.0, "Seconds that an ended answer can still be read.", gt=0
    )
    accept_without_engines: bool = _setting(
        Group.QUEUE,
        default=False,
        help_text="Take calls while no engine is there: they wait for one to be started.",
    )

    # HTTP
    host: str = _setting(Group.HTTP, "127.0.0.1", "Address to listen on.")
    port: int = _setting(Group.HTTP, 8000, "Port of the API; 0 takes a free one.", ge=0, le=65535)
    admin_port: int = _setting(
        Group.HTTP,
        8001,
        "Port of metrics and health, same address; 0: a free one. If it is not set and the default "
        "is taken, the next free one.",
        ge=0,
        le=65535,
    )
    allow_anonymous: bool = _setting(
        Group.HTTP,
        default=False,
        help_text="Serve without keys on an address that others can reach.",
    )
    keys_file: Path | None = _setting(
        Group.HTTP, None, "A TOML file of API keys, read again when it changes; see `quire key`."
    )
    allowed_hosts: Hosts = _setting(
        Group.HTTP,
        (),
        "Host names that clients may use if no keys are needed, beside loopback ones: a, b; * "
        "allows all. By default checked on a loopback host only.",
    )
    cors_origins: Origins = _setting(
        Group.HTTP,
        (),
        "Origins whose web pages may call the API: https://app.example, ...; * allows all.",
    )
    max_connections: int | None = _setting(
        Group.HTTP,
        None,
        "Open connections of the API; by default 8192, or fewer if the system's limit of open "
        "files (ulimit -n) is lower.",
        ge=1,
    )
    max_connections_per_address: int | None = _setting(
        Group.HTTP,
        None,
        "Open connections of one client address; by default 3/4 of max_connections. Behind a "
        "proxy all have its address.",
        ge=1,
    )
    max_body: Bytes = _setting(Group.HTTP, 4 * 1024**2, "Largest request body, in bytes.", ge=1024)
    keep_alive: float = _setting(
        Group.HTTP, 15.0, "Seconds of silence after which a stream gets a comment.", gt=0
    )
    disconnect_grace: float = _setting(
        Group.HTTP, 30.0, "Seconds that a resumable answer goes on without a reader.", ge=0
    )

    drain_timeout: float = _setting(
        Group.HTTP,
        600.0,
        "Seconds that open answers get to end after SIGTERM; after Ctrl-C 10 at most.",
        ge=0,
    )

    page: bool = _setting(
        Group.HTTP, default=True, help_text="Serve the web page to chat with the model at /."
    )
    docs: bool = _setting(
        Group.HTTP,
        default=False,
        help_text="Serve /docs and /openapi.json even if keys are required; they need a key, then.",
    )

    attention: bool = _setting(
        Group.HTTP,
        default=True,
        help_text="Serve POST /v1/attention where the network is in the process: quire serve.",
    )

    # Logs
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        Group.LOGS, "info", "Least severity that is logged."
    )
    log_format: Literal["text", "json"] = _setting(
        Group.LOGS, "text", "Text for people, json for machines: one object a line."
    )

    # Telemetry
    vllm_metrics: bool = _setting(
        Group.TELEMETRY,
        default=False,
        help_text="Tell the metrics that vLLM has under its names, too.",
    )
    otlp_endpoint: str | None = _setting(
        Group.TELEMETRY,
        None,
        "Where traces go, such as http://127.0.0.1:4318. Needs quire-llm[otel].",
        pattern=r"^https?://\S+$",
    )

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach the server."""
        return self.host in {"localhost", "::1"} or self.host.startswith("127.")


def bound_spinning() -> None:
    """Makes OpenMP's idle threads spin for a moment and then sleep, unless the operator decided;
    before torch is imported.

    A step has hundreds of parallel pieces: to wake a thread for each costs a third of the speed on
    a quiet machine. Without a bound a thread that waits holds a core for milliseconds, which an
    API, a queue and clients beside the engine want.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(OMP_WAIT_POLICY="ACTIVE", GOMP_SPINCOUNT="10000")


def keep_ranks_to_themselves() -> None:
    """Makes the libraries of tensor parallelism meet on the loopback interface, unless the operator
    decided: by themselves they take one that others can reach, or fail for the host's name.
    """
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")


WHOLE_SUMS: Mapping[str, str] = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}


def keep_sums_whole() -> bool:
    """Leaves the GPU's library no workspace to cut sums into pieces with, unless the operator
    decided; before it multiplies. Returns whether it is so: what it multiplies may then be exact.
    """
    return all(os.environ.setdefault(name, value) == value for name, value in WHOLE_SUMS.items())


class SettingRow(NamedTuple):
    """One row of the README's table."""

    group: str
    name: str
    flag: str
    variable: str
    default: str
    help: str


def load_settings(
    flags: Mapping[str, Any], *, file: Path | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Joins flags (only those given), environment and file. Raises StartupError with one line."""
    variables = os.environ if environ is None else environ
    names = {PREFIX + name.upper() for name in Settings.model_fields} | {CONFIG_VARIABLE}
    unknown = sorted(key for key in variables if key.startswith(PREFIX) and key not in names)
    if unknown:
        raise StartupError(f"unknown setting in the environment: {unknown[0]}")
    if file is None and variables.get(CONFIG_VARIABLE):
        file = Path(variables[CONFIG_VARIABLE])
    from_environment = {
        name: variables[PREFIX + name.upper()]
        for name in Settings.model_fields
        if variables.get(PREFIX + name.upper())
    }
    from_file = _read_file(file) if file else {}
    try:
        return Settings(**{**from_file, **from_environment, **flags})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise StartupError(f"setting {name}: {first['msg'].lower()}") from None


def setting_rows() -> list[SettingRow]:
    """Every setting, in the order of this file."""
    return [_row(name, info) for name, info in Settings.model_fields.items()]


def _row(name: str, info: FieldInfo) -> SettingRow:
    extra = info.json_schema_extra
    group = extra["group"] if isinstance(extra, dict) else ""
    return SettingRow(
        group=str(group),
        name=name,
        flag="--" + name.replace("_", "-"),
        variable=PREFIX + name.upper(),
        default="" if info.default in (None, ()) else str(info.default),
        help=info.description or "",
    )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(f"configuration file: {error.strerror or 'cannot be read'}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"configuration file: {error}") from None
    unknown = sorted(set(values) - set(Settings.model_fields))
    if unknown:
        raise StartupError(f"unknown setting in the configuration file: {unknown[0]}")
    return values
