"""The command line: `quire serve | api | engine | pull | chat | key | version`.

Flags are made from `service.settings`, one a setting, under its headings. What the roles are
composed of stands in `service/roles.py`; nothing heavy is imported before a role is chosen.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from service.errors import StartupError
from service.settings import Group, Settings, load_settings, setting_rows

app = typer.Typer(
    name="quire",
    help="An LLM server whose answers survive anything.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def with_settings(*groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command one flag for each setting of these groups, and `--config`.

    The command is called with the Settings and with its own parameters.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        rows = [row for row in setting_rows() if row.group in {group.value for group in groups}]
        own = list(inspect.signature(command).parameters.values())[1:]

        def run(*, config: Path | None = None, **given: Any) -> None:  # noqa: ANN401
            mine = {parameter.name: given.pop(parameter.name) for parameter in own}
            flags = {name: value for name, value in given.items() if value is not None}
            command(load_settings(flags, file=config), **mine)

        parameters = [*own, *(_flag(row.name, row.group, row.help, row.default) for row in rows)]
        parameters.append(_flag("config", "Settings", "A TOML file of settings.", "", Path))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def _flag(name: str, group: str, text: str, default: str, kind: type = str) -> inspect.Parameter:
    """A keyword parameter that typer turns into a flag; None means that it was not given."""
    is_switch = name in Settings.model_fields and Settings.model_fields[name].annotation is bool
    flag = "--" + name.replace("_", "-")
    option = typer.Option(
        None,
        f"{flag}/--no-{flag[2:]}" if is_switch else flag,
        help=text + (f" [dim]\\[{default}][/dim]" if default else ""),
        rich_help_panel=group,
        show_default=False,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=option,
        annotation=(bool if is_switch else kind) | None,
    )


@app.command(name="serve")
@with_settings(*Group)
def serve_all(settings: Settings) -> None:
    """API, queue and engine in one process: everything that one machine needs."""
    from service.roles import run_role, serve

    run_role(serve, settings, console=Console(stderr=True))


@app.command(name="api")
@with_settings(Group.MODEL, Group.QUEUE, Group.HTTP, Group.LOGS, Group.TELEMETRY)
def api_replica(settings: Settings) -> None:
    """An API replica: HTTP over a shared queue; engines elsewhere do the work."""
    from service.roles import run_role, serve_api

    run_role(serve_api, settings, console=Console(stderr=True))


@app.command(name="engine")
@with_settings(*Group)
def engine_replica(settings: Settings) -> None:
    """An engine replica: takes work from a shared queue; APIs elsewhere face the clients."""
    from service.roles import run_role, serve_engine

    run_role(serve_engine, settings, console=Console(stderr=True))


@app.command()
@with_settings(Group.MODEL, Group.LOGS)
def pull(settings: Settings) -> None:
    """Fetch a model into the cache and say where it is."""
    from service.startup import fetch_model

    path = fetch_model(settings, console=Console(stderr=True))
    print(path)  # noqa: T201 - the answer of the command, for scripts


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8000",
    model: Annotated[Optional[str], typer.Option(help="Model; by default the first.")] = None,  # noqa: UP045
    system: Annotated[Optional[str], typer.Option(help="System prompt.")] = None,  # noqa: UP045
    api_key: Annotated[Optional[str], typer.Option(help="Key, where asked for.")] = None,  # noqa: UP045
    temperature: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, max=2.0, help="0 is greedy."),
    ] = None,
) -> None:
    """Talk to a running server in the terminal."""
    from service.chat import chat as talk

    talk(
        url,
        model=model,
        system=system,
        api_key=api_key,
        temperature=temperature,
        console=Console(),
    )


@app.command(name="key")
def make_key(
    name: Annotated[str, typer.Argument(help="The key's name, used once in the file.")],
    tenant: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Whose prefix cache, streams and share it has; by default the name's."),
    ] = None,
    requests_per_minute: Annotated[Optional[int], typer.Option(min=1)] = None,  # noqa: UP045
    tokens_per_minute: Annotated[Optional[int], typer.Option(min=1)] = None,  # noqa: UP045
    max_in_flight: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Requests, waiting and running."),
    ] = None,
    highest_priority: Annotated[
        int, typer.Option(min=0, max=2, help="0 goes before 1 before 2.")
    ] = 1,
) -> None:
    """Make an API key: `quire key alice >> keys.toml` keeps its digest, and shows it this once."""
    from service.keys import new_entry, new_secret

    secret = new_secret()
    entry = new_entry(
        secret,
        name=name,
        tenant=tenant,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_in_flight=max_in_flight,
        highest_priority=highest_priority,
    )
    print(entry, end="")  # noqa: T201 - the answer of the command, for the file
    print(f"the key of {name}, shown this once: {secret}", file=sys.stderr)  # noqa: T201


@app.command()
def version() -> None:
    """Print the version."""
    print(f"quire {distribution_version('quire-llm')}")  # noqa: T201 - the answer of the command


def main() -> None:
    """Runs the command line; a StartupError is one line and exit code 2."""
    try:
        app()
    except StartupError as error:
        console = Console(stderr=True)
        # Not wrapped: it stays one line in a log, too.
        console.print(f"quire: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
