"""Logs: every line is one line and, as JSON, one object, whatever is logged."""

from __future__ import annotations

import json
import logging

from hypothesis import given
from hypothesis import strategies as st

from service.observability.logs import JsonFormatter, TextFormatter


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"msg": message, "levelname": "INFO", "name": "quire", **extra})
    made.args = ()
    return made


@given(message=st.text(), value=st.text())
def test_json_lines_are_single_objects(message: str, value: str) -> None:
    line = JsonFormatter().format(record(message, tenant=value))
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["message"], fields["tenant"]) == (message, value)


@given(message=st.text())
def test_text_lines_hold_no_control_characters(message: str) -> None:
    line = TextFormatter().format(record(message))
    assert line.isprintable()


def test_what_json_does_not_know_becomes_a_string() -> None:
    assert json.loads(JsonFormatter().format(record("x", path=object)))["path"] == str(object)
