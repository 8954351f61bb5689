"""Settings: all settings of Quire, in one table. The only reader of the environment.

A setting comes from the first of: a command line flag (`--max-batch-tokens`), the environment
(`QUIRE_MAX_BATCH_TOKENS`), a TOML file (`--config` or `QUIRE_CONFIG`), its default. Unknown names
and bad values are errors. docs/settings.md is generated from this file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from service.errors import StartupError
from service.setting_types import (
    Adapters,
    AdapterSource,
    Aliases,
    Bytes,
    Compression,
    Group,
    Hosts,
    Models,
    ModelSource,
    Origins,
    Parts,
    setting,
)

PREFIX = "QUIRE_"
CONFIG_VARIABLE = "QUIRE_CONFIG"  # not a setting: the file cannot contain its own path


_model = partial(setting, Group.MODEL)
_engine = partial(setting, Group.ENGINE)
_queue = partial(setting, Group.QUEUE)
_http = partial(setting, Group.HTTP)
_batches = partial(setting, Group.BATCHES)
_logs = partial(setting, Group.LOGS)
_telemetry = partial(setting, Group.TELEMETRY)


class Settings(BaseModel):
    """All settings, validated and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Models = _model(
        "GGUF file, safetensors folder, Hugging Face id, or the name of the default model; "
        "NAME=PATH sets its name in the API. Several: repeat the flag, or separate them by commas. "
        "Responses and token endpoints without a model go to the first.",
        ("smollm2-135m-instruct",),
        repeated=True,
    )
    model_name: str | None = _model(
        "Name of the only model in the API; default: the file's or the repository's.", None
    )
    model_alias: Aliases = _model(
        "Further names of models in the API: ALIAS=MODEL. Several: repeat the flag, or separate "
        "them by commas.",
        (),
        repeated=True,
    )
    adapter: Adapters = _model(
        "Low-rank adapters (LoRA): NAME=PATH, a folder as PEFT and `quire tune generate` write it; "
        "requests choose one by its name as their model. It changes the first model, or with "
        "NAME@MODEL=PATH that one. Several: repeat the flag, or separate them by commas.",
        (),
        repeated=True,
    )
    cache_dir: Path = _model(
        "Directory of downloaded models and packed weights.", Path("~/.cache/quire")
    )
    max_model_len: int | None = _model(
        "Maximum context length (prompt + output); default: the model's.", None, ge=8
    )

    runner: Literal["auto", "native", "torch", "cuda"] = _engine(
        "Execution backend; auto picks the fastest available.", "auto"
    )
    dtype: Literal["auto", "int4", "int8", "float8", "bfloat16", "float32"] = _engine(
        "Compute dtype of the network; auto: the runner's default, of the native one int8, but "
        "int4 for a 4-bit file on a CPU with AVX2 alone, if the queue is in memory. int4: the "
        "layers of a GGUF file in its own 4-bit blocks (native runner). int8: 8-bit weights; on a "
        "GPU, a Q8_0 file's. float8: e4m3 weights (cuda runner).",
        "auto",
    )
    kv_dtype: Literal["auto", "bfloat16", "int8", "float8"] = _engine(
        "KV cache dtype, if the runner supports several; auto: of the native runner int8, if the "
        "model's keys can be rounded to it, else bfloat16.",
        "auto",
    )
    kv_compression: Compression = _engine(
        "Compression of the KV cache (torch runner). window:1024: each token attends to the first "
        "4 tokens and the last 1024, and a chat may be longer than the model's context "
        "(`quire api` needs the flag, too). anchors: of each finished sentence only its last "
        "token's keys and values are kept; for models tuned with --anchors.",
        "none",
    )
    device: str = _engine("Torch device: cpu, cuda, cuda:1, or auto.", "auto")
    threads: int | None = _engine(
        "CPU threads of the engine; default: one per core.", None, ge=1, le=1024
    )
    tensor_parallel: int = _engine(
        "Number of tensor-parallel processes, one per GPU.", 1, ge=1, le=64
    )
    kv_memory: Bytes | None = _engine(
        "KV cache memory per process, such as 512MiB or 2g; default: 512MiB, on a GPU set by "
        "memory_share.",
        None,
        ge=1,
    )
    memory_share: float = _engine(
        "Share of the GPU memory left free by weights and activations that the KV cache uses.",
        0.9,
        gt=0,
        le=1,
    )
    model_memory: Parts = _engine(
        "Parts of the KV cache memory, one per model: 3, 1; default: equal parts.", ()
    )
    block_size: int = _engine("Tokens per KV block.", 16, ge=1, le=1024)
    max_batch_tokens: int | None = _engine(
        "Maximum tokens per step, and the chunk size of long prompts; default: 512, on a GPU 2048.",
        None,
        ge=1,
    )
    max_sequences: int | None = _engine(
        "Maximum sequences per step; default: 64, on a GPU 256.", None, ge=1, le=4096
    )
    target_gap: float = _engine(
        "Target time between tokens of running streams while a long prompt is prefilled, in "
        "seconds.",
        0.06,
        gt=0,
    )
    speculate: bool = _engine(
        "Speculative decoding with drafts from the text itself and from recent texts of the "
        "tenant; exact runners only. Never changes the output.",
        default=True,
    )

    queue: str = _queue(
        "Store of requests and journals: memory:// or redis://host/0, redis://a,b,c/0 "
        "(independent servers), redis+sentinel://a,b,c/name, redis+cluster://host. `?wait=1`: "
        "replicas acknowledge what is accepted. Deployments that share a Redis server each need a "
        "`?prefix=NAME`.",
        "memory://",
    )
    max_queued_requests: int = _queue(
        "Maximum waiting requests; more are refused with 503.", 1024, ge=1
    )
    max_queued_tokens: int = _queue(
        "Maximum waiting tokens: prompts and a share of max_tokens; more are refused with 503.",
        1_000_000,
        ge=1,
    )
    max_per_tenant: int = _queue(
        "Maximum waiting and running requests per tenant; more are refused with 429.", 1024, ge=1
    )
    max_stored_bytes: Bytes = _queue(
        "Maximum stored bytes of requests and their records; more are refused with 503.",
        512 * 1024**2,
        ge=1024,
    )
    max_tenant_stored_bytes: Bytes = _queue(
        "Maximum stored bytes per tenant; more are refused with 429.", 256 * 1024**2, ge=1024
    )
    journal_interval: float | None = _queue(
        "Minimum seconds between two journal records of an answer; tokens that come faster are "
        "sent together. First and last tokens are never delayed. Default: 0; on a GPU with Redis "
        "0.02.",
        None,
        ge=0,
        le=1,
    )
    lease: float = _queue(
        "Seconds without a heartbeat after which an engine's requests go to another engine.",
        3.0,
        gt=0,
    )
    resume_window: float = _queue(
        "Seconds for which a finished answer can still be read.", 600.0, gt=0
    )
    keep_responses: float = _queue(
        "Seconds for which stored responses and their input are kept, at least for the resume "
        "window; the oldest go first if stored bytes reach a limit.",
        3600.0,
        ge=0,
        le=30 * 86_400,
    )
    accept_without_engines: bool = _queue(
        "Queue requests while no engine is available, instead of refusing them.", default=False
    )

    host: str = _http("Address to listen on.", "127.0.0.1")
    port: int = _http("API port; 0 picks a free one.", 8000, ge=0, le=65535)
    admin_port: int = _http(
        "Port of metrics and health checks; 0 picks a free one. If it is not set and the default"
        " is taken, the next free port.",
        8001,
        ge=0,
        le=65535,
    )
    allow_anonymous: bool = _http(
        "Serve without API keys on an address that other machines can reach.", default=False
    )
    keys_file: Path | None = _http(
        "TOML file of API keys, reloaded when it changes; see `quire key`.", None
    )
    allowed_hosts: Hosts = _http(
        "Host names that clients may use if no keys are required, in addition to loopback names:"
        " a, b; * allows all. If not set, checked on loopback addresses only.",
        (),
    )
    cors_origins: Origins = _http(
        "Origins whose web pages may call the API: https://app.example, ...; * allows all.", ()
    )
    max_connections: int | None = _http(
        "Maximum open connections of the API port; default: 8192, or fewer if the limit of open "
        "files (ulimit -n) is lower.",
        None,
        ge=1,
    )
    max_connections_per_address: int | None = _http(
        "Maximum open connections per client address; default: 3/4 of max_connections. Behind a "
        "proxy, all connections have its address.",
        None,
        ge=1,
    )
    max_body: Bytes = _http("Maximum size of a request body in bytes.", 4 * 1024**2, ge=1024)
    keep_alive: float = _http("Interval between SSE keep-alive comments, in seconds.", 15.0, gt=0)
    disconnect_grace: float = _http(
        "Seconds for which a resumable answer continues after its reader disconnected.", 30.0, ge=0
    )
    drain_timeout: float = _http(
        "Seconds for open responses to finish after SIGTERM; at most 10 after Ctrl-C.", 600.0, ge=0
    )
    page: bool = _http("Serve the chat web page at /.", default=True)
    docs: bool = _http(
        "Serve /docs and /openapi.json even if keys are required; they then need a key, too.",
        default=False,
    )
    attention: bool = _http("Serve POST /v1/attention (`quire serve` only).", default=True)

    files: str | None = _batches(
        "Folder or URL of uploaded files and batches, by fsspec: /srv/files, s3://bucket/path. "
        "API replicas of one queue must share it, others must not. Default: a folder of the queue, "
        "or of the port, below cache_dir.",
        None,
    )
    max_file: Bytes = _batches("Maximum size of a file in bytes.", 200 * 1024**2, ge=1024)
    max_tenant_files: int = _batches("Maximum number of files per tenant.", 1000, ge=1)
    max_tenant_file_bytes: Bytes = _batches(
        "Maximum bytes of all files of a tenant; more uploads are refused with 429.",
        2 * 1024**3,
        ge=1024,
    )
    max_open_batches: int = _batches(
        "Maximum batches per tenant that have not ended; more are refused with 429.", 16, ge=1
    )
    batch_window: int = _batches(
        "Maximum lines of batches in the queue per API replica, in equal shares of tenants.",
        64,
        ge=1,
    )

    log_level: Literal["debug", "info", "warning", "error"] = _logs("Minimum log level.", "info")
    log_format: Literal["text", "json"] = _logs(
        "Log format; json writes one object per line.", "text"
    )

    vllm_metrics: bool = _telemetry("Also export metrics under vLLM's names.", default=False)
    otlp_endpoint: str | None = _telemetry(
        "OTLP endpoint for traces, such as http://127.0.0.1:4318; needs quire-llm[otel].",
        None,
        pattern=r"^https?://\S+$",
    )

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        num = len(self.model)
        if self.model_name is not None and num > 1:
            raise ValueError("model_name is for one model: name several by --model NAME=PATH")
        if self.model_memory and len(self.model_memory) != num:
            raise ValueError(f"model_memory must have one part per model: {num}")
        if self.tensor_parallel > 1 and num > 1:
            raise ValueError("tensor_parallel serves one model per process")
        return self

    @property
    def sources(self) -> tuple[ModelSource, ...]:
        """The models to serve; the first one gets requests that need not name one."""
        sources = [ModelSource.parse(text) for text in self.model]
        return tuple(source._replace(name=source.name or self.model_name) for source in sources)

    @property
    def adapters(self) -> tuple[AdapterSource, ...]:
        """The adapters to serve."""
        return tuple(map(AdapterSource.parse, self.adapter))

    @property
    def memory_parts(self) -> tuple[float, ...]:
        """The part of each model in the KV cache memory; their sum is 1."""
        parts = self.model_memory or (1.0,) * len(self.model)
        return tuple(part / sum(parts) for part in parts)

    @property
    def aliases(self) -> dict[str, str]:
        """Alias -> name of a model."""
        pairs = (text.partition("=") for text in self.model_alias)
        return {alias: model for alias, _, model in pairs}

    @property
    def is_embedded(self) -> bool:
        """Whether the queue is this process's own."""
        return self.queue.startswith("memory:")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in {"localhost", "::1"} or self.host.startswith("127.")


def load_settings(
    flags: Mapping[str, Any], *, file: Path | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Merges flags, environment and file. Raises StartupError, whose message is one line."""
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
        where = f"setting {name}" if name else "settings"
        raise StartupError(f"{where}: {first['msg'].lower()}") from None


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
