"""Shows a person, or a log, how far the start of the service is, or a command.

A bar for each phase on a terminal; otherwise one JSON line when a phase begins, every few seconds
while it lasts, and when it ends.
"""

import json
import sys
import time
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress as Bars, TaskID, TextColumn, TimeElapsedColumn

_LINE_SECONDS = 2.0
_VERBS = {
    "download": "Fetching",
    "convert": "Converting",
    "load": "Loading",
    "compile": "Compiling",
    "write": "Writing",
}


class StartupDisplay(Protocol):
    """Told about the start, then about its end."""

    def progress(self, phase: str, done: float, total: float) -> None: ...

    def ready(self, facts: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def startup_display(stream: TextIO = sys.stderr) -> StartupDisplay:
    """Bars if ``stream`` is a terminal, JSON lines otherwise."""
    return TerminalDisplay(stream) if stream.isatty() else LineDisplay(stream)


class TerminalDisplay:
    """A bar for each phase."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._bars = Bars(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._is_live = False

    def progress(self, phase: str, done: float, total: float) -> None:
        if not self._is_live:
            self._bars.start()
            self._is_live = True
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(_VERBS.get(phase, phase), total=total)
        self._bars.update(self._tasks[phase], completed=done, total=total)

    def ready(self, facts: dict[str, Any]) -> None:
        self.close()
        self._console.print(f"kernels: {facts['kernels']}", highlight=False, markup=False)
        self._console.print(f"Ready: {facts['preset']} on {facts['url']}", highlight=False)

    def close(self) -> None:
        if self._is_live:
            self._bars.stop()
        self._is_live = False
        self._tasks.clear()


class LineDisplay:
    """JSON lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last: tuple[str, float] = ("", 0.0)

    def progress(self, phase: str, done: float, total: float) -> None:
        last_phase, last_time = self._last
        now = time.monotonic()
        if phase == last_phase and done < total and now - last_time < _LINE_SECONDS:
            return
        self._last = (phase, now)
        self._write({"event": "progress", "phase": phase, "done": done, "total": total})

    def ready(self, facts: dict[str, Any]) -> None:
        self._write({"event": "ready", **facts})

    def close(self) -> None:
        self._last = ("", 0.0)

    def _write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
