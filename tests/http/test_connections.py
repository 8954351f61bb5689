"""Connections: which one gives way when a port is full, and how descriptors are divided."""

from __future__ import annotations

import logging
import random
from collections import Counter
from typing import Any

import pytest

from service.errors import StartupError
from service.http.connections import (
    ConnectionLimits,
    ConnectionObserver,
    Connections,
    Outcome,
    Slot,
    address_group,
)
from service.http.descriptors import RESERVE, plan_connections, raise_descriptor_limit
from service.settings import Settings


class Observed(ConnectionObserver):
    """What an observer was given."""

    def __init__(self) -> None:
        self.open: list[int] = []
        self.limited: Counter[tuple[str, Outcome]] = Counter()

    def connections_open(self, port: str, count: int) -> None:
        self.open.append(count)

    def connection_limited(self, port: str, outcome: Outcome) -> None:
        self.limited[port, outcome] += 1


class Client:
    """A connection that a limit may abort."""

    def __init__(self, pool: Connections, host: str) -> None:
        self.aborted = False
        slot = pool.admit(host)
        assert slot is not None
        self.slot: Slot = slot
        slot.abort = self._abort
        slot.idle()

    def _abort(self) -> None:
        self.aborted = True
        self.slot.release()  # as the end of the connection does

    @property
    def refused(self) -> str | None:
        return None if self.slot.refusal is None else self.slot.refusal.code


def pool_of(**limits: int) -> tuple[Connections, Observed]:
    observed = Observed()
    limits = {"total": 6, "per_address": 4, "refused": 2} | limits
    return Connections(ConnectionLimits(**limits), observer=observed), observed


def test_the_connection_that_waited_longest_gives_way() -> None:
    pool, observed = pool_of()
    clients = [Client(pool, f"10.0.0.{number}") for number in range(6)]
    clients[0].slot.idle()  # it began to wait again, after a request
    clients[1].slot.busy()
    newest = [Client(pool, "10.0.1.1"), Client(pool, "10.0.1.2")]
    assert [client.aborted for client in clients] == [False, False, True, True, False, False]
    assert [client.refused for client in newest] == [None, None]
    assert len(pool) == 6
    assert observed.open[-1] == 6
    assert max(observed.open) == 6
    assert observed.limited == {("api", Outcome.CLOSED): 2}


def test_an_address_at_its_limit_makes_room_among_its_own() -> None:
    pool, _ = pool_of()
    other = Client(pool, "10.0.0.2")
    clients = [Client(pool, "10.0.0.1") for _ in range(5)]
    assert [client.aborted for client in clients] == [True, False, False, False, False]
    assert not other.aborted, "it waited longer, and is another's"


def test_connections_with_an_open_answer_are_never_closed_for_others() -> None:
    pool, observed = pool_of()
    clients = [Client(pool, f"10.0.0.{number}") for number in range(6)]
    for client in clients:
        client.slot.busy()
    late = Client(pool, "10.0.1.1")
    assert late.refused == "too_many_connections"
    assert late.slot.refusal is not None
    assert late.slot.refusal.status == 503
    assert not any(client.aborted for client in clients)
    assert observed.limited == {("api", Outcome.REFUSED): 1}
    clients[0].slot.release()
    assert Client(pool, "10.0.1.1").refused is None


def test_an_address_whose_connections_are_all_busy_is_refused_and_others_are_not() -> None:
    pool, _ = pool_of()
    for _ in range(4):
        Client(pool, "10.0.0.1").slot.busy()
    refused = Client(pool, "10.0.0.1")
    assert refused.slot.refusal is not None
    assert (refused.slot.refusal.status, refused.refused) == (429, "too_many_connections")
    assert "4 connections" in refused.slot.refusal.message
    assert Client(pool, "10.0.0.2").refused is None


