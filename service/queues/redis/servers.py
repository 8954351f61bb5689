"""What a URL of Redis names: the shards of a queue, and the primary of each.

    redis://host/0                   one server; rediss:// with TLS, unix:// for a socket
    redis://a,b:6380,c/0             one shard per independent server
    redis+sentinel://a,b,c/name      Sentinels at a, b and c, and the primary that they watch
    redis+sentinel://a,b,c/one,two   one shard per primary
    redis+cluster://a,b              any nodes of a Redis Cluster; shards are hash tags

A connection finds its primary when it is made: a name is resolved, Sentinels or nodes of the
cluster are asked. After a failover `RedisClient` drops its connections, and new ones find the new
primary.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from redis.asyncio import BlockingConnectionPool, Connection, ConnectionPool
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import ReadOnlyError, RedisError, ResponseError

from service.errors import StartupError
from service.queues.redis.keys import PREFIX, ShardKeys

CONNECT_TIMEOUT = 2.0
REPLY_TIMEOUT = 4.0
CONNECTIONS = 32
MAX_SHARDS = 1024
CLUSTER_SHARDS = 3
"""Of a Redis Cluster unless the URL has `shards=`: the smallest cluster has so many primaries."""
CLUSTER_SLOTS = 16384
SENTINEL_PORT = 26379
FRESH = 0.2
"""Seconds for which connections share what a node replied about its cluster."""

_OPTIONS = ("allow_volatile", "prefix", "shards", "wait")
"""Parameters of the URL that are for this module; `sentinel_*` are for the Sentinels' connections,
and all others for the client library."""

Address = tuple[str, int]


class Server(Protocol):
    """One primary, wherever it is now."""

    def pool(self) -> BlockingConnectionPool:
        """New connections to it. Raises StartupError for parameters that the library rejects."""

    async def close(self) -> None:
        """Closes the connections by which it is found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The keys of one shard, and the server that has them."""

    keys: ShardKeys
    server: Server
    allow_volatile: bool = False  # a server without an append-only file is good enough
    replicas: int = 0  # that have to acknowledge submissions and ends


def shards_of(url: str) -> Sequence[Shard]:
    """The shards that a URL names. Raises StartupError; no message contains its credentials."""
    parts, own, options = _split(url)
    scheme, _, kind = parts.scheme.partition("+")
    plain = parts._replace(scheme=scheme, query=urlencode(options))
    user, hosts = _hosts(parts)
    try:
        replicas = int(own.get("wait", "0"))
        allow_volatile = {"0": False, "1": True}[own.get("allow_volatile", "0")]
        number = int(own["shards"]) if "shards" in own else None
    except (ValueError, KeyError):
        raise StartupError(
            "queue: the URL's shards and wait must be numbers and its allow_volatile 0 or 1"
        ) from None
    prefix = own.get("prefix", PREFIX)
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", prefix):
        raise StartupError(
            "queue: the URL's prefix must be 1 to 64 letters, digits, or any of _ . -"
        )
    if not 0 <= replicas <= 16:
        raise StartupError("queue: the URL's wait must be from 0 to 16 replicas")
    servers: list[Server]
    tags: Callable[[int, int], str] = _tag
    if kind == "sentinel":
        servers = _sentinels(plain, user, hosts)
    elif kind == "cluster":
        number = CLUSTER_SHARDS if number is None else number
        tags = _cluster_tag
        servers = []
    else:
        _check_database(parts)
        places = [plain._replace(netloc=user + host) for host in hosts] or [plain]
        servers = [PlainServer(urlunsplit(place)) for place in places]
    number = len(servers) if number is None else number
    if not max(1, len(servers)) <= number <= MAX_SHARDS:
        raise StartupError(
            f"queue: the URL's shards must be from {max(1, len(servers))} to {MAX_SHARDS}"
        )
    keys = [ShardKeys(k, prefix=prefix, tag=tags(k, number)) for k in range(number)]
    if kind == "cluster":
        cluster = Cluster(plain, user, hosts)
        servers = [ClusterServer(cluster, each.admission) for each in keys]
    return [
        Shard(
            keys=each,
            server=servers[each.shard % len(servers)],
            allow_volatile=allow_volatile,
            replicas=replicas,
        )
        for each in keys
    ]


def _split(url: str) -> tuple[SplitResult, Mapping[str, str], Mapping[str, str]]:
    """The URL's parts, the parameters for this module, and all others."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise StartupError("queue: the URL is malformed") from None
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    own = {name: query.pop(name) for name in _OPTIONS if name in query}
    return parts, own, query


