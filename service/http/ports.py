"""Ports: the sockets of a process, bound before the model is loaded.

A socket is bound seconds before it listens, and the kernel lets two sockets share a port until one
of them listens. So each port is also claimed by a lock, which only one process can hold.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import sys

from service.errors import StartupError
from service.settings import Settings

log = logging.getLogger("quire")

UNACKNOWLEDGED_TIMEOUT = 45  # seconds that a peer may leave sent data unacknowledged
PORTS_TRIED = 100  # starting with the default admin port


class PortTaken(StartupError):
    """Another process uses the port."""


class BoundSocket(socket.socket):
    """A bound TCP socket and the lock that claims its port."""

    lock: socket.socket | None = None

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()
        super().close()


def bind_public(settings: Settings) -> BoundSocket:
    """Binds the API port. Raises StartupError, which names the setting."""
    return _bind_configured(settings, "port")


def bind_admin(settings: Settings) -> BoundSocket:
    """Binds the port of metrics and probes. Raises StartupError, which names the setting.

    If the default port is taken, for instance by another role on this machine, uses the next free
    port and logs it. A configured port that is taken is an error.
    """
    default = settings.admin_port
    if "admin_port" in settings.model_fields_set:
        return _bind_configured(settings, "admin_port")
    for port in range(default, default + PORTS_TRIED):
        with contextlib.suppress(PortTaken):
            bound = bind(settings.host, port)
            if port != default:
                log.warning("admin port %d is taken; using port %d", default, port)
            return bound
    return _bind_configured(settings, "admin_port")  # raises, unless the port is free again


def _bind_configured(settings: Settings, name: str) -> BoundSocket:
    try:
        return bind(settings.host, getattr(settings, name))
    except PortTaken as error:
        flag = "--" + name.replace("_", "-")
        raise StartupError(f"{error}; set {flag} to a free port, or to 0 for any") from None


def bind(host: str, port: int) -> BoundSocket:
    """Binds a socket. Raises StartupError if the port is taken or the address is not local."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small writes at once (TCP_NODELAY) only if the protocol is named.
    bound = BoundSocket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _detect_vanished_peers(bound)
    try:
        bound.bind((host, port))
        bound.lock = _lock_port(bound)
    except (OSError, UnicodeError) as error:
        bound.close()
        reason = error.strerror if isinstance(error, OSError) else "not an address"
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        kind = PortTaken if taken else StartupError
        raise kind(f"cannot listen on {host}:{port}: {(reason or 'no').lower()}") from None
    return bound


def _lock_port(bound: socket.socket) -> socket.socket | None:
    """Claims a port until the process ends. Raises OSError if another process has claimed it.

    The lock is a name in Linux' abstract socket namespace, which exists per network namespace, as
    ports do, and which the kernel releases with the process.
    """
    if sys.platform != "linux":
        return None
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    host, port = bound.getsockname()[:2]
    try:
        lock.bind(f"\0quire-port-{host}-{port}")
    except OSError:
        lock.close()
        raise
    return lock


def _detect_vanished_peers(bound: socket.socket) -> None:
    """Makes the kernel end connections whose peer vanished: no FIN, no RST, no acknowledgement.

    Accepted connections inherit the options. They cover unacknowledged data and, on connections
    without data, keep-alive probes. Without them the kernel would retransmit for 15 minutes.
    """
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": 20,
        "TCP_KEEPINTVL": 10,
        "TCP_USER_TIMEOUT": UNACKNOWLEDGED_TIMEOUT * 1000,
    }
    for name, value in options.items():
        option = getattr(socket, name, None)  # macOS lacks some
        if option is not None:
            bound.setsockopt(socket.IPPROTO_TCP, option, value)


def address(bound: socket.socket) -> str:
    """Returns the URL of a bound socket, http://host:port."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