def test_refusals_that_are_being_answered_are_bounded_too() -> None:
    pool, _ = pool_of(total=1)
    Client(pool, "10.0.0.1").slot.busy()
    refused = [Client(pool, "10.0.0.2"), Client(pool, "10.0.0.3")]
    assert pool.admit("10.0.0.4") is None
    refused[0].slot.release()
    refused[0].slot.release()
    assert pool.admit("10.0.0.4") is not None
    assert pool.admit("10.0.0.4") is None


def test_an_episode_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    limits = ConnectionLimits(total=2, per_address=2)
    pool = Connections(limits, port="admin", clock=lambda: now[0])
    for _ in range(3):
        for number in range(200):
            Client(pool, f"10.0.0.{number}")
            now[0] += 0.5
        now[0] += 61
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[0].startswith("admin port: 2 connections are open, the limit of max_connections;")
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_the_books_are_right_whatever_happens() -> None:
    """Random arrivals, answers and ends: never over a limit, and empty when all are gone."""
    draw = random.Random(5)
    pool, observed = pool_of(total=20, per_address=9, refused=3)
    alive: list[Client] = []
    for _ in range(4000):
        alive = [client for client in alive if not client.aborted]
        match draw.randrange(4):
            case 0 | 1:
                before = len(pool)
                slot = pool.admit(f"10.0.0.{draw.randrange(4)}")
                if slot is not None:
                    client = Client.__new__(Client)
                    client.aborted, client.slot = False, slot
                    slot.abort = client._abort
                    slot.idle()
                    alive.append(client)
                assert len(pool) - before in {0, 1}
            case 2 if alive:
                client = draw.choice(alive)
                draw.choice([client.slot.busy, client.slot.idle])()
            case 3 if alive:
                alive.pop(draw.randrange(len(alive))).slot.release()
        alive = [client for client in alive if not client.aborted]
        held = [client.slot.address for client in alive if client.slot.refusal is None]
        assert len(pool) == len(held) <= 20
        assert max(Counter(held).values(), default=0) <= 9
        assert len(alive) - len(held) <= 3
    for client in alive:
        client.slot.release()
    assert len(pool) == observed.open[-1] == 0
    assert pool._groups == {}
    assert not pool._idle


@pytest.mark.parametrize(
    ("host", "group"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:9::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("", ""),
    ],
)
def test_what_counts_as_one_address(host: str, group: str) -> None:
    """A host of an IPv6 network has 2**64 addresses, and counts once."""
    assert address_group(host) == group


@pytest.mark.parametrize("descriptors", [64, 100, 256, 512, 1024, 4096, 2**20])
def test_ports_and_reserve_fit_into_the_descriptors(descriptors: int) -> None:
    plan = plan_connections(Settings(), descriptors=descriptors)
    api, admin = plan.api, plan.admin
    reserve = descriptors - api.total
    assert reserve >= min(RESERVE, descriptors // 2)
    assert admin.total + 2 * api.refused <= reserve * 0.6, "the rest is for Redis and files"
    assert 1 <= api.per_address < api.total
    assert admin.per_address == admin.total, "scrapes and probes may share an address"


def test_what_is_configured_is_used_or_is_an_error_that_names_the_limit() -> None:
    settings = Settings(max_connections=700, max_connections_per_address=650)
    plan = plan_connections(settings, descriptors=1024)
    assert (plan.api.total, plan.api.per_address) == (700, 650)
    with pytest.raises(StartupError, match="max_connections: must be at most 768") as raised:
        plan_connections(Settings(max_connections=769), descriptors=1024)
    assert "1024" in str(raised.value)


def test_the_soft_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(256, 4096)]
    monkeypatch.setattr("resource.getrlimit", lambda _which: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _which, new: limits.append(new))
    assert raise_descriptor_limit() == 4096
    assert limits[-1] == (4096, 4096)

    def refuse(_which: int, _new: Any) -> None:
        raise OSError

    monkeypatch.setattr("resource.setrlimit", refuse)
    limits.append((256, 4096))
    assert raise_descriptor_limit() == 256
