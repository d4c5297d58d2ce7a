"""A job shown while it trains: a bar on a terminal, lines in a file.

They need nothing: a bar is one line that is written again and again.
"""

import shutil
import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from service.client.job_progress import JobProgress
from service.client.notebook_view import NotebookView, notebook_display

_BAR_SECONDS = 0.1
_LINE_SECONDS = 2.0
_BAR_CELLS = 24


class JobView(Protocol):
    """Told how far a job is after each of its events."""

    def show(self, progress: JobProgress) -> None:
        """It may be further by now; what is shown follows within a moment."""

    def close(self) -> None:
        """Nothing more comes: shows the last that it was told."""


def view_for(stream: TextIO | None = None) -> JobView:
    """A plot in a notebook, a bar if ``stream`` is a terminal, lines otherwise."""
    display = notebook_display()
    if display is not None and stream is None:
        return NotebookView(display)
    stream = stream or sys.stderr
    return TerminalView(stream) if stream.isatty() else LineView(stream)


class TerminalView:
    """One line that moves; what it says last stays there."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._shown = float("-inf")
        self._last: JobProgress | None = None

    def show(self, progress: JobProgress) -> None:
        self._last = progress
        if self._clock() - self._shown >= _BAR_SECONDS:
            self._draw(progress)

    def close(self) -> None:
        if self._last is not None:
            self._draw(self._last)
            self._write("\n")

    def _draw(self, progress: JobProgress) -> None:
        self._shown = self._clock()
        # One less than there are: a terminal may go to the next line behind its last column.
        columns = shutil.get_terminal_size().columns - 1
        line = bar_line(progress, _can_encode(self._stream))[:columns]
        # To the beginning of the line, and all of it empty.
        self._write(f"\r\x1b[2K{line}")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class LineView:
    """A line at the beginning, at the end, when the status changes, and every few seconds."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._shown = float("-inf")
        self._status = ""
        self._line = ""

    def show(self, progress: JobProgress) -> None:
        self._line = status_line(progress)
        is_news = progress.status != self._status
        if is_news or self._clock() - self._shown >= _LINE_SECONDS:
            self._status, self._shown = progress.status, self._clock()
            self._write()

    def close(self) -> None:
        self._write()

    def _write(self) -> None:
        """Each line once."""
        if self._line:
            self._stream.write(self._line + "\n")
            self._stream.flush()
            self._line = ""


def bar_line(progress: JobProgress, has_blocks: bool = True) -> str:
    """``tone ━━━━━━━━────────  12/40  loss 1.91  1,234 tokens/s  0:42 left``."""
    full, empty = "━─" if has_blocks else "#-"
    share = progress.step / progress.total_steps if progress.total_steps else 0.0
    cells = round(_BAR_CELLS * share)
    bar = full * cells + empty * (_BAR_CELLS - cells)
    return "  ".join([f"{progress.adapter} {bar}", *_steps_and_figures(progress)])


def status_line(progress: JobProgress) -> str:
    """``ft_1 tone  running  step 12/40  loss 1.91  1,234 tokens/s  0:42 left``."""
    steps, *rest = _steps_and_figures(progress)
    words = [f"{progress.job_id} {progress.adapter}", f"step {steps}", *rest]
    if progress.status == "running":
        words.insert(1, "running")
    return "  ".join(words)


def _steps_and_figures(progress: JobProgress) -> list[str]:
    words = [f"{progress.step}/{progress.total_steps}", *progress.figures()]
    if progress.status != "running":
        words.append(progress.status)
    if progress.detail is not None:
        words.append(progress.detail)
    return words


def _can_encode(stream: TextIO) -> bool:
    try:
        "━─".encode(stream.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True
