"""All checks, printed line by line as they are done."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from model.limits import memory_limit
from service.doctor import Finding, Level
from service.doctor.hardware import (
    check_gpu,
    check_kernels,
    check_memory,
    check_speed,
    check_threads,
)
from service.doctor.machine import this_machine
from service.doctor.models import check_models
from service.doctor.store import check_files, check_queue
from service.settings import Settings

STYLES = {Level.OK: "green", Level.NOTE: "yellow", Level.BAD: "red"}


def findings(settings: Settings) -> Iterator[Finding]:
    """Everything that can be known before a start."""
    from model.native.roof import count_weights

    machine = this_machine()
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    yield Finding("versions", f"{packages}; {machine.system}")
    yield Finding("processor", str(machine).partition(" (")[0])
    yield check_kernels(machine)
    yield check_threads(machine, settings)
    models = list(check_models(settings))
    configs = [config for _, config in models if config is not None]
    weights = [count_weights(config) for config in configs]
    yield check_memory(machine, settings, limit=memory_limit(), weights=weights)
    yield from check_gpu()
    for finding, _ in models:
        yield finding
    yield from check_queue(settings)
    yield check_files(settings)
    yield from check_speed(configs, settings)


def examine(settings: Settings, *, console: Console) -> bool:
    """Prints the findings. Returns whether none is BAD."""
    good = True
    for each in findings(settings):
        good &= each.level is not Level.BAD
        mark = f"[{STYLES[each.level]}]{each.level:4}[/]"
        console.print(f"{mark} [dim]{each.subject:16}[/]", end="", highlight=False)
        console.print(each.text, markup=False, highlight=False, soft_wrap=True)
        if each.advice:
            console.print(f"{'':21}-> {each.advice}", markup=False, highlight=False, soft_wrap=True)
    return good
