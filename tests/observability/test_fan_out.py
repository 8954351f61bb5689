"""fan_out: every observer gets every call."""

from __future__ import annotations

from service.api.http.observer import ApiObserver
from service.observability.fan_out import fan_out


class Recorder(ApiObserver):
    def __init__(self, trace: str | None, log: list[str]) -> None:
        self.trace = trace
        self.log = log

    def call_began(self, traceparent: str | None) -> str | None:
        self.log.append(f"{self.trace} began {traceparent}")
        return self.trace

    def call_accepted(self, requests: int, model: str) -> None:
        self.log.append(f"{self.trace} accepted {requests} {model}")


def test_a_call_reaches_all_in_order_and_returns_what_one_of_them_did() -> None:
    log: list[str] = []
    both = fan_out(Recorder(None, log), Recorder("a", log))
    assert both.call_began("x") == "a"
    both.call_accepted(requests=2, model="m")
    assert log == ["None began x", "a began x", "None accepted 2 m", "a accepted 2 m"]


def test_one_observer_needs_no_wrapper() -> None:
    observer = ApiObserver()
    assert fan_out(observer) is observer
