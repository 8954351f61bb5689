"""Logs: one line per event, as text or JSON. Never a prompt or a secret."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Literal

from service.api.http.observer import CallReport

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object per line; the record's `extra` becomes fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Renders the record; values without a JSON type become strings."""
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str, ensure_ascii=True)


class TextFormatter(logging.Formatter):
    """Time, level, message and the `extra` fields as name=value. Control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Renders the record as one line, followed by its traceback if it has one."""
        extra = " ".join(
            f"{key}={value}" for key, value in vars(record).items() if key not in _STANDARD
        )
        line = f"{record.getMessage()} {extra}".rstrip()
        line = line.encode("unicode_escape").decode("ascii") if not line.isprintable() else line
        text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} "
        text += f"{record.levelname.lower():7} {line}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def log_call(report: CallReport) -> None:
    """Writes the request log: one line per generating call, at its end."""
    first = report.to_first_token
    logging.getLogger("quire.requests").info(
        "request",
        extra={
            "id": report.id,
            "tenant": report.tenant,
            "endpoint": report.endpoint,
            "outcome": report.outcome,
            "streamed": report.streamed,
            "prompt_tokens": report.prompt_tokens,
            "completion_tokens": report.completion_tokens,
            "cached_tokens": report.cached_tokens,
            "repeats": report.repeats,
            "model": report.model,
            "first_token_s": None if first is None else round(first, 4),
            "duration_s": round(report.duration, 4),
        },
    )


def set_up_logging(level: str, form: Literal["text", "json"]) -> None:
    """Sends all logs, including uvicorn's, to standard error in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("httpx", "huggingface_hub", "filelock", "asyncio", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Clients cause its warnings, with headers that are too long.
    logging.getLogger("opentelemetry.trace.propagation").setLevel(logging.ERROR)
