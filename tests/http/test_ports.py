"""Ports: the default admin port gives way to the next free one, a configured one does not."""

from __future__ import annotations

import io
import logging
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from rich.console import Console

from service.banner import admin_rows, print_banner
from service.errors import StartupError
from service.http import ports
from service.http.listeners import Listener
from service.http.ports import bind, bind_admin, bind_public
from service.queues.contract import QueueLimits
from service.queues.memory.queue import MemoryQueue
from service.roles import run_until_stopped
from service.settings import Settings
from tests.conftest import free_port


def settings_with_default(port: int) -> Settings:
    """Settings whose default admin port is `port`, so that no test needs the real one."""

    class Local(Settings):
        admin_port: int = port

    return Local()


@contextmanager
def taken(port: int) -> Iterator[None]:
    """Another program listens on the port."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        yield


def test_the_next_port_is_used_and_logged_if_the_default_is_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    default = free_port()
    settings = settings_with_default(default)
    with taken(default), closing(bind_admin(settings)) as bound:
        port = bound.getsockname()[1]
        assert default < port <= default + ports.PORTS_TRIED
        (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert f"admin port {default} is taken" in record.getMessage()
        assert str(port) in record.getMessage()
        out = io.StringIO()
        rows = admin_rows(settings, ports.address(bound))
        print_banner(Console(file=out, width=80), settings, rows, version="0.0.1")
        assert f"http://127.0.0.1:{port}/metrics" in out.getvalue()
        assert f"{default} is taken" in out.getvalue()


def test_a_free_default_port_is_used_and_nothing_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    default = free_port()
    settings = settings_with_default(default)
    with closing(bind_admin(settings)) as bound:
        assert bound.getsockname()[1] == default
        rows = admin_rows(settings, ports.address(bound))
        assert rows == {"metrics": f"http://127.0.0.1:{default}/metrics"}
    assert caplog.records == []


@pytest.mark.parametrize(("name", "open_port"), [("admin_port", bind_admin), ("port", bind_public)])
def test_a_configured_port_that_is_taken_is_an_error_that_names_the_setting(
    name: str, open_port: Any
) -> None:
    port = free_port()
    fields: dict[str, Any] = {name: port}
    with taken(port), pytest.raises(StartupError) as raised:
        open_port(Settings(**fields))
    assert str(raised.value).startswith(f"cannot listen on 127.0.0.1:{port}: address already in")
    assert "--" + name.replace("_", "-") in str(raised.value)


def test_two_sockets_that_do_not_listen_yet_cannot_share_a_port() -> None:
    """Both would be bound, as SO_REUSEADDR allows, and the later of them would fail to listen
    after its model was loaded.
    """
    with closing(bind("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ports.PortTaken):
            bind("127.0.0.1", port)
    with closing(bind("127.0.0.1", port)) as again:
        assert again.getsockname()[1] == port, "the port is free again after the socket is closed"


def test_an_address_of_another_machine_is_not_a_taken_port() -> None:
    with pytest.raises(StartupError, match=r"cannot listen on 192\.0\.2\.1:") as raised:
        bind_public(Settings(host="192.0.2.1", port=0))
    assert "--port" not in str(raised.value)


async def test_a_port_that_another_program_took_meanwhile_is_an_error() -> None:
    """It may listen on a port that is bound here and not listened on yet, and holds no lock."""
    queue = MemoryQueue(QueueLimits())
    with closing(bind("127.0.0.1", 0)) as bound, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(bound.getsockname())
        other.listen()
        listener = Listener(FastAPI(), bound)
        with pytest.raises(StartupError, match="address already in use"):
            await run_until_stopped(queue, [listener], ready=lambda: None)
    assert not listener.answering.is_set()
