"""The command line: `quire serve`, `api`, `engine`, `tune` and others; `quire --help` lists them.

Each setting of `service.settings` is a flag, under its heading. `service/roles.py` has the roles;
nothing heavy is imported before a role is chosen.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from service.errors import StartupError
from service.setting_rows import setting_rows
from service.setting_types import Group
from service.settings import Settings, load_settings
from service.tune import tune

app = typer.Typer(
    name="quire",
    help="An LLM server whose answers survive anything.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(tune, name="tune")


def with_settings(*groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a flag for each setting of these groups, and `--config`, to a command.

    The command is called with the Settings.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        rows = [row for row in setting_rows() if row.group in {group.value for group in groups}]

        def run(*, config: Path | None = None, **given: Any) -> None:  # noqa: ANN401
            flags = {
                name: ",".join(value) if isinstance(value, list) else value
                for name, value in given.items()
                if value is not None and value != []
            }
            command(load_settings(flags, file=config))

        parameters = [
            _flag(row.name, row.group, row.help, row.default, list[str] if row.repeated else str)
            for row in rows
        ]
        parameters.append(_flag("config", "Settings", "TOML file of settings.", "", Path))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def _flag(name: str, group: str, text: str, default: str, kind: type = str) -> inspect.Parameter:
    """Returns a keyword parameter that typer makes a flag; its value is None if it is not given."""
    is_switch = name in Settings.model_fields and Settings.model_fields[name].annotation is bool
    flag = "--" + name.replace("_", "-")
    option = typer.Option(
        None,
        f"{flag}/--no-{flag[2:]}" if is_switch else flag,
        help=escape(text) + (f" [dim]\\[{default}][/dim]" if default else ""),
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
    """Run API, queue and engine in one process."""
    from service.roles import run_role, serve

    run_role(serve, settings, console=Console(stderr=True))


@app.command(name="api")
@with_settings(Group.MODEL, Group.QUEUE, Group.HTTP, Group.BATCHES, Group.LOGS, Group.TELEMETRY)
def api_replica(settings: Settings) -> None:
    """Run an API replica, over a queue that it shares with engine replicas."""
    from service.roles import run_role, serve_api

    run_role(serve_api, settings, console=Console(stderr=True))


@app.command(name="engine")
@with_settings(*Group)
def engine_replica(settings: Settings) -> None:
    """Run an engine replica, over a queue that it shares with API replicas."""
    from service.roles import run_role, serve_engine

    run_role(serve_engine, settings, console=Console(stderr=True))


@app.command()
@with_settings(Group.MODEL, Group.LOGS)
def pull(settings: Settings) -> None:
    """Download the models into the cache and print their paths."""
    from service.startup import fetch_model

    for source in settings.sources:
        print(fetch_model(settings, source, console=Console(stderr=True)))  # noqa: T201 - for scripts


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="URL of the server.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Model name; default: the first one of the server.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    api_key: Annotated[str | None, typer.Option(help="API key.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, max=2.0, help="Sampling temperature; 0 is greedy.")
    ] = None,
) -> None:
    """Chat with a running server in the terminal."""
    from service.chat import chat as run_chat

    run_chat(
        url,
        model=model,
        system=system,
        api_key=api_key,
        temperature=temperature,
        console=Console(),
    )


@app.command()
def bench(  # noqa: PLR0913, PLR0917 - its flags
    url: Annotated[str, typer.Option(help="URL of any OpenAI-compatible server.")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[
        str | None, typer.Option(help="Model name; default: the first one of the server.")
    ] = None,
    api_key: Annotated[str, typer.Option(help="API key.")] = "",
    rates: Annotated[
        str, typer.Option(help="Rates of arrivals, requests per second, separated by commas.")
    ] = "1,2,4",
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of arrivals per rate.")] = 30.0,
    dataset: Annotated[
        Path | None, typer.Option(help="JSONL of prompts, messages or ShareGPT's conversations.")
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a synthetic prompt, about.")
    ] = 256,
    output_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    slo_first: Annotated[
        float, typer.Option(min=0.001, help="Goodput: most seconds to the first token.")
    ] = 1.0,
    slo_token: Annotated[
        float, typer.Option(min=0.001, help="Goodput: most seconds per further token.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Of prompts and arrival times.")] = 0,
    json: Annotated[Path | None, typer.Option(help="File for the results as JSON.")] = None,
) -> None:
    """Measure a server: latencies, throughput and goodput at each rate of requests.

    Ends with status 1 if no answer was complete.
    """
    from service.bench import run

    options = run.Options(
        url=url,
        model=model,
        api_key=api_key,
        rates=run.parse_rates(rates),
        seconds=seconds,
        dataset=dataset,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        objectives=run.Objectives(first_token=slo_first, per_token=slo_token),
        seed=seed,
    )
    if not run.report(options, json, console=Console()):
        sys.exit(1)


@app.command(name="key")
def make_key(
    name: Annotated[str, typer.Argument(help="Name of the key, unique in the file.")],
    tenant: Annotated[
        str | None,
        typer.Option(
            help="Tenant: owner of prefix cache, streams and fair share. [dim]\\[name][/]"
        ),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    max_in_flight: Annotated[
        int | None, typer.Option(min=1, help="Maximum requests, waiting and running.")
    ] = None,
    highest_priority: Annotated[
        int, typer.Option(min=0, max=2, help="Highest priority of its requests; 0 is the highest.")
    ] = 1,
) -> None:
    """Create an API key: prints its entry for the keys file, and the key itself to stderr."""
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
    print(entry, end="")  # noqa: T201 - for the file: `quire key alice >> keys.toml`
    print(f"key of {name}, shown only now: {secret}", file=sys.stderr)  # noqa: T201


@app.command()
@with_settings(*Group)
def doctor(settings: Settings) -> None:
    """Check this machine and a configuration, with the flags of `serve`; each line says what to do.

    Ends with status 1 if something must be changed.
    """
    from service.doctor.report import examine

    if not examine(settings, console=Console()):
        sys.exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    print(f"quire {distribution_version('quire-llm')}")  # noqa: T201


def main() -> None:
    """Runs the command line. A StartupError is printed as one line, with exit code 2."""
    gc.set_threshold(100_000)  # what is imported stays: collections took a sixth of the start
    try:
        app()
    except StartupError as error:
        console = Console(stderr=True)
        # Not wrapped: it stays one line in a log, too.
        console.print(f"quire: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
