"""Exposure: what a server without keys serves, and to which clients."""

from __future__ import annotations

from service.api.hosts import AllowedHosts, HostCheck, any_host
from service.errors import StartupError
from service.settings import Settings


def refuse_exposure(settings: Settings) -> None:
    """Raises StartupError if the whole network could use a server without keys."""
    protected = settings.keys_file is not None or settings.allow_anonymous
    if not settings.is_loopback and not protected:
        raise StartupError(
            f"host {settings.host} can be reached by others and no keys are configured;"
            " give a --keys-file, or say --allow-anonymous if that is meant"
        )


def keyless_hosts(settings: Settings) -> HostCheck:
    """Which hosts a port without keys accepts: an address that others can reach has names that
    only the operator knows.
    """
    names = settings.allowed_hosts
    if "*" in names or not (names or settings.is_loopback):
        return any_host
    return AllowedHosts(
        names=names, any_address=not settings.is_loopback, origins=settings.cors_origins
    )


def extras_of(settings: Settings) -> set[str]:
    """The optional routes. By default the OpenAPI document is only for servers without keys."""
    wanted = {"page": settings.page, "docs": settings.docs or settings.keys_file is None}
    return {name for name, serve in wanted.items() if serve}
