"""Errors of Redis and of its client library: what each means for a call and for the operator.

Texts of the library and of the server may contain addresses and credentials. Log lines and messages
contain only texts of this module.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.errors import StartupError, Unavailable

_REPLICA = "the server is a read-only replica; the URL must lead to the primary"
_LOADING = "the server is still loading its data; try again when it has finished"
_CLUSTER = "the Redis Cluster is down"
_MOVED = "it is a node of a Redis Cluster; the URL must begin with redis+cluster://"
_CLOSED = "it closed the connection; a server with TLS needs a rediss:// URL"
_NO_WRITES: dict[str, str] = {
    "READONLY": _REPLICA,
    "MASTERDOWN": _REPLICA,
    "LOADING": _LOADING,
    "CLUSTERDOWN": _CLUSTER,
    "MOVED": _MOVED,
    "ASK": _MOVED,
    "TRYAGAIN": _CLUSTER,
    "NOREPLICAS": "the server refuses writes: it has fewer replicas than min-replicas-to-write",
}
"""Error code of a server that accepts no writes now -> meaning. After a failover the URL may lead
to another server."""

_MEANINGS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (
        AuthenticationError,
        "it refused the credentials; the URL needs the right redis://user:password@host",
    ),
    (NoPermissionError, "its user lacks permissions; grant it +@all ~quire:* &quire:*"),
    (InvalidResponse, "the server at the URL's address does not speak the Redis protocol"),
    (
        ssl.SSLError,
        "the TLS handshake failed; rediss:// is for TLS, redis:// for a plain connection",
    ),
    (socket.gaierror, "the host name in the URL cannot be resolved"),
    (ConnectionRefusedError, "no server accepts connections at the URL's address"),
    ((FileNotFoundError, PermissionError), "a file or socket that the URL names cannot be opened"),
    (
        (RedisTimeoutError, TimeoutError),
        "it does not answer in time; a server without TLS needs a redis:// URL",
    ),
    (ConnectionResetError, _CLOSED),
)
"""Class of an error of the library or the operating system -> meaning."""

_MISTAKES = (
    AuthenticationError, NoPermissionError, InvalidResponse, ssl.SSLError, FileNotFoundError,
    PermissionError,
)  # fmt: skip
"""What a wrong URL causes, and the right server would not."""

_CERTIFICATE: dict[int, str] = {
    **dict.fromkeys(
        (2, 18, 19, 20, 21),  # issuer not found, self-signed, chain not verifiable
        "its certificate is not signed by a known authority; name that authority's file with"
        " ssl_ca_certs=<path> in the URL",
    ),
    # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
    **dict.fromkeys((62, 64), "its certificate is not valid for the host in the URL"),
    10: "its certificate has expired",
}
"""OpenSSL's verify code -> meaning."""


class ServerAway(StartupError):
    """The server is not there now: it may come. Other reasons need the operator."""


_CODES = re.compile(rf"\b({'|'.join(_NO_WRITES)})\b")


def refuses_writes(reply: object) -> bool:
    """Whether the server cannot be written to now, so that another one may have taken its place.

    Also if a script or a proxy quotes the server's error code in its own text.
    """
    return isinstance(reply, RedisError) and _no_writes(reply) is not None


def _no_writes(error: BaseException) -> str | None:
    """The meaning of an error of a server that accepts no writes."""
    if isinstance(error, BusyLoadingError):
        return _LOADING
    if isinstance(error, ReadOnlyError):
        return _REPLICA
    if isinstance(error, ClusterDownError):  # MasterDownError is one, too
        return _REPLICA if "MASTER" in str(error) else _CLUSTER
    code = _CODES.search(str(error)) if isinstance(error, ResponseError) else None
    return None if code is None else _NO_WRITES[code[1]]


def unavailable(error: BaseException) -> Unavailable:
    """The error of a call to the queue."""
    if isinstance(error, OutOfMemoryError):
        return Unavailable("the journal's store is full", code="storage_full", retry_after=5.0)
    return Unavailable(
        "the journal's store does not answer", code="backend_unavailable", retry_after=2.0
    )


def startup_error(error: BaseException) -> StartupError:
    """The operator's one line if Redis cannot be used at startup."""
    kind = ServerAway if _is_away(error) else StartupError
    return kind(f"queue: Redis cannot be used: {reason_of(error)}")


def _is_away(error: BaseException) -> bool:
    """Whether the server is down, unreachable or takes no writes now; not if the URL is wrong."""
    meaning = _no_writes(error)
    if meaning is not None:
        return meaning is not _MOVED
    chain = [*_chain(error)]
    return any(isinstance(each, OSError | RedisConnectionError) for each in chain) and not any(
        isinstance(each, _MISTAKES) for each in chain
    )


def cause_of(error: BaseException) -> str:
    """Why Redis cannot be used. Contains no address."""
    return reason_of(error).partition("; ")[0]


def reason_of(error: BaseException) -> str:
    """Why Redis cannot be used and, after a semicolon, the fix. Contains no address."""
    found = _no_writes(error)
    for each in _chain(error):
        found = found or _meaning(each)
    return found or f"it does not answer ({type(error).__name__})"


def _meaning(error: BaseException) -> str | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        return _CERTIFICATE.get(error.verify_code, "its certificate was refused")
    for kinds, meaning in _MEANINGS:
        if isinstance(error, kinds):
            return meaning
    text = str(error)
    if not isinstance(error, ResponseError):
        return _CLOSED if "closed by server" in text else None
    if "DB index" in text or "SELECT is not allowed" in text:
        return "it has no database with the number in the URL; use redis://host:port/0"
    if text.startswith("MISCONF"):
        return "it refuses writes because it cannot save to its disk"
    return "it refused a command (" + (_code_of(text) or type(error).__name__) + ")"


def _code_of(text: str) -> str | None:
    """The error code that a reply begins with; never more of it."""
    code = re.match(r"[A-Z]{3,20}\b", text)
    return None if code is None else code[0]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it: the library wraps the operating system's errors."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
