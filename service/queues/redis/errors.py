"""Errors of Redis and of its client library: what each one means for a call and for the operator.

Texts of the library and of the server may contain addresses and credentials. Only texts of this
module leave it, so neither reaches a log line or a message.
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
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.errors import StartupError, Unavailable

_REPLICA = "the server is a read-only replica; the URL must lead to the primary"
_LOADING = "the server is still loading its data; try again when it has finished"
_CLUSTER = "the Redis Cluster is down"
_NO_WRITES: dict[str, str] = {
    "READONLY": _REPLICA,
    "MASTERDOWN": _REPLICA,
    "LOADING": _LOADING,
    "CLUSTERDOWN": _CLUSTER,
    "NOREPLICAS": "the server refuses writes: it has fewer replicas than min-replicas-to-write",
}
"""Error code of a server that takes no writes now -> meaning. After a failover the server that the
URL leads to may be another one."""

_REPLIES: dict[type[BaseException], str] = {
    AuthenticationError: (
        "it refused the credentials; the URL needs the right redis://user:password@host"
    ),
    NoPermissionError: "its user lacks permissions; grant it +@all ~quire:* &quire:*",
    InvalidResponse: "the server at the URL's address does not speak the Redis protocol",
}
"""Class of the library's error -> meaning."""

_CODES = re.compile(rf"\b({'|'.join(_NO_WRITES)})\b")

_CERTIFICATE_EXPIRED = 10  # OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED
_UNKNOWN_AUTHORITY = {2, 18, 19, 20, 21}  # issuer not found, self-signed, chain not verifiable
_OTHER_HOST = {62, 64}  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH


def refuses_writes(reply: object) -> bool:
    """Whether the server cannot be written to now, so that another one may have taken its place.

    Also if a script or a proxy repeats the server's error code within a text of its own.
    """
    return isinstance(reply, RedisError) and _no_writes(reply) is not None


def _no_writes(error: BaseException) -> str | None:
    """What the operator should read if `error` says that the server takes no writes."""
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
    """The operator's one line if Redis cannot be used at the start."""
    return StartupError(f"queue: Redis cannot be used: {reason_of(error)}")


def cause_of(error: BaseException) -> str:
    """Why Redis cannot be used. Contains no address."""
    return reason_of(error).partition("; ")[0]


def reason_of(error: BaseException) -> str:
    """Why Redis cannot be used and, after a semicolon, the fix. Contains no address."""
    found = _no_writes(error)
    for each in _chain(error):
        found = found or _of_a_reply(each) or _of_tls(each) or _of_a_connection(each)
    return found or f"it does not answer ({type(error).__name__})"


def _of_a_reply(error: BaseException) -> str | None:
    """Meaning of an error that the server replied."""
    for kind, meaning in _REPLIES.items():
        if isinstance(error, kind):
            return meaning
    if not isinstance(error, ResponseError):
        return None
    text = str(error)
    if "DB index" in text or "SELECT is not allowed" in text:
        return "it has no database of the number in the URL; use redis://host:port/0"
    if text.startswith("MISCONF"):
        return "it refuses writes because it cannot save to its disk"
    return "it refused a command (" + (_code_of(text) or type(error).__name__) + ")"


def _code_of(text: str) -> str | None:
    """The error code that a reply begins with; never more of it."""
    code = re.match(r"[A-Z]{3,20}\b", text)
    return None if code is None else code[0]


def _of_tls(error: BaseException) -> str | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _UNKNOWN_AUTHORITY:
            return (
                "its certificate is not signed by a known authority; name that authority's file"
                " with ssl_ca_certs=<path> in the URL"
            )
        if error.verify_code in _OTHER_HOST:
            return "its certificate is not valid for the host in the URL"
        if error.verify_code == _CERTIFICATE_EXPIRED:
            return "its certificate has expired"
        return "its certificate was refused"
    if isinstance(error, ssl.SSLError):
        return "the TLS handshake failed; rediss:// is for TLS, redis:// for a plain connection"
    return None


def _of_a_connection(error: BaseException) -> str | None:
    """Meaning of an error of the operating system."""
    if isinstance(error, socket.gaierror):
        return "the host name in the URL cannot be resolved"
    if isinstance(error, ConnectionRefusedError):
        return "no server accepts connections at the URL's address"
    if isinstance(error, FileNotFoundError | PermissionError):
        return "a file or socket that the URL names cannot be opened"
    if isinstance(error, RedisTimeoutError | TimeoutError):
        return "it does not answer in time; a server without TLS needs a redis:// URL"
    if isinstance(error, ConnectionResetError) or "closed by server" in str(error):
        return "it closed the connection; a server with TLS needs a rediss:// URL"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it: the library wraps the operating system's errors."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
