"""Exposure: which clients may reach a server without API keys, and what it serves to them."""

from __future__ import annotations

from service.api.http.middleware import AllowedHosts, HostCheck, any_host
from service.errors import StartupError
from service.settings import Settings


def refuse_exposure(settings: Settings) -> None:
    """Raises StartupError if other hosts could reach a server without keys."""
    protected = settings.keys_file is not None or settings.allow_anonymous
    if not settings.is_loopback and not protected:
        raise StartupError(
            f"host {settings.host} is reachable from other machines and no keys are configured;"
            " set --keys-file, or --allow-anonymous to serve without keys"
        )


def keyless_hosts(settings: Settings) -> HostCheck:
    """Returns the check of a port without keys. On an address that other machines can reach, only
    the operator knows the valid host names: without `allowed_hosts`, all are accepted.
    """
    names = settings.allowed_hosts
    if "*" in names or not (names or settings.is_loopback):
        return any_host
    return AllowedHosts(
        names=names, any_address=not settings.is_loopback, origins=settings.cors_origins
    )


def extras_of(settings: Settings) -> set[str]:
    """Returns the optional routes. By default, the OpenAPI document needs a server without keys."""
    enabled = {"page": settings.page, "docs": settings.docs or settings.keys_file is None}
    return {name for name, serve in enabled.items() if serve}
