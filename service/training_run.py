"""One training run in the terminal: its state, its progress, and how it ends.

Ctrl-C saves the state between two steps; a second one ends the process at once.
"""

from __future__ import annotations

import math
import resource
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from types import FrameType

    from model.training.loop import Recipe, StepReport, Task
    from model.training.ranks import Ranks
    from model.transformer import Transformer

INTERRUPTED = 130  # the exit code of a run that Ctrl-C stopped
_MAX_SHOWN = 12  # labels of a confusion matrix
_LINE_INTERVAL = 10.0  # seconds between lines if the output is no terminal


class TrainingRun:
    """One run: its state, its progress, and how it ends."""

    def __init__(self, out: Path, ranks: Ranks, *, bfloat16: bool | None, resume: bool) -> None:
        self._out, self._ranks, self._resume = out, ranks, resume
        self._autocast = ranks.device.type == "cuda" if bfloat16 is None else bfloat16
        self._console = Console(stderr=True, quiet=not ranks.leads)
        self.measures: Mapping[str, float] = {}
        self._began = time.monotonic()
        self._stopped = False

    def train(self, network: Transformer, task: Task, recipe: Recipe) -> None:
        """Trains to the end. Raises typer.Exit if it is interrupted, after the state is saved."""
        from model.training.loop import Training

        training = Training(network, task, recipe, ranks=self._ranks, autocast=self._autocast)
        if self._resume:
            training.resume(self._out)
        display = _Display(self._console, first=training.step, steps=recipe.steps)
        with self._interruptible(), display:
            finished = training.run(self._out, report=display.show, stop=lambda: self._stopped)
        self.measures = display.measures
        if not finished:
            self._say(f"stopped after step {training.step}; continue with --resume")
            raise typer.Exit(INTERRUPTED)

    def finish(self, *, per_byte: float | None = None) -> None:
        """Removes the saved state and reports what was reached. per_byte: tokens per byte."""
        from model.training.loop import STATE

        (self._out / STATE).unlink(missing_ok=True)
        seconds, cpu = time.monotonic() - self._began, time.process_time()
        measures = dict(self.measures)
        if per_byte is not None and "loss" in measures:
            measures["bits per byte"] = measures["loss"] * per_byte / math.log(2)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in measures.items())
        self._say(f"validation: {shown}" if shown else "no rows were held out")
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MiB, on Linux
        self._say(
            f"{seconds:.0f} s, {cpu:.0f} s of CPU time, {memory} MiB at most;"
            f" serve it: quire serve --model {self._out}"
        )

    def show_confusion(self, counts: Sequence[Sequence[int]], labels: Sequence[str]) -> None:
        """Shows how often each class (rows) was taken for each (columns), if it fits a screen."""
        if not counts or len(labels) > _MAX_SHOWN:
            return
        table = Table("label \\ predicted", *map(escape, labels))
        for name, row in zip(labels, counts, strict=True):
            table.add_row(escape(name), *map(str, row))
        self._console.print(table)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step; a second one ends it at once."""

        def stop(number: int, _frame: FrameType | None) -> None:
            self._stopped = True
            signal.signal(number, signal.SIG_DFL)

        before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


class _Display:
    """A progress bar; a line now and then if the output is no terminal."""

    def __init__(self, console: Console, *, first: int, steps: int) -> None:
        self.measures: Mapping[str, float] = {}
        self._console, self._steps = console, steps
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=first, shown="")
        self._tokens = 0
        self._began = time.monotonic()
        self._last_line = -math.inf

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, report: StepReport) -> None:
        """Shows a step."""
        now = time.monotonic()
        self._tokens += report.num_tokens
        self.measures = report.measures or self.measures
        speed = self._tokens / max(now - self._began, 1e-9)
        parts = [f"loss {report.loss:.4f}", f"{speed:.0f} tokens/s"]
        parts += [f"held-out {name} {value:.4f}" for name, value in self.measures.items()]
        shown = ", ".join(parts)
        self._bar.update(self._task, completed=report.step, shown=shown)
        due = report.step == self._steps or now - self._last_line >= _LINE_INTERVAL
        if not self._console.is_terminal and due:
            self._last_line = now
            self._console.print(
                f"step {report.step}/{self._steps}: {shown}", highlight=False, soft_wrap=True
            )
