"""Keys: the API keys of a TOML file, which is reloaded when it changes.

    [[keys]]
    name = "alice"                  # in logs and limits; used once in the file
    tenant = "research"             # owns prefix cache, streams, fair share; default: the name
    sha256 = "9f86d081..."          # of the secret, in hexadecimal; `quire key` creates both
    requests_per_minute = 60        # these four are optional; default: no limit, priority 1
    tokens_per_minute = 100000
    max_in_flight = 8
    highest_priority = 0

Memory and file contain only digests. A secret is 256 random bits, which cannot be guessed: a plain
SHA-256 protects it as well as a slow, salted hash protects passwords, without the cost per call. A
key is looked up by the digest of the secret that was sent, so the time that it takes reveals only
something about a digest that the client can compute.

While the server runs, an empty or deleted file revokes all keys: every call is refused until the
file has keys again. An unreadable or invalid file changes nothing, so that a typing error does not
lock all clients out: the last valid keys stay in force.

`service.api.http.auth` reads the HTTP headers.
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
CHECK_INTERVAL = 1.0
"""Seconds between two checks of the file."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Limit = Annotated[int, Field(ge=1, le=10**9)]


class Key(BaseModel):
    """An entry of the file. None: no limit."""

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
    def _check_unique(self) -> Self:
        for field in ("name", "sha256"):
            if len({getattr(key, field) for key in self.keys}) < len(self.keys):
                raise ValueError(f"{field} must be unique")
        return self


def new_secret() -> str:
    """Returns 256 random bits, with a prefix by which scanners find leaked secrets."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def new_entry(secret: str, **fields: str | int | None) -> str:
    """Returns the entry of a secret in the file. `fields` are those of Key. Raises StartupError."""
    try:
        key = Key.model_validate({**fields, "sha256": digest_of(secret)})
    except ValidationError as error:
        raise StartupError(f"key: {_first(error)}") from None
    lines = ["[[keys]]"]
    for name, value in key.model_dump(exclude_none=True).items():
        lines.append(f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}")
    return "\n".join(lines) + "\n"


def read_keys(path: Path) -> Mapping[str, Key]:
    """Returns the keys by digest. Raises StartupError, whose message quotes nothing of the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UnreadableError(f"keys file: {error.strerror or 'cannot be read'}") from error
    except UnicodeDecodeError:
        raise StartupError("keys file: not valid TOML") from None
    try:
        file = _File.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError:
        raise StartupError("keys file: not valid TOML") from None
    except ValidationError as error:
        raise StartupError(f"keys file: {_first(error)}") from None
    return {key.sha256: key for key in file.keys}


class UnreadableError(StartupError):
    """The file could not be read; the cause is the OSError."""


class KeyRing:
    """The keys of the file's last valid content. `on_reload` is called after each change, with
    whether it was valid.
    """

    def __init__(self, path: Path, *, on_reload: Callable[[bool], None]) -> None:
        """Raises StartupError if the file is invalid or has no keys."""
        self._path = path
        self._on_reload = on_reload
        self._seen = _state(path)
        self._unreadable = ""  # the last reason, which is logged once
        self._keys = read_keys(path)
        if not self._keys:
            raise StartupError("keys file: it has no keys; create one with `quire key`")

    def find(self, secret: str) -> Key | None:
        """Returns the key of a secret; None if there is none."""
        return self._keys.get(digest_of(secret))

    def check(self) -> None:
        """Reloads the file if it changed. Reads an invalid file again after its next change, an
        unreadable one each time. Running calls continue, even if their key is revoked.
        """
        state = _state(self._path)
        if state == self._seen:
            return
        self._seen, unreadable = state, self._unreadable
        self._unreadable = ""
        try:
            self._keys = self._reread()
        except UnreadableError as error:
            self._seen = None  # becoming readable may not change its state
            self._unreadable = str(error)
            if self._unreadable != unreadable:
                self._report(error)
        except StartupError as error:
            self._report(error)
        else:
            self._report(None)

    def _report(self, error: StartupError | None) -> None:
        if error is not None:
            log.warning("keys not reloaded; the last valid ones stay in force: %s", error)
        elif self._keys:
            log.info("keys reloaded: %d keys", len(self._keys))
        else:
            log.warning("keys file is empty or deleted: all keys are revoked")
        self._on_reload(error is None)

    def _reread(self) -> Mapping[str, Key]:
        try:
            return read_keys(self._path)
        except UnreadableError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return {}
            raise

    async def watch(self) -> None:
        """Checks the file until cancelled, in a thread of its own: a network file system may be
        slow, and requests must not delay a revocation.
        """
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="keys")
        try:
            while True:
                await asyncio.sleep(CHECK_INTERVAL)
                await loop.run_in_executor(thread, self.check)
        finally:
            thread.shutdown(wait=False)


def _first(error: ValidationError) -> str:
    """Returns the first error without its input, which could be a secret in the wrong field."""
    first = error.errors(include_input=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"{path}: {message}" if path else message


def _state(path: Path) -> tuple[int, ...] | None:
    """Returns what changes with the file or with the target of a link; None if it is unreadable."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return ()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
