"""Keys: who may call, from a TOML file that is read again when it changes.

    [[keys]]
    name = "alice"                  # in logs and limits; used once in the file
    tenant = "research"             # whose prefix cache, streams and share of the engine; the name
    sha256 = "9f86d081..."          # of the secret, in hexadecimal; `quire key` makes both
    requests_per_minute = 60        # these four may be left out: no limit, and priority 1
    tokens_per_minute = 100000
    max_in_flight = 8
    highest_priority = 0

Only digests are kept, here and in the file. A secret is 256 random bits, so nobody can try them all
and a plain SHA-256 does what a slow, salted hash does for passwords, without its cost at each call.
It is found by the digest of what was sent, in a table: how long that takes tells at most about a
digest that the caller can compute anyway, and nothing about the secrets of others.

While the server runs, a file that is empty or deleted revokes every key: all calls are refused
until the file has keys again. A file that cannot be read or is not valid changes nothing: the last
valid keys stay in force, because a typing error must not lock every client out.

It knows no HTTP: `service.api.auth` reads the headers.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import tomllib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import StartupError

log = logging.getLogger(__name__)

PREFIX = "qk-"
LOOK_EVERY = 1.0
"""Seconds between two looks at the file."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Limit = Annotated[int, Field(ge=1, le=10**9)]


class Key(BaseModel):
    """One entry of the file. None: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Name
    tenant: Name | None = None
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    max_in_flight: Limit | None = None
    highest_priority: int = Field(1, ge=0, le=2)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: list[Key] = Field(default_factory=list)

    @model_validator(mode="after")
    def _no_two_alike(self) -> Self:
        for field in ("name", "sha256"):
            if len({getattr(key, field) for key in self.keys}) < len(self.keys):
                raise ValueError(f"two keys have one {field}")
        return self


def new_secret() -> str:
    """A secret that nobody can guess: the prefix, for those who search for leaked ones, and 256
    random bits.
    """
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> str:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_entry(secret: str, **fields: str | int | None) -> str:
    """What stands in the file for a secret; `fields` are those of Key. Raises StartupError."""
    try:
        key = Key.model_validate({**fields, "sha256": digest_of(secret)})
    except ValidationError as error:
        raise StartupError(f"key: {_first(error)}") from None
    lines = ["[[keys]]"]
    for name, value in key.model_dump(exclude_none=True).items():
        lines.append(f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}")
    return "\n".join(lines) + "\n"


def read_keys(path: Path) -> Mapping[str, Key]:
    """Digest -> key; empty if the file is. Raises StartupError, with one line that shows nothing of
    the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UnreadableError(f"keys file: {error.strerror or 'cannot be read'}") from error
    except UnicodeDecodeError:
        raise StartupError("keys file: it is not TOML") from None
    try:
        file = _File.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError:
        raise StartupError("keys file: it is not TOML") from None
    except ValidationError as error:
        raise StartupError(f"keys file: {_first(error)}") from None
    return {key.sha256: key for key in file.keys}


class UnreadableError(StartupError):
    """The file could not be read, for the OSError that is its cause."""


class KeyRing:
    """The keys of a file, as of its last valid content. `on_reload` gets whether a change was
    taken over.
    """

    def __init__(self, path: Path, *, on_reload: Callable[[bool], None]) -> None:
        """Raises StartupError if there is no valid file, or one without keys, to begin with."""
        self._path = path
        self._on_reload = on_reload
        self._seen = _state(path)
        self._unreadable = ""  # the last reason, reported once
        self._keys = read_keys(path)
        if not self._keys:
            raise StartupError("keys file: it has no keys; `quire key` makes one")

    def find(self, secret: str) -> Key | None:
        """The key whose secret it is."""
        return self._keys.get(digest_of(secret))

    def look(self) -> None:
        """Reads the file again if it changed. An invalid one is not read again until it changes,
        one that cannot be read is tried again each time. Running calls go on, whatever happens to
        their key.
        """
        state = _state(self._path)
        if state == self._seen:
            return
        self._seen = state
        good, unreadable = True, ""
        try:
            self._keys = self._read_again()
        except StartupError as error:
            good = False
            if isinstance(error, UnreadableError):
                self._seen = None  # its state may stay the same when it can be read again
                unreadable = str(error)
            if not unreadable or unreadable != self._unreadable:
                log.warning("the keys stay as they were: %s", error)
                self._on_reload(good)
        self._unreadable = unreadable
        if good:
            self._log_change()
            self._on_reload(good)

    def _log_change(self) -> None:
        if self._keys:
            log.info("keys file read again: %d keys", len(self._keys))
        else:
            log.warning("keys file is empty or deleted: all keys are revoked")

    def _read_again(self) -> Mapping[str, Key]:
        try:
            return read_keys(self._path)
        except UnreadableError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return {}
            raise

    async def watch(self) -> None:
        """Looks for ever, in a thread of its own: a network file system may be slow, and nothing
        that clients cause may delay a revocation.
        """
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="keys")
        try:
            while True:
                await asyncio.sleep(LOOK_EVERY)
                await loop.run_in_executor(thread, self.look)
        finally:
            thread.shutdown(wait=False)


def _first(error: ValidationError) -> str:
    """The first fault, without what was found there: it could be a secret in the wrong place."""
    fault = error.errors(include_input=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"][:1].lower() + fault["msg"][1:]
    return f"{place}: {message}" if place else message


def _state(path: Path) -> tuple[int, ...] | None:
    """What changes with the file, or with the target of a link; None if it cannot be looked at."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return ()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
