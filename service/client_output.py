"""What the commands of a running service show: a job while it trains, and tables."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from service.client import Adapter, AdapterSummary, DryRun, JobState, Version
from service.client.job_progress import JobProgress, duration
from service.client.job_views import TerminalView

_LINE_SECONDS = 2.0


def view_of_command(stream: TextIO) -> "TerminalView | JsonLinesView":
    """A bar on a terminal, JSON lines otherwise."""
    return TerminalView(stream) if stream.isatty() else JsonLinesView(stream)


class JsonLinesView:
    """As every command shows how far it is where no terminal is: an object every few seconds."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._told: tuple[Any, ...] = ()
        self._shown = float("-inf")
        self._last: dict[str, Any] | None = None

    def show(self, progress: JobProgress) -> None:
        self._last = _facts(progress)
        news = (progress.status, progress.version)
        if news != self._told or self._clock() - self._shown >= _LINE_SECONDS:
            self._told, self._shown = news, self._clock()
            self._write()

    def close(self) -> None:
        self._write()

    def _write(self) -> None:
        if self._last is not None:
            self._stream.write(json.dumps(self._last) + "\n")
            self._stream.flush()
            self._last = None


def _facts(progress: JobProgress) -> dict[str, Any]:
    return {
        "event": "progress",
        "phase": "train",
        "done": progress.step,
        "total": progress.total_steps,
        "job": progress.job_id,
        "status": progress.status,
        "detail": progress.detail,
        "loss": progress.loss,
        "valid_loss": progress.valid_loss,
        "version": progress.version,
        "tokens_per_s": progress.tokens_per_s,
        "seconds_left": progress.seconds_left,
    }


def how_far(state: JobState) -> str:
    """``at step 12 of 40``."""
    return f"at step {state.step} of {state.total_steps}"


def print_json(answers: Sequence[JobState | AdapterSummary | Version], stream: TextIO) -> None:
    """One object a line."""
    for answer in answers:
        stream.write(answer.model_dump_json() + "\n")


def print_result(state: JobState, stream: TextIO) -> None:
    """What came of a job that has succeeded."""
    name = f"{state.base}:{state.adapter}"
    losses = [f"loss {_number(state.metrics.loss)}"]
    if state.metrics.valid_loss is not None:
        losses.append(f"validation loss {_number(state.metrics.valid_loss)}")
    is_live = f"live as {name}" if state.live else "not live"
    facts = [f"{name}@{state.version} is there, {is_live}", f"{state.step} steps", *losses]
    stream.write(f"{', '.join(facts)}\n")


def print_dry_run(told: DryRun, stream: TextIO) -> None:
    """What a job would take; of the first rows, what would be learned stands in brackets."""
    stream.write(
        f"steps      {told.steps:,}\n"
        f"tokens     {told.tokens:,}, {told.padded_tokens:,} with padding\n"
        f"estimated  {duration(told.estimated_s)}, if nobody else is served meanwhile\n"
    )
    for number, row in enumerate(told.first_rows, start=1):
        pairs = zip(row.tokens, row.loss_mask, strict=True)
        words = [f"[{_shown(token)}]" if learned else _shown(token) for token, learned in pairs]
        stream.write(f"row {number}      {' '.join(words)}\n")


def print_jobs(states: Sequence[JobState], stream: TextIO) -> None:
    header = ("job", "adapter", "status", "step", "loss", "valid", "version", "created")
    rows = [
        (
            state.id,
            state.adapter,
            state.status,
            f"{state.step}/{state.total_steps}",
            _number(state.metrics.loss),
            _number(state.metrics.valid_loss),
            state.version,
            f"{state.created:%Y-%m-%d %H:%M}",
        )
        for state in states
    ]
    print_table([header, *rows], stream)
    for state in states:
        if state.error is not None:
            stream.write(f"{state.id}: {state.error.detail} ({state.error.code})\n")


def print_adapters(summaries: Sequence[AdapterSummary], stream: TextIO) -> None:
    rows = [(each.name, each.live, each.newest) for each in summaries]
    print_table([("adapter", "live", "newest"), *rows], stream)


def print_versions(adapter: Adapter, stream: TextIO) -> None:
    header = ("version", "live", "origin", "step", "rank", "loss", "valid", "created")
    rows = [
        (
            version.version,
            "yes" if version.version == adapter.live else None,
            version.job or version.origin,
            version.step,
            version.rank,
            _number(version.metrics.loss),
            _number(version.metrics.valid_loss),
            f"{version.created:%Y-%m-%d %H:%M}",
        )
        for version in adapter.versions
    ]
    print_table([header, *rows], stream)


def print_table(rows: Sequence[Sequence[Any]], stream: TextIO) -> None:
    """Columns from left to right; what is None stays empty."""
    words = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*words, strict=True)]
    for row in words:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        stream.write("  ".join(cells).rstrip() + "\n")


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _shown(token: str) -> str:
    """A token so that its white space and control characters can be seen."""
    return repr(token)[1:-1]