def _hosts(parts: SplitResult) -> tuple[str, list[str]]:
    """`user:password@` or nothing, and each `host:port` as it is written."""
    user, at, hosts = parts.netloc.rpartition("@")
    found = [host for host in hosts.split(",") if host]
    if len(found) != len(hosts.split(",")) and "," in hosts:
        raise StartupError("queue: a host in the URL's list of hosts is empty")
    return user + at, found


def _address(host: str, *, port: int) -> Address:
    try:
        parts = urlsplit(f"//{host}")
        return unquote(parts.hostname or "localhost"), parts.port or port
    except ValueError:
        raise StartupError("queue: a host or port in the URL is malformed") from None


def _check_database(parts: SplitResult) -> None:
    if parts.scheme != "unix" and not re.fullmatch(r"(/\d*)?", parts.path):
        raise StartupError(
            "queue: the path of the Redis URL must be the number of a database; special"
            " characters in a password must be percent-encoded"
        )


def _tag(shard: int, _shards: int) -> str:
    return f"s{shard}"


def _cluster_tag(shard: int, shards: int) -> str:
    """One whose slot is in the shard's part of the slots: nodes have equal, contiguous parts of
    them, and get equal numbers of shards.
    """
    tags = (f"s{shard}.{i}" for i in range(100 * MAX_SHARDS))
    return next(tag for tag in tags if key_slot(tag.encode()) * shards // CLUSTER_SLOTS == shard)


def _pool(url: str, *, find: Callable[[], Awaitable[Address]] | None) -> BlockingConnectionPool:
    """Connections to the address in the URL or, if given, to the one that `find` returns."""
    keepalive = {} if url.startswith("unix:") else {"socket_keepalive": True}
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=REPLY_TIMEOUT,
            socket_connect_timeout=CONNECT_TIMEOUT,
            socket_timeout=REPLY_TIMEOUT,
            **keepalive,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            redis_connect_func=_connect_to_primary,
        )
        if find is not None:
            pool.connection_class = _finding(pool.connection_class, find)
        # Not connected yet: only its parameters are checked. (The library has no types here.)
        pool.make_connection()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, RedisError) as error:
        raise StartupError("queue: the Redis URL or a parameter of it is invalid") from error
    return pool


def _finding(kind: Any, find: Callable[[], Awaitable[Address]]) -> Any:  # noqa: ANN401  # a class of the library
    """The class of connections that ask for their address when they connect."""

    class Finding(kind):  # type: ignore[misc]  # of an untyped class
        async def _connect(self) -> None:
            self.host, self.port = await find()
            await super()._connect()

    return Finding


async def _connect_to_primary(connection: Connection) -> None:
    """Called by the library for each new connection. Raises ReadOnlyError for a replica.

    Any Redis user may send HELLO. A server or proxy without it is not refused here: its first reply
    to a write shows what it is.
    """
    await connection.on_connect()
    await connection.send_command("HELLO")
    try:
        reply: Any = await connection.read_response()
    except ResponseError:
        return
    pairs = zip(reply[::2], reply[1::2], strict=False) if isinstance(reply, list) else ()
    if (b"role", b"replica") in pairs:
        raise ReadOnlyError("the server is a replica")


class PlainServer:
    """The server at the URL's address."""

    def __init__(self, url: str) -> None:
        self._url = url

    def pool(self) -> BlockingConnectionPool:
        return _pool(self._url, find=None)

    async def close(self) -> None:
        """Has nothing to close."""


def _sentinels(plain: SplitResult, user: str, hosts: Sequence[str]) -> list[Server]:
    """One server per name in the path, with the Sentinels at `hosts`."""
    match = re.fullmatch(r"/([A-Za-z0-9_.,-]+)(/\d*)?", plain.path)
    names = match[1].split(",") if match else []
    if match is None or "" in names or not hosts:
        raise StartupError(
            "queue: a Sentinel URL needs hosts and names: redis+sentinel://a,b,c/name"
        )
    query = dict(parse_qsl(plain.query, keep_blank_values=True))
    own = {name: query.pop(name) for name in tuple(query) if name.startswith("sentinel_")}
    login = {name.removeprefix("sentinel_"): value for name, value in own.items()}
    if not login.keys() <= {"username", "password"}:
        raise StartupError("queue: for Sentinels the URL may have sentinel_username and _password")
    url = urlunsplit(
        plain._replace(netloc=f"{user}primary", path=match[2] or "", query=urlencode(query))
    )
    addresses = [_address(host, port=SENTINEL_PORT) for host in hosts]
    asked = {"ssl": True} | _tls(url) if plain.scheme == "rediss" else {}
    asked |= {"socket_connect_timeout": CONNECT_TIMEOUT, "socket_timeout": REPLY_TIMEOUT} | login
    sentinel = Sentinel(addresses, sentinel_kwargs=asked)  # type: ignore[no-untyped-call]
    return [SentinelServer(url, name, sentinel) for name in names]


