"""The banner: what an operator reads when a role is ready, as text or as one JSON log line."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rich.console import Console

from service.encoders import LoadedEncoder
from service.models import AnyLoaded
from service.settings import Settings

log = logging.getLogger("quire")


def engine_rows(models: Sequence[AnyLoaded]) -> dict[str, str]:
    """Rows about each model and its engine; those of further models are numbered."""
    rows = _engine_rows(models[0])
    for number, loaded in enumerate(models[1:], start=2):
        rows |= {f"{name} {number}": text for name, text in _engine_rows(loaded).items()}
    return rows


def _engine_rows(loaded: AnyLoaded) -> dict[str, str]:
    """Only the last part of the path is shown."""
    card, options = loaded.card, loaded.options
    if isinstance(loaded, LoadedEncoder):
        return {
            "model": f"{card.id} ({loaded.path.name}), encodes up to {card.max_model_len} tokens",
            "numeric class": card.numeric_class,
            "step": f"up to {options.max_batch_tokens} tokens",
            "loaded in": f"{loaded.seconds:.1f} s",
        }
    runner = loaded.runner
    rows = {
        "model": f"{card.id} ({loaded.path.name}), up to {card.max_model_len} tokens",
        "numeric class": card.numeric_class + ("" if runner.exact else " (within rounding)"),
        "KV cache": f"{runner.num_blocks} blocks of {runner.block_size} tokens",
        "step": f"up to {options.max_batch_tokens} tokens, {options.max_sequences} sequences",
        "loaded in": f"{loaded.seconds:.1f} s",
    }
    if loaded.adapters:
        rows["adapters"] = ", ".join(card.id for card in loaded.adapters)
    return rows | ({"fallback reason": loaded.fallback_reason} if loaded.fallback_reason else {})


def api_rows(settings: Settings, api: str, admin: str) -> dict[str, str]:
    """Rows about the queue, of whose URL only the scheme (it may contain a password), and ports."""
    queue = settings.queue.split("://", 1)[0]
    return {"queue": queue} | admin_rows(settings, admin) | {"API": f"{api}/v1"}


def admin_rows(settings: Settings, admin: str) -> dict[str, str]:
    """Rows about the admin port, with a note if it is not the default one."""
    moved = "admin_port" not in settings.model_fields_set and not admin.endswith(
        f":{settings.admin_port}"
    )
    note = {"admin port": f"{settings.admin_port} is taken; see metrics"} if moved else {}
    return {"metrics": f"{admin}/metrics"} | note


def print_banner(
    console: Console, settings: Settings, rows: dict[str, str], *, version: str
) -> None:
    """Prints the rows, or logs them as JSON if that is the log format."""
    if settings.log_format == "json":
        log.info("ready", extra={key.replace(" ", "_"): value for key, value in rows.items()})
        return
    console.print(f"[bold]Quire {version}[/bold]")
    for name, value in rows.items():
        console.print(f"  [dim]{name:16}[/dim]{value}", highlight=False, soft_wrap=True)
