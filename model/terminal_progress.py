"""Bars for a person who loads a preset from Python, and nothing for a log."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress as Bars, TaskID, TextColumn, TimeElapsedColumn

from model.progress import Progress, no_progress

_VERBS = {"download": "Fetching", "convert": "Converting", "load": "Loading"}


@contextmanager
def terminal_progress() -> Iterator[Progress]:
    """A `Progress` that draws a bar for each phase if there is a terminal or a notebook."""
    console = Console(file=sys.stderr)
    if not (console.is_terminal or console.is_jupyter):
        yield no_progress
        return
    bars = Bars(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}

    def progress(phase: str, done: float, total: float) -> None:
        if phase not in tasks:
            tasks[phase] = bars.add_task(_VERBS.get(phase, phase), total=total)
        bars.update(tasks[phase], completed=done, total=total)

    with bars:
        yield progress