def _tls(url: str) -> dict[str, Any]:
    """The parameters of a URL that are for TLS."""
    return {name: value for name, value in parse_url(url).items() if name.startswith("ssl_")}


class SentinelServer:
    """The primary that Sentinels know by a name."""

    def __init__(self, url: str, name: str, sentinel: Sentinel) -> None:
        self._url = url
        self._name = name
        self._sentinel = sentinel
        self._lock = asyncio.Lock()  # the library reorders its list of Sentinels while it asks

    def pool(self) -> BlockingConnectionPool:
        return _pool(self._url, find=self._find)

    async def _find(self) -> Address:
        async with self._lock:
            host, port = await self._sentinel.discover_master(self._name)
        return host, port

    async def close(self) -> None:
        async with self._lock:
            for client in tuple(self._sentinel.sentinels):
                await client.aclose()


class Cluster:
    """What the nodes of a Redis Cluster know about it, for all shards of a queue.

    The library's own client of clusters is not used: it keeps connections of its own to each node,
    and replaces nodes and their connections at each look-up.
    """

    def __init__(self, plain: SplitResult, user: str, hosts: Sequence[str]) -> None:
        if plain.path not in {"", "/", "/0"}:
            raise StartupError("queue: a Redis Cluster has only database 0")
        self.url = urlunsplit(plain._replace(netloc=f"{user}node", path=""))
        self._seeds = [_address(host, port=6379) for host in hosts or ["localhost"]]
        self._nodes: list[Address] = []  # that the cluster had when it was asked
        self._parts: list[tuple[int, int, Address]] = []  # first slot, last slot, primary
        self._asked = -FRESH  # loop time
        self._lock = asyncio.Lock()

    async def find(self, key: str) -> Address:
        """The primary that has the slot of a key. Raises the library's errors."""
        async with self._lock:
            time = asyncio.get_running_loop().time
            if time() > self._asked + FRESH:
                await self._ask()
                self._asked = time()
        slot = key_slot(key.encode())
        for first, last, address in self._parts:
            if first <= slot <= last:
                return address
        raise ReadOnlyError("no node serves the slot")

    async def _ask(self) -> None:
        """Asks nodes until one replies; raises the error of the last one. The order is random: what
        a node does not know yet, the next look-up may learn from another.
        """
        nodes = [*random.sample(self._nodes, len(self._nodes)), *self._seeds]
        failure: Exception = ReadOnlyError("the cluster has no nodes")
        for node in dict.fromkeys(nodes):
            try:
                parts = await self._slots(node)
            except (RedisError, OSError) as error:
                failure = error
                continue
            self._parts = [(first, last, nodes[0]) for first, last, nodes in parts]
            self._nodes = list(dict.fromkeys(each for *_, nodes in parts for each in nodes))
            return
        raise failure

    async def _slots(self, node: Address) -> list[tuple[int, int, list[Address]]]:
        """First and last slot of each part of them, its primary and its replicas."""
        pool = ConnectionPool.from_url(
            self.url,
            socket_connect_timeout=CONNECT_TIMEOUT,
            socket_timeout=REPLY_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        host, port = node
        pool.connection_kwargs |= {"host": host, "port": port}
        connection: Any = pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.connect()
            await connection.send_command("CLUSTER SLOTS")
            reply = await connection.read_response()
        finally:
            await connection.disconnect(nowait=True)  # at once, though this may be cancelled again
        return [
            (first, last, [(place.decode() if place else host, at) for place, at, *_ in nodes])
            for first, last, *nodes in reply
        ]


class ClusterServer:
    """The primary of the slot of a shard's keys."""

    def __init__(self, cluster: Cluster, key: str) -> None:
        self._cluster = cluster
        self._key = key

    def pool(self) -> BlockingConnectionPool:
        return _pool(self._cluster.url, find=lambda: self._cluster.find(self._key))

    async def close(self) -> None:
        """Has nothing to close."""
